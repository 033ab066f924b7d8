"""Connects a gateway to replicas on other servers. Start at `connect`.

What can be reached is served at once; the rest is tried again until it answers. Knows how replicas
are named and reached; starts none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence

from mxn.engine.protocol import EngineClient
from mxn.errors import ConfigError, MxnError
from mxn.models.tokenizer import Tokenizer
from mxn.serve.fleet import PoolRules, Replica
from mxn.serve.pooled import PooledClient
from mxn.serve.replicas.openai_compat import CompatEngine
from mxn.serve.replicas.passthrough import UpstreamModels
from mxn.serve.replicas.remote import RemoteEngine
from mxn.serve.replicas.spec import ReplicaSpec
from mxn.serve.replicas.upstream_chat import UpstreamModel
from mxn.serve.served import ServedModel, ServedModels

log = logging.getLogger("mxn.serve")

_RETRY_S = 1.0


def by_model(specs: Iterable[ReplicaSpec]) -> dict[str, list[ReplicaSpec]]:
    """Group replicas by the name of their model.

    Raises: ConfigError when one is named twice, or a model mixes pass-through with token ids.
    """
    groups: dict[str, list[ReplicaSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.model, []).append(spec)
    for model, group in groups.items():
        urls = [(spec.url, spec.remote_name) for spec in group]
        if len(set(urls)) < len(urls):
            raise ConfigError(
                f"a replica of {model!r} is named twice: {', '.join(u for u, _ in urls)}"
            )
        if len({spec.via == "pass" for spec in group}) > 1:
            raise ConfigError(
                f"some replicas of {model!r} take token ids and some only text, so a stream could "
                "not move between them",
                hint="give the foreign servers tokenizer=FOLDER, or serve them as another model",
            )
    return groups


def add_foreign(upstreams: UpstreamModels, groups: dict[str, list[ReplicaSpec]]) -> None:
    """Register models whose requests are passed through; nothing is asked of their servers."""
    for model, group in groups.items():
        if group[0].via == "pass":
            upstreams.add(UpstreamModel(model, [spec.upstream() for spec in group]))


async def connect(
    served: ServedModels, groups: dict[str, list[ReplicaSpec]], rules: PoolRules | None = None
) -> None:
    """Connect every model that takes token ids; return when all replicas are in.

    Models become ready one by one. Runs until cancelled while a server does not answer.
    """
    own = {model: group for model, group in groups.items() if group[0].via != "pass"}
    await asyncio.gather(*(_connect_model(served, *item, rules) for item in own.items()))


async def _connect_model(
    served: ServedModels, name: str, specs: Sequence[ReplicaSpec], rules: PoolRules | None
) -> None:
    pool = PooledClient(rules=rules)
    adding = asyncio.Lock()

    async def join(spec: ReplicaSpec) -> None:
        client = await _reach(spec)
        async with adding:  # the first one brings the tokenizer
            replica = Replica(
                id=_id_of(spec, specs), client=client, chip=spec.chip, device=spec.device
            )
            try:
                pool.add(replica)
                if served.get(name) is None:
                    folder = spec.tokenizer or client.info.path
                    served.add(await asyncio.to_thread(ServedModel.load, name, pool, folder))
            except MxnError as error:
                log.error("%s is not used for %s: %s", spec.url, name, error)
                if served.get(name) is None:
                    served.report_failure(name, str(error))

    await asyncio.gather(*(join(spec) for spec in specs))


def _id_of(spec: ReplicaSpec, specs: Sequence[ReplicaSpec]) -> str:
    """Return a name that is unique in the pool: the server's address, if that is enough."""
    place = spec.url.partition("://")[2]
    is_alone = sum(other.url == spec.url for other in specs) == 1
    return place if is_alone else f"{place}/{spec.remote_name}"


async def _reach(spec: ReplicaSpec) -> EngineClient:
    """Return a client of a server, as soon as it answers."""
    said = ""
    while True:
        try:
            if spec.via == "replica":
                return await RemoteEngine.connect(spec.url, spec.remote_name, key=spec.key)
            assert spec.tokenizer is not None, "checked when the option was read"
            tokenizer = await asyncio.to_thread(Tokenizer.load, spec.tokenizer)
            return await CompatEngine.connect(spec.compat(), tokenizer)
        except MxnError as error:
            if str(error) != said:
                said = str(error)
                log.warning("%s does not answer for %s yet: %s", spec.url, spec.model, said)
            await asyncio.sleep(_RETRY_S)
