"""From a document to token ids and which of them are learned. Knows no files and no rows.

Of a chat the assistant's turns are learned, with the token that ends them: found by rendering the
conversation up to each turn with the model's own template, as it will be rendered when the model
answers. Start at `Encoder.encode`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from mxn.errors import ConfigError, UserError
from mxn.models.tokenizer import Tokenizer
from mxn.train.run.data.documents import BadLineError, Chat, Completion, Document, Text

Learn = Literal["assistant", "all"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """`targets[t]`: whether token t is to be predicted (the first token never is)."""

    ids: list[int]
    targets: list[bool]


@dataclass(slots=True)
class _Marked:
    """Tokens on their way: where in the text each stands, and whether it is learned."""

    ids: list[int]
    places: list[tuple[int, int]]
    targets: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.targets = [False] * len(self.ids)

    def inside(self, begin: int, end: int) -> list[int]:
        """Return the tokens that begin in a part of the text; others were given, not answered."""
        places = enumerate(self.places)
        return [t for t, (first, last) in places if begin <= first < end and first < last]


class Encoder:
    """Encodes documents for one model."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, *, learn: Learn = "assistant"
    ) -> None:
        """`vocab_size`: rows of the model's embedding.

        Raises: ConfigError when the tokenizer has more tokens than the model.
        """
        if learn not in ("assistant", "all"):
            raise ConfigError(f"learn {learn!r} is neither assistant nor all")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._learn = learn
        self._eos = tokenizer.eos_id
        check_vocabulary(tokenizer, vocab_size)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)

    @property
    def fingerprint(self) -> str:
        """What decides the result beside the document: tokenizer, template, settings."""
        parts = [self.tokenizer_fingerprint, self._learn, str(self._vocab_size)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def encode(self, document: Document) -> list[Encoded]:
        """Return what a document becomes: one sequence, or several of a chat whose template
        rewrites earlier turns.

        Raises: BadLineError for a document that cannot be learned.
        """
        if isinstance(document, Text):
            return [self._text(self._tokenizer.encode(document.text))]
        found = (
            [self._completion(document)]
            if isinstance(document, Completion)
            else list(self._chat(document))
        )
        for encoded in found:
            self._check(encoded)
        return found

    def encode_all(
        self, documents: Sequence[Document]
    ) -> Iterator[tuple[Document, list[Encoded] | BadLineError]]:
        """Yield each document with what it becomes; plain texts go through all cores at once."""
        texts = [document.text for document in documents if isinstance(document, Text)]
        raw = self._tokenizer.raw
        together = iter(raw.encode_batch_fast(texts) if raw is not None and len(texts) > 1 else ())
        for document in documents:
            try:
                batched = next(together, None) if isinstance(document, Text) else None
                yield (
                    document,
                    self.encode(document) if batched is None else [self._text(batched.ids)],
                )
            except BadLineError as error:
                yield document, error

    def _text(self, ids: list[int]) -> Encoded:
        ids = self._with_eos(ids)
        encoded = Encoded(ids, [True] * len(ids))
        self._check(encoded)
        return encoded

    def _check(self, encoded: Encoded) -> None:
        """Raise BadLineError for what cannot be learned."""
        if len(encoded.ids) < 2 or not any(encoded.targets[1:]):
            raise BadLineError("has nothing to learn")
        highest = max(encoded.ids)
        if highest >= self._vocab_size:
            raise BadLineError(
                f"has token {highest}, the model's vocabulary ends at {self._vocab_size - 1}"
            )

    def _completion(self, document: Completion) -> Encoded:
        text = document.prompt + document.completion
        marked = self._marked(text, special=True, cuts=[len(document.prompt)])
        for t in marked.inside(len(document.prompt), len(text)):
            marked.targets[t] = True
        if marked.ids[-1:] == [self._eos]:
            marked.targets[-1] = True  # of the tokenizer's own making: it has no place in the text
        self._end(marked)
        return Encoded(marked.ids, self._all_if_wanted(marked.targets))

    def _chat(self, chat: Chat) -> Iterator[Encoded]:
        whole = self._render(chat, len(chat.messages))
        spans: list[tuple[int, int]] = []
        turns = [i for i, m in enumerate(chat.messages) if _is_learned(m, i, chat.first_target)]
        for turn in turns:
            is_last = turn + 1 == len(chat.messages)
            upto = whole if is_last else self._without_eos(self._render(chat, turn + 1))
            if not whole.startswith(upto):
                # The template shows this turn otherwise once others follow it.
                yield from (self._alone(chat, turn) for turn in turns)
                return
            spans.append((self._begin(chat, turn, upto), len(upto)))
        yield self._learned(whole, spans)

    def _alone(self, chat: Chat, turn: int) -> Encoded:
        text = self._render(chat, turn + 1)
        return self._learned(text, [(self._begin(chat, turn, text), len(text))])

    def _begin(self, chat: Chat, turn: int, upto: str) -> int:
        """Return where in `upto` the text of a turn begins: behind what the model is given.

        What it is given may end with more than the turn repeats, such as an opened thought.
        """
        if turn == 0:
            return 0
        asked = self._render(chat, turn, add_generation_prompt=True)
        if upto.startswith(asked):
            return len(asked)
        before = self._render(chat, turn)
        common = self._common_length(asked, upto)
        if common < self._common_length(asked, self._without_eos(before)):
            raise BadLineError("has turns that the chat template renders out of order")
        return common

    def _common_length(self, given: str, text: str) -> int:
        """Return how much of `text`, in whole tokens, begins as `given` does."""
        raw = self._tokenizer.raw
        if raw is None:
            pairs = enumerate(zip(given, text, strict=False))
            return next((i for i, (x, y) in pairs if x != y), min(len(given), len(text)))
        own = raw.encode(text, add_special_tokens=False)
        other = raw.encode(given, add_special_tokens=False)
        pairs = zip(own.ids, other.ids, own.offsets, strict=False)
        return next((begin for x, y, (begin, _) in pairs if x != y), min(len(given), len(text)))

    def _without_eos(self, text: str) -> str:
        """Some templates end with it whatever comes last, and leave it out between turns."""
        return text.removesuffix(self._tokenizer.special_tokens.get("eos_token", ""))

    def _render(self, chat: Chat, count: int, *, add_generation_prompt: bool = False) -> str:
        messages = [
            {key: value for key, value in message.items() if key != "weight"}
            for message in chat.messages[:count]
        ]
        try:
            return self._tokenizer.render_chat(
                messages, tools=chat.tools, add_generation_prompt=add_generation_prompt
            )
        except UserError as error:
            if not self._tokenizer.has_chat_template:
                raise
            raise BadLineError(f"is refused by the chat template: {_first_line(error)}") from error

    def _learned(self, text: str, spans: list[tuple[int, int]]) -> Encoded:
        """Return a rendered conversation with the turns in `spans`, up to their ends, learned."""
        marked = self._marked(text, special=False, cuts=[at for span in spans for at in span])
        special = self._tokenizer.special_ids
        for begin, end in spans:
            inside = marked.inside(begin, end)
            ends = [n for n, t in enumerate(inside) if marked.ids[t] in special]
            if ends and self._is_blank([marked.ids[t] for t in inside[ends[-1] + 1 :]]):
                inside = inside[: ends[-1] + 1]  # a line break behind it is the template's
            elif inside and inside[-1] + 1 == len(marked.ids):
                self._end(marked)
            elif inside and marked.ids[inside[-1] + 1] in special:
                # No end of its own: the mark of the next speaker is what stops the model.
                inside = [*inside, inside[-1] + 1]
            for t in inside:
                marked.targets[t] = True
        return Encoded(marked.ids, self._all_if_wanted(marked.targets))

    def _marked(self, text: str, *, special: bool, cuts: Sequence[int] = ()) -> _Marked:
        """Return the tokens of `text` with their places in it, none of them learned yet.

        A tokenizer that does not say where a token stands gets the text in pieces, cut at `cuts`.
        """
        raw = self._tokenizer.raw
        if raw is not None:
            encoding = raw.encode(text, add_special_tokens=special)
            return _Marked(encoding.ids, encoding.offsets)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for begin, end in pairwise(sorted({0, *cuts, len(text)})):
            new = self._tokenizer.encode(text[begin:end], special and not begin)
            ids += new
            places += [(begin, end)] * len(new)
        return _Marked(ids, places)

    def _is_blank(self, ids: list[int]) -> bool:
        return not self._tokenizer.decode(ids, skip_special_tokens=False).strip()

    def _end(self, marked: _Marked) -> None:
        """Let a sequence end with the end-of-text token, learned, unless it does already."""
        if self._eos is not None and marked.ids[-1:] != [self._eos]:
            marked.ids.append(self._eos)
            marked.targets.append(True)

    def _all_if_wanted(self, targets: list[bool]) -> list[bool]:
        return [True] * len(targets) if self._learn == "all" else targets

    def _with_eos(self, ids: list[int]) -> list[int]:
        if self._eos is None or (ids and ids[-1] == self._eos):
            return ids
        return [*ids, self._eos]


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash of all that decides how text becomes ids; equal means interchangeable."""
    raw = tokenizer.raw
    described = raw.to_str() if raw is not None else json.dumps(sorted(tokenizer.vocab().items()))
    special = json.dumps(sorted(tokenizer.special_tokens.items()))
    templates = json.dumps(sorted(tokenizer.templates.sources.items()))
    return hashlib.sha256("\n".join((described, special, templates)).encode()).hexdigest()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ConfigError when the tokenizer can give ids that the model has no row for.

    Tokens that were added to a vocabulary and have no row are tolerated until a text uses one:
    some checkpoints carry such, for pictures that their text model never sees.
    """
    if tokenizer.vocab_size <= vocab_size:
        return
    surplus = [token for token, id in tokenizer.vocab().items() if id >= vocab_size]
    ordinary = [token for token in surplus if tokenizer.added_id(token) is None]
    if ordinary:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}:"
            f" {len(ordinary)} of them, such as {ordinary[0]!r}, have no row in its embedding",
            hint="use the tokenizer that the model was made with",
        )


def _is_learned(message: dict[str, object], index: int, first_target: int) -> bool:
    is_wanted = message.get("weight", 1) != 0
    return index >= first_target and message["role"] == "assistant" and is_wanted


def _first_line(error: UserError) -> str:
    return error.message.removeprefix("the chat template refused these messages: ").split("\n")[0]
