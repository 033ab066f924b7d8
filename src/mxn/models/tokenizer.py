"""Text to token ids and back, for one checkpoint; equal to transformers' `AutoTokenizer`.

`tokenizer.json` is read with the `tokenizers` library, without torch. A checkpoint without it goes
through transformers once, at load. Knows no HTTP and no model. Start at `Tokenizer.load`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from mxn.errors import NotFoundError, UnsupportedError, UserError
from mxn.models.chat_template import ChatTemplates, Message
from mxn.models.quantized.gguf_storage import find_gguf
from mxn.models.token_bound import bytes_per_token
from mxn.models.token_bytes import BytePieces, ByteTable, detect_scheme, is_bytes_only
from mxn.models.tokenizer_facts import Facts
from mxn.models.tokenizer_facts import read as read_facts

log = logging.getLogger("mxn.models")

# The library holds the GIL while it encodes or decodes one text, and lets go of it for a batch.
# A batch of one is quicker from about a hundred characters on; below a thousand it saves less than
# 0.1 ms, which is not worth a hand-over to the library's threads.
_BATCH_CHARS = 1024
_BATCH_IDS = 1024


class Backend(Protocol):
    """What `Tokenizer` needs of a library below it."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def token(self, token_id: int) -> str | None: ...

    def truncate(self, text: str, num_tokens: int) -> str: ...

    def vocab(self) -> dict[str, int]: ...

    def special_ids(self) -> frozenset[int]: ...

    def added_ids(self) -> frozenset[int]: ...

    def bytes_per_token(self, vocab: dict[str, int]) -> int | None: ...

    def token_id(self, token: str) -> int | None: ...

    def byte_pieces(self) -> dict[bool, BytePieces] | None: ...


class _FastBackend:
    """A `tokenizers.Tokenizer`. Long texts go as a batch of one: only that releases the GIL."""

    def __init__(self, backend: tokenizers.Tokenizer, *, cleans_spaces: bool = False) -> None:
        # A file may carry the truncation of its training run; a server never truncates silently.
        backend.no_truncation()
        backend.no_padding()
        self.raw = backend
        # transformers leaves BPE text alone: the clean-up was made for WordPiece.
        self._cleans_spaces = cleans_spaces and type(backend.model).__name__ != "BPE"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < _BATCH_CHARS:
            return self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        batch = self.raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return batch[0].ids

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        if len(first) + len(second) < _BATCH_CHARS:
            encoding = self.raw.encode(first, second)
        else:
            encoding = self.raw.encode_batch_fast([(first, second)])[0]
        return encoding.ids, encoding.type_ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        if len(ids) < _BATCH_IDS:
            text = self.raw.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            text = self.raw.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
        return _clean_spaces(text) if self._cleans_spaces else text

    def token(self, token_id: int) -> str | None:
        return self.raw.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self.raw.token_to_id(token)

    def truncate(self, text: str, num_tokens: int) -> str:
        # Not `encode_batch_fast`, which counts no offsets.
        offsets = self.raw.encode_batch([text], add_special_tokens=False)[0].offsets
        return text if len(offsets) <= num_tokens else text[: offsets[num_tokens - 1][1]]

    def vocab(self) -> dict[str, int]:
        return self.raw.get_vocab(with_added_tokens=True)

    def special_ids(self) -> frozenset[int]:
        added = self.raw.get_added_tokens_decoder()
        return frozenset(key for key, token in added.items() if token.special)

    def added_ids(self) -> frozenset[int]:
        return frozenset(self.raw.get_added_tokens_decoder())

    def bytes_per_token(self, vocab: dict[str, int]) -> int | None:
        return bytes_per_token(self.raw, vocab)

    def byte_pieces(self) -> dict[bool, BytePieces] | None:
        if self._cleans_spaces or not is_bytes_only(self.raw):
            return None
        spell = self.raw.id_to_token
        return {True: BytePieces(spell, self.special_ids()), False: BytePieces(spell)}


class _SlowBackend:
    """A Python tokenizer of transformers, for the few kinds that `tokenizers` cannot express."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        out = self._tokenizer(first, second, return_token_type_ids=True)
        return out["input_ids"], out["token_type_ids"]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.convert_tokens_to_ids(token)

    def truncate(self, text: str, num_tokens: int) -> str:
        ids = self.encode(text, add_special_tokens=False)
        return text if len(ids) <= num_tokens else self.decode(ids[:num_tokens], False)

    def vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    def bytes_per_token(self, vocab: dict[str, int]) -> int | None:
        return None  # what its Python code does to a text is not known

    def byte_pieces(self) -> dict[bool, BytePieces] | None:
        return None


def _count(backend: Backend) -> Facts:
    vocab = backend.vocab()
    return Facts(max(vocab.values(), default=-1) + 1, backend.bytes_per_token(vocab))


class Tokenizer:
    """Encodes, decodes and renders chats for one checkpoint. Thread-safe after construction."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        templates: ChatTemplates,
        byte_scheme: str,
        facts: Facts | None = None,
    ) -> None:
        """`facts`: what is known of this vocabulary; None: it is counted through."""
        self._backend = backend
        self.special_tokens = dict(special_tokens)  # such as {"bos_token": "<s>"}
        self.templates = templates
        self.facts = facts or _count(backend)
        self.vocab_size = self.facts.vocab_size  # a model's matrix may be larger
        self.special_ids = backend.special_ids()
        self._added_ids = backend.added_ids()
        self._bytes = ByteTable(byte_scheme, self._added_ids)
        self._bytes_per_token = self.facts.bytes_per_token
        self._pieces = backend.byte_pieces()

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Load from a checkpoint folder, or from a GGUF file.

        Raises: NotFoundError when the folder holds no tokenizer; UserError when it cannot be read.
        """
        folder = Path(folder)
        gguf = find_gguf(folder)
        if gguf is not None:
            return cls._load_gguf(gguf)
        return cls._load_folder(folder)

    @classmethod
    def _load_folder(cls, folder: Path) -> Tokenizer:
        config = _read_json(folder / "tokenizer_config.json")
        path = folder / "tokenizer.json"
        if not path.is_file():
            return cls._load_with_transformers(folder, config)
        try:
            raw = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises a bare Exception
            raise UserError(f"cannot read {path}: {exc}") from exc
        return cls.from_tokenizers(raw, config=config, folder=folder)

    @classmethod
    def from_tokenizers(
        cls,
        raw: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> Tokenizer:
        """Wrap a `tokenizers.Tokenizer`; `config` is what tokenizer_config.json would hold."""
        config = config or {}
        special = _special_tokens(config, folder)
        _add_missing_tokens(raw, config, special)
        _ensure_post_processor(raw)
        cleans = bool(config.get("clean_up_tokenization_spaces"))
        templates = ChatTemplates.load(folder or Path("/nonexistent"), config)
        return cls(
            _FastBackend(raw, cleans_spaces=cleans),
            special_tokens=special,
            templates=templates,
            byte_scheme=detect_scheme(raw),
            facts=read_facts(folder) if folder else None,
        )

    @classmethod
    def _load_gguf(cls, path: Path) -> Tokenizer:
        """Rebuild the tokenizer that the file carries; else take the one beside it."""
        from mxn.models.quantized.gguf_file import GgufFile
        from mxn.models.quantized.gguf_tokenizer import read_tokenizer

        try:
            raw, config = read_tokenizer(path, GgufFile(path).metadata)
        except UnsupportedError as error:
            if not (path.parent / "tokenizer.json").is_file():
                raise
            log.info("tokenizer.json beside %s is used: %s", path.name, error.message)
            return cls._load_folder(path.parent)
        return cls.from_tokenizers(raw, config=config)

    @classmethod
    def _load_with_transformers(cls, folder: Path, config: Mapping[str, Any]) -> Tokenizer:
        from transformers import AutoTokenizer  # heavy; only for checkpoints without tokenizer.json

        try:
            loaded = AutoTokenizer.from_pretrained(str(folder))
        except Exception as exc:  # transformers raises many kinds; all mean: no usable tokenizer
            raise NotFoundError(
                f"no tokenizer could be loaded from {str(folder)!r}: {exc}",
                hint="the folder needs tokenizer.json or the files its tokenizer class reads",
            ) from exc
        special = {key: str(value) for key, value in loaded.special_tokens_map.items()}
        templates = ChatTemplates.load(folder, config)
        if not loaded.is_fast:
            slow = _SlowBackend(loaded)
            return cls(slow, special_tokens=special, templates=templates, byte_scheme="metaspace")
        raw = loaded.backend_tokenizer
        cleans = bool(loaded.clean_up_tokenization_spaces)
        return cls(
            _FastBackend(raw, cleans_spaces=cleans),
            special_tokens=special,
            templates=templates,
            byte_scheme=detect_scheme(raw),
        )

    @property
    def raw(self) -> tokenizers.Tokenizer | None:
        """The `tokenizers.Tokenizer` below, or None for a slow one."""
        return self._backend.raw if isinstance(self._backend, _FastBackend) else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self.templates)

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token by name, such as `bos_token`; None without one."""
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_id(token)

    @property
    def bos_id(self) -> int | None:
        return self.special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self.special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self.special_id("pad_token")

    def vocab(self) -> dict[str, int]:
        """Return token → id, as spelled in the vocabulary; built anew on each call."""
        return self._backend.vocab()

    def added_id(self, text: str) -> int | None:
        """Return the id of a token that was added to the vocabulary whole, such as `<think>`."""
        token_id = self._backend.token_id(text)
        return token_id if token_id in self._added_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens)

    def min_tokens(self, text: str) -> int:
        """Return a number of tokens that `text` has at least, without tokenizing it.

        0 where this kind of tokenizer gives no bound.
        """
        if self._bytes_per_token is None:
            return 0
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        return -(-num_bytes // self._bytes_per_token)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Return (token ids, token types) of a pair with special tokens, as rerankers take it."""
        return self._backend.encode_pair(first, second)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens)

    def truncate(self, text: str, num_tokens: int) -> str:
        """Return the longest beginning of `text` that has at most `num_tokens` tokens (>= 1)."""
        return self._backend.truncate(text, num_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact bytes one token stands for; empty for an id without a token."""
        return self._bytes.lookup(token_id, self._backend.token)

    def byte_pieces(self, skip_special_tokens: bool) -> Mapping[int, bytes] | None:
        """Return each token's bytes if `decode` only joins them (and looks for UTF-8), else None.

        Any id can be looked up; one without a token, or skipped, has no bytes.
        """
        return None if self._pieces is None else self._pieces[skip_special_tokens]

    def token_text(self, token_id: int) -> str:
        """Return a token as text; a piece of a character reads `bytes:\\xe2\\x80`."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def render_chat(self, messages: Sequence[Message], **options: Any) -> str:
        """Return a conversation as text; `ChatTemplates.render` has the options and errors."""
        return self.templates.render(messages, **{**self.special_tokens, **options})

    def apply_chat_template(
        self, messages: Sequence[Message], *, tokenize: bool = False, **options: Any
    ) -> str | list[int]:
        """Return a conversation as text, or as token ids when `tokenize` is true."""
        text = self.render_chat(messages, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UserError(f"{path} is not valid JSON: {exc}") from exc


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """Collect `bos_token` and the like; special_tokens_map.json is the older place for them."""
    merged: dict[str, Any] = dict(config)
    if folder is not None and "added_tokens_decoder" not in config:
        merged.update(_read_json(folder / "special_tokens_map.json"))
    extra = merged.get("extra_special_tokens")
    if isinstance(extra, dict):
        merged.update(extra)
    named = {key: _content(merged[key]) for key in merged if key.endswith("_token")}
    return {key: text for key, text in named.items() if text is not None}


def _add_missing_tokens(
    raw: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Add tokens that only tokenizer_config.json knows, in the order of their ids."""
    known = {token.content for token in raw.get_added_tokens_decoder().values()}
    missing: list[AddedToken] = []
    for _, item in sorted((config.get("added_tokens_decoder") or {}).items(), key=_by_id):
        if item["content"] not in known:
            missing.append(AddedToken(**{k: v for k, v in item.items() if k != "__type"}))
    queued = known | {token.content for token in missing}
    named = dict.fromkeys(text for text in special.values() if text not in queued)
    missing += [AddedToken(text, special=True) for text in named]
    if missing:
        raw.add_tokens(missing)


def _by_id(item: tuple[str, Any]) -> int:
    return int(item[0])


def _ensure_post_processor(raw: tokenizers.Tokenizer) -> None:
    """Give pairs their token types where the file has no rule.

    `add_bos_token` of tokenizer_config.json is not read, as in transformers 5: where tokenizer.json
    exists, its post-processor alone decides about special tokens.
    """
    if raw.post_processor is None:
        raw.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


# In the order of transformers: a later rule sees what an earlier one left.
_SPACES = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _clean_spaces(text: str) -> str:
    for spaced, tight in _SPACES:
        text = text.replace(spaced, tight)
    return text
