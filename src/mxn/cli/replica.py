"""What commands with a replica of their own share: settings, progress while loading, prompts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxn.errors import UnsupportedError

if TYPE_CHECKING:
    from mxn.engine.client import ProcessEngine
    from mxn.engine.config import EngineConfig
    from mxn.engine.protocol import Loading, SamplingParams


def resolve_model(model: str) -> Path:
    """Return the directory of a shipped model's name, a path or a hub id."""
    from mxn.models.catalogue import shipped_models
    from mxn.models.hub import resolve

    shipped = shipped_models()
    return shipped[model] if model in shipped else resolve(model)


def aliases(model: str, name: str) -> tuple[str, ...]:
    """Return other names for callers: a hub id stays one; paths of this machine are nobody's."""
    return () if model == name or Path(model).expanduser().exists() else (model,)


def config_for(model: str, **settings: Any) -> EngineConfig:
    """Return engine settings for a model as the user named it. None settings keep the default."""
    from mxn import env
    from mxn.engine.config import EngineConfig

    given = {key: value for key, value in settings.items() if value is not None}
    if given.get("device", "auto") == "auto":
        given["device"] = env.get("MXN_DEVICE")
    if given.get("dtype", "auto") == "auto":
        given["dtype"] = env.get("MXN_DTYPE")
    if given.get("weights") is None:
        given["weights"] = env.get("MXN_WEIGHTS")
    if given.get("kv") is None:
        given["kv"] = env.get("MXN_KV")
    if given.get("speculation") is None:
        given["speculation"] = env.get("MXN_SPECULATION")
    if given.get("cuda_graphs") is None:
        given["cuda_graphs"] = env.get_switch("MXN_CUDA_GRAPHS")
    if not given.get("threads"):
        given["threads"] = env.get_int("MXN_THREADS")
    return EngineConfig(model=str(resolve_model(model)), **given)


class LoadingBar:
    """A progress bar on stderr for the loads of one or more replicas; silent without a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> LoadingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, name: str, loading: Loading) -> None:
        key = f"{name}: {loading.stage}"
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(key, total=loading.total)
        self._progress.update(self._tasks[key], completed=loading.done, total=loading.total)


@dataclass(slots=True)
class LocalReplica:
    """A replica that belongs to this command, with the tokenizer beside it."""

    client: ProcessEngine
    tokenizer: Any
    defaults: Any

    def prompt_ids(self, text: str, *, is_chat: bool) -> list[int]:
        if not is_chat:
            return self.tokenizer.encode(text)
        return self.chat_ids([{"role": "user", "content": text}])

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return self.tokenizer.encode(rendered, add_special_tokens=False)

    def sampling(
        self, *, max_tokens: int | None, temperature: float | None, seed: int | None
    ) -> SamplingParams:
        from mxn.engine.protocol import SamplingParams

        defaults = self.defaults
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=defaults.temperature if temperature is None else temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
            seed=seed,
        )


async def start_replica(config: EngineConfig) -> LocalReplica:
    """Start an engine for a decoder and wait until it is ready, with a progress bar.

    Raises: UnsupportedError for a model that makes no text.
    """
    from mxn.engine.client import ProcessEngine
    from mxn.models.tokenizer import Tokenizer
    from mxn.serve.served import GenerationDefaults

    name = Path(config.model).name
    with LoadingBar() as bar:
        client = await ProcessEngine.start(
            config, on_progress=lambda loading: bar.update(name, loading)
        )
    try:
        if client.info.kind != "decoder":
            raise UnsupportedError(
                f"{name!r} is a {client.info.kind}: it makes vectors or scores, not text",
                hint=f"`mxn serve {config.model}`, then call /v1/embeddings or /v1/rerank",
            )
        tokenizer = Tokenizer.load(config.model)
        return LocalReplica(client, tokenizer, GenerationDefaults.load(config.model))
    except BaseException:
        await client.close()
        raise
