"""What callers may write where a model's name is asked for: `model`, `model@chip`, `batch-model`.

A chip is named by its id, its vendor or the kind of its devices, in any case. Knows served models
and names; knows no HTTP. Start at `Names.find`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import msgspec

from mxn.engine.protocol import (
    Delta,
    Encode,
    Encoded,
    EngineClient,
    EngineStats,
    Generate,
    ModelInfo,
)
from mxn.serve.openai.errors import ApiError
from mxn.serve.pooled import PooledClient
from mxn.serve.served import ServedModel, ServedModels

BATCH_PREFIX = "batch-"
BATCH_PRIORITY = 10  # of requests to `batch-…`; 0 is a live one, smaller runs first

_MAX_CACHED = 1024


@dataclass(slots=True)
class Names:
    """Finds models by the longer names; what it made once it keeps."""

    _made: dict[tuple[str, str, frozenset[str]], tuple[ServedModel, ServedModel]] = field(
        default_factory=dict
    )

    def find(self, models: ServedModels, name: str) -> ServedModel | None:
        """Return the model, as a view of its replicas where the name asks for one; None: unknown.

        Raises: ApiError 404 for a chip that nobody knows, 400 for one without this model; both
        list the pairs that exist.
        """
        model = self._plain(models, name)
        if model is not None:
            return model
        base_name, _, chip = name.rpartition("@")
        base = self._plain(models, base_name) if base_name else None
        return None if base is None else self._on_chip(models, base, chip)

    def _plain(self, models: ServedModels, name: str) -> ServedModel | None:
        """Return the model of a name that says nothing about chips."""
        model = models.get(name)
        if model is not None or not name.startswith(BATCH_PREFIX):
            return model
        base = models.get(name.removeprefix(BATCH_PREFIX))
        return None if base is None else self._patient(base, name)

    def _on_chip(self, models: ServedModels, base: ServedModel, chip: str) -> ServedModel:
        chips = chips_named(base, chip)
        if not chips:
            raise _no_pair(models, base, chip)
        if chips == frozenset(chips_of(base)):
            return base
        client = base.client
        inner = client.inner if isinstance(client, Patient) else client
        assert isinstance(inner, PooledClient), "only a pool has more than one chip"
        key = (base.name, "@", chips)
        known = self._made.get(key)
        if known is not None and known[0] is base:
            return known[1]
        view: EngineClient = inner.pinned(*sorted(chips))
        if isinstance(client, Patient):
            view = Patient(view)
        return self._keep(key, base, replace(base, client=view))

    def _patient(self, base: ServedModel, name: str) -> ServedModel:
        """Return `base` at low priority, under the name that it is billed by."""
        key = (name, BATCH_PREFIX, frozenset())
        known = self._made.get(key)
        if known is not None and known[0] is base:
            return known[1]
        # Billed by its own name, or like the model itself where that has no price.
        parent = base.parent or base.name
        made = replace(base, name=name, aliases=(), parent=parent, client=Patient(base.client))
        return self._keep(key, base, made)

    def _keep(
        self, key: tuple[str, str, frozenset[str]], base: ServedModel, made: ServedModel
    ) -> ServedModel:
        if len(self._made) >= _MAX_CACHED:  # models came and went
            self._made.clear()
        self._made[key] = base, made
        return made


class Patient:
    """An `EngineClient` whose requests run at low priority."""

    def __init__(self, inner: EngineClient) -> None:
        self.inner = inner

    @property
    def info(self) -> ModelInfo:
        return self.inner.info

    @property
    def is_healthy(self) -> bool:
        return self.inner.is_healthy

    def chips(self) -> list[str]:
        inner = self.inner
        return inner.chips() if isinstance(inner, PooledClient) else [inner.info.chip]

    def generate(self, request: Generate) -> AsyncIterator[Delta]:
        priority = request.priority + BATCH_PRIORITY
        return self.inner.generate(msgspec.structs.replace(request, priority=priority))

    async def encode(self, request: Encode) -> Encoded:
        return await self.inner.encode(request)

    async def stats(self) -> EngineStats:
        return await self.inner.stats()

    async def close(self) -> None:
        """Nothing: the replicas belong to the model it is a view of."""


def base_name(name: str) -> str:
    """Return the plain model name within a longer one."""
    return (name.rpartition("@")[0] or name).removeprefix(BATCH_PREFIX)


def permitted_name(model: ServedModel) -> str:
    """Return the name that a key's list of models must hold, which is not cut from what was asked:
    a model may be called `batch-x` or `x@y` itself."""
    is_view = isinstance(model.client, Patient)
    return model.name.removeprefix(BATCH_PREFIX) if is_view else model.name


def chips_of(model: ServedModel) -> list[str]:
    """Return the chips a model runs on, each once."""
    return list(_devices(model))


def pairs(models: ServedModels) -> list[str]:
    """Return every `model@chip` that exists."""
    return [f"{model.name}@{chip}" for model in models for chip in chips_of(model)]


def chips_named(model: ServedModel, name: str) -> frozenset[str]:
    """Return the model's chips that `name` stands for: an id, a vendor or a kind of devices."""
    wanted = name.strip().lower()
    devices = _devices(model)
    exact = frozenset(chip for chip in devices if chip.lower() == wanted)
    return exact or frozenset(
        chip for chip, kinds in devices.items() if wanted in kinds or wanted == _vendor(chip)
    )


def _devices(model: ServedModel) -> dict[str, set[str]]:
    """Return chip → kinds of its devices, such as {"nvidia-h200": {"cuda"}}."""
    client = model.client.inner if isinstance(model.client, Patient) else model.client
    if isinstance(client, PooledClient):
        found = [(replica.chip, replica.device) for replica in client.replicas]
    else:
        found = [(model.info.chip, model.info.device)]
    devices: dict[str, set[str]] = {}
    for chip, device in found:
        devices.setdefault(chip, set()).add(device.partition(":")[0].lower())
    return devices


def _vendor(chip: str) -> str | None:
    from mxn.chips import specs

    spec = specs.find(chip)
    return None if spec is None else spec.vendor.lower()


def _is_known(models: ServedModels, name: str) -> bool:
    """Whether `name` is a chip, a vendor or a kind that mxn has heard of."""
    from mxn.chips import specs
    from mxn.chips.registry import plugins

    wanted = name.strip().lower()
    if any(chips_named(model, wanted) for model in models):
        return True
    known = {spec.name.lower() for spec in specs.all_specs().values()}
    for plugin in plugins():
        if plugin.chip is not None:
            known |= {plugin.chip.vendor.lower(), plugin.chip.torch_type.lower()}
    return wanted in known


def _no_pair(models: ServedModels, base: ServedModel, chip: str) -> ApiError:
    listed = ", ".join(pairs(models)) or "none"
    if _is_known(models, chip):
        return ApiError(
            f"The model {base.name!r} does not run on {chip!r}. Pairs that exist: {listed}.",
            param="model",
            code="model_not_on_chip",
            extra={"pairs": pairs(models)},
        )
    return ApiError(
        f"The chip {chip!r} does not exist. Pairs that exist: {listed}.",
        status=404,
        param="model",
        code="chip_not_found",
        extra={"pairs": pairs(models)},
    )
