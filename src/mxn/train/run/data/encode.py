"""From a document to token ids and which of them are learned. Knows no files and no rows.

Of a chat the assistant's turns are learned, with the token that ends them: found by rendering the
conversation up to each turn with the model's own template, as it will be rendered when the model
answers. Start at `Encoder.encode`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
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
        found = list(self._encode(document))
        for encoded in found:
            if len(encoded.ids) < 2 or not any(encoded.targets[1:]):
                raise BadLineError("has nothing to learn")
            highest = max(encoded.ids)
            if highest >= self._vocab_size:
                raise BadLineError(
                    f"has token {highest}, the model's vocabulary ends at {self._vocab_size - 1}"
                )
        return found

    def _encode(self, document: Document) -> Iterator[Encoded]:
        if isinstance(document, Text):
            ids = self._with_eos(self._tokenizer.encode(document.text))
            yield Encoded(ids, [True] * len(ids))
        elif isinstance(document, Completion):
            yield self._completion(document)
        else:
            yield from self._chat(document)

    def _completion(self, document: Completion) -> Encoded:
        text = document.prompt + document.completion
        ids, targets = self._marked(text, [(len(document.prompt), len(text))], special=True)
        ended = self._with_eos(ids)
        if len(ended) == len(ids) and ids[-1] == self._eos:
            targets[-1] = True  # of the tokenizer's own making: it has no place in the text
        return Encoded(ended, self._all_if_wanted(targets + [True] * (len(ended) - len(ids))))

    def _chat(self, chat: Chat) -> Iterator[Encoded]:
        whole = self._render(chat, len(chat.messages))
        spans: list[tuple[int, int]] = []
        turns = [i for i, m in enumerate(chat.messages) if _is_learned(m, i, chat.first_target)]
        for turn in turns:
            upto = whole if turn + 1 == len(chat.messages) else self._render(chat, turn + 1)
            begin = self._begin(chat, turn, upto)
            if not whole.startswith(upto):
                # The template shows this turn otherwise once others follow it.
                yield from self._each_alone(chat, turns)
                return
            spans.append((begin, len(upto)))
        ids, targets = self._marked(whole, spans, special=False)
        yield Encoded(ids, self._all_if_wanted(targets))

    def _each_alone(self, chat: Chat, turns: list[int]) -> Iterator[Encoded]:
        for turn in turns:
            text = self._render(chat, turn + 1)
            span = (self._begin(chat, turn, text), len(text))
            ids, targets = self._marked(text, [span], special=False)
            yield Encoded(ids, targets)

    def _begin(self, chat: Chat, turn: int, upto: str) -> int:
        """Return where in `upto` the text of a turn begins: behind what the model is given."""
        if turn == 0:
            return 0
        before = self._render(chat, turn)
        if not upto.startswith(before):
            raise BadLineError("has turns that the chat template renders out of order")
        asked = self._render(chat, turn, add_generation_prompt=True)
        return max(len(before), _common_length(asked, upto))

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

    def _marked(
        self, text: str, spans: list[tuple[int, int]], *, special: bool
    ) -> tuple[list[int], list[bool]]:
        """Return the tokens of `text`, and which of them lie in `spans` of its characters."""
        raw = self._tokenizer.raw
        if raw is None:
            return self._in_pieces(text, spans, special=special)
        encoding = raw.encode(text, add_special_tokens=special)
        ids, targets = encoding.ids, [False] * len(encoding.ids)
        for begin, end in spans:
            # A token that begins before the span was given, not answered.
            inside = [
                t
                for t, (first, last) in enumerate(encoding.offsets)
                if begin <= first < end and first < last
            ]
            for t in self._up_to_end(ids, inside):
                targets[t] = True
        return ids, targets

    def _in_pieces(
        self, text: str, spans: list[tuple[int, int]], *, special: bool
    ) -> tuple[list[int], list[bool]]:
        """The same for a tokenizer that does not say where in the text a token stands."""
        ids: list[int] = []
        targets: list[bool] = []
        at = 0
        for begin, end in [*spans, (len(text), len(text))]:
            for piece, is_target in ((text[at:begin], False), (text[begin:end], True)):
                new = self._tokenizer.encode(piece, special and not ids) if piece else []
                own = list(range(len(ids), len(ids) + len(new)))
                ids += new
                targets += [False] * len(new)
                for t in self._up_to_end(ids, own) if is_target else []:
                    targets[t] = True
            at = end
        return ids, targets

    def _up_to_end(self, ids: list[int], inside: list[int]) -> list[int]:
        """Leave out what a template writes behind the token that ends a turn."""
        ends = [n for n, t in enumerate(inside) if ids[t] in self._tokenizer.special_ids]
        return inside[: ends[-1] + 1] if ends else inside

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


def _common_length(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _first_line(error: UserError) -> str:
    return error.message.removeprefix("the chat template refused these messages: ").split("\n")[0]
