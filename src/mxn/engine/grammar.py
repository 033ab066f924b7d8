"""Grammars that an answer must obey, token by token, by way of the llguidance library.

A `Grammars` belongs to one tokenizer; `begin` compiles a grammar into the state of one sequence,
whose mask says which tokens may come next. Knows no requests and no scheduling.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from mxn.engine.protocol import Grammar
from mxn.errors import InternalError, UnsupportedError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_CACHED = 128  # compiled grammars; agents send the same tools again and again
CODE = "invalid_grammar"


def source_of(grammar: Grammar) -> str:
    """Return a grammar in llguidance's own form. Raises: UserError for a source it cannot read."""
    try:
        if grammar.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.source)
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        if grammar.kind == "choice":
            choices = [line for line in grammar.source.split("\n") if line]
            if not choices:
                raise ValueError("there is nothing to choose from")
            one_of = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
            return LLMatcher.grammar_from_lark(f"start: {one_of}")
        return LLMatcher.grammar_from_lark(grammar.source)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the {grammar.kind} is not valid: {error}", code=CODE) from error


def check(grammar: Grammar) -> None:
    """Raises: UserError when a grammar can be enforced for no tokenizer. Needs no model."""
    problem = LLMatcher.validate_grammar(source_of(grammar))
    if problem:
        raise UserError(f"the {grammar.kind} is not valid: {problem}", code=CODE)


class GrammarState:
    """How far one sequence is in its grammar."""

    __slots__ = ("_matcher", "is_over")

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.is_over = False  # nothing may follow: the answer is complete

    def fill(self, bits_RB: NDArray[np.int32], row: int) -> None:
        """Write which tokens may come next, 32 in each number, into one row."""
        fill_next_token_bitmask(self._matcher, bits_RB, row)
        if self._matcher.is_error():
            raise InternalError(f"a grammar broke: {self._matcher.get_error()}")

    def consume(self, token_id: int) -> None:
        """Go on with a token that the mask allowed."""
        if self.is_over:
            return
        if not self._matcher.consume_token(token_id):
            raise InternalError(
                f"token {token_id} does not follow the grammar: {self._matcher.get_error()}"
            )
        self.is_over = self._matcher.is_stopped()


class Grammars:
    """Compiles grammars for one tokenizer; its trie is built in the background at the start."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        """`vocab_size` is the width of the logits; `tokenizer` knows the bytes of each token."""
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos_ids = list(eos_ids)
        self._made: LLTokenizer | None = None
        self._problem: Exception | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._building = threading.Thread(target=self._build, name="mxn-grammars", daemon=True)
        self._building.start()

    def begin(self, grammar: Grammar) -> GrammarState:
        """Return the state at the beginning of an answer.

        Raises: UserError for a grammar that is wrong or too large, UnsupportedError when the
        tokenizer does not tell the bytes of its tokens.
        """
        self._building.join()
        if self._made is None:
            raise UnsupportedError(f"this model's tokenizer takes no grammars: {self._problem}")
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = LLMatcher(self._made, source_of(grammar), log_level=0)
            if matcher.is_error():
                raise UserError(
                    f"the {grammar.kind} is not valid: {matcher.get_error()}", code=CODE
                )
            self._compiled[grammar] = matcher
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return GrammarState(matcher.deep_copy())

    def _build(self) -> None:
        try:
            wrapper = llguidance.TokenizerWrapper(
                _Tokens(self._tokenizer, self.vocab_size, self._eos_ids)
            )
            self._made = LLTokenizer(wrapper, eos_token=self._eos_ids or None)
        except Exception as error:  # said to whoever asks for a grammar
            self._problem = error


class _Tokens:
    """What llguidance must know of a tokenizer: the bytes of each token."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        special = {*tokenizer.special_ids, *eos_ids}
        self.special_token_ids = sorted(item for item in special if item < vocab_size)
        self.eos_token_id = eos_ids[0] if eos_ids else (tokenizer.eos_id or 0)
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


def masks(states: list[GrammarState], vocab_size: int) -> NDArray[np.bool_]:
    """Return (R, V): for each state, which tokens may come next."""
    bits_RB = allocate_token_bitmask(len(states), vocab_size)
    for row, state in enumerate(states):
        state.fill(bits_RB, row)
    packed_RB = bits_RB.view(np.uint8)
    return np.unpackbits(packed_RB, axis=1, bitorder="little", count=vocab_size).view(np.bool_)
