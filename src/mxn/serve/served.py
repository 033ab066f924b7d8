"""The models a server answers for: their replicas, tokenizers, names and defaults.

Knows the replica contract and tokenizers; knows no HTTP. Start at `ServedModels`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mxn.engine.protocol import EngineClient, Loading, ModelInfo
from mxn.errors import ConfigError
from mxn.models.tokenizer import Tokenizer

# Below this a thread costs more than it frees; above it one prompt would stall every stream.
_INLINE_CHARS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint's generation_config.json says where a request is silent."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, folder: Path | str) -> GenerationDefaults:
        """Read generation_config.json; a missing file or a null value leaves the default."""
        path = Path(folder) / "generation_config.json"
        if not path.is_file():
            return cls()
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise ConfigError(f"{path} is not valid JSON: {exc}") from exc
        known = {name: config[name] for name in cls.__slots__ if config.get(name) is not None}
        return cls(**known)


@dataclass(slots=True, kw_only=True)
class ServedModel:
    """One model that is ready, under its name and aliases."""

    name: str
    client: EngineClient
    tokenizer: Tokenizer
    aliases: tuple[str, ...] = ()
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    created: int = field(default_factory=lambda: int(time.time()))
    adapter: str | None = None  # its name at the replicas; None: the base model
    parent: str | None = None  # name of the model that it adapts
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        device = f"{self.info.device} {self.info.chip}".strip()
        self.headers = {"x-mxn-model": _header(self.name), "x-mxn-device": _header(device)}

    @classmethod
    def load(
        cls, name: str, client: EngineClient, folder: Path | str, *, aliases: Iterable[str] = ()
    ) -> ServedModel:
        """Take tokenizer, chat template and defaults from a checkpoint folder."""
        return cls(
            name=name,
            client=client,
            tokenizer=Tokenizer.load(folder),
            aliases=tuple(aliases),
            defaults=GenerationDefaults.load(folder),
        )

    @property
    def info(self) -> ModelInfo:
        return self.client.info

    def with_adapter(self, name: str, *, aliases: tuple[str, ...] = ()) -> ServedModel:
        """Return a model of another name whose requests go through an adapter of this one."""
        return ServedModel(
            name=name,
            client=self.client,
            tokenizer=self.tokenizer,
            aliases=aliases,
            defaults=self.defaults,
            adapter=name,
            parent=self.name,
        )

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenize; a long text in a thread, so that it does not hold up other requests."""
        if len(text) < _INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)


def _header(text: str) -> str:
    """Return `text` as a header value: Latin-1 without control characters."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)


@dataclass(slots=True)
class Pending:
    """A model that was promised and is not ready: still loading, or failed with a reason."""

    name: str
    progress: Loading | None = None
    failure: str | None = None


class ServedModels:
    """Ready models by name or alias, and those still to come."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._ready: dict[str, ServedModel] = {}
        self._adapters: dict[str, ServedModel] = {}
        self._by_any_name: dict[str, ServedModel] = {}
        self.pending: dict[str, Pending] = {}
        for model in models:
            self.add(model)

    def expect(self, name: str) -> None:
        """Promise a model: until `add(model)` of that name, /health says 503."""
        self.pending[name] = Pending(name)

    def report_progress(self, name: str, progress: Loading) -> None:
        """Note how far a promised model is; a ready one that restarts is not promised again."""
        if name in self.pending:
            self.pending[name].progress = progress

    def report_failure(self, name: str, reason: str) -> None:
        self.pending[name].failure = reason

    def add(self, model: ServedModel) -> None:
        """Serve `model` from now on. Raises: ConfigError when one of its names is taken."""
        self.check_free(model)
        self._ready[model.name] = model
        for name in (model.name, *model.aliases):
            self._by_any_name[name] = model
        self.pending.pop(model.name, None)

    def check_free(self, model: ServedModel) -> None:
        """Raises: ConfigError when one of the model's names is taken or promised."""
        promised = set(self.pending) - ({model.name} if model.adapter is None else set())
        for name in (model.name, *model.aliases):
            if name in self._by_any_name or name in promised:
                raise ConfigError(f"two models are named {name!r}", hint="give one another --name")

    def add_adapter(self, model: ServedModel) -> None:
        """Serve an adapter, which its parent's client has loaded. Raises: ConfigError."""
        self.check_free(model)
        self._adapters[model.name] = model
        for name in (model.name, *model.aliases):
            self._by_any_name[name] = model

    def remove_adapter(self, name: str) -> ServedModel | None:
        """Serve an adapter no longer and return it; None: there is none of that name."""
        model = self.adapter(name)
        if model is not None:
            del self._adapters[model.name]
            for each in (model.name, *model.aliases):
                del self._by_any_name[each]
        return model

    def adapter(self, name: str) -> ServedModel | None:
        """Return the adapter of that name or alias."""
        model = self._by_any_name.get(name)
        return model if model is not None and model.adapter is not None else None

    def adapters(self) -> list[ServedModel]:
        return list(self._adapters.values())

    def all(self) -> list[ServedModel]:
        """Return models and adapters; iterating gives models only, each with its own client."""
        return [*self._ready.values(), *self._adapters.values()]

    def get(self, name: str) -> ServedModel | None:
        return self._by_any_name.get(name)

    def only(self) -> ServedModel | None:
        """Return the model when there is exactly one, else None."""
        return next(iter(self._ready.values())) if len(self._ready) == 1 else None

    def names(self) -> list[str]:
        return list(self._ready)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._ready.values())

    def __len__(self) -> int:
        return len(self._ready)

    async def close(self) -> None:
        for model in self:
            await model.client.close()
