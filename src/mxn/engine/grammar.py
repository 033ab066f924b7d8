"""Grammars that an answer must obey, token by token, by way of the llguidance library.

A `Grammars` belongs to one tokenizer; `begin` compiles a grammar into the state of one sequence,
whose mask says which tokens may come next. Knows no requests and no scheduling.

A grammar comes from a stranger: whatever it does to the library ends the one request that brought
it, as a UserError. The library's limits bound what one token may cost, `BUDGET_S` what all may.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from mxn.engine.grammar_check import Checker, Vocabulary
from mxn.engine.protocol import MAX_GRAMMAR_CHARS, Grammar
from mxn.errors import InternalError, UnsupportedError, UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_CACHED = 128  # compiled grammars; agents send the same tools again and again
_MAX_CACHED_CHARS = 4 * 2**20  # of all their sources together
CODE = "invalid_grammar"  # known before the first token
FAILED_CODE = "grammar_failed"  # found out later

# What one token may cost is some ten milliseconds with these; 250 optional properties of an object
# are within them. Verbose errors would hold the grammar and the answer, which end up in logs.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
# Seconds of a processor that the grammar of one answer may take, which all answers of a replica
# wait for. Usual grammars take 0.1 to 0.7 ms for a token of a large vocabulary.
BUDGET_S = 0.5
BUDGET_TOKEN_S = 0.003  # more with each token


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
        raise _invalid(grammar, str(error)) from error


def check(grammar: Grammar) -> None:
    """Raises: UserError when a grammar can be enforced for no tokenizer. Needs no model."""
    check_size(grammar)
    problem = LLMatcher.validate_grammar(source_of(grammar), limits=LIMITS)
    if problem:
        raise _invalid(grammar, problem)


def check_size(grammar: Grammar) -> None:
    """Raises: UserError for a source that is too long to read."""
    if len(grammar.source) > MAX_GRAMMAR_CHARS:
        raise UserError(
            f"the {grammar.kind} has {len(grammar.source)} characters, "
            f"the limit is {MAX_GRAMMAR_CHARS}",
            code=CODE,
        )


def _invalid(grammar: Grammar, problem: str) -> UserError:
    """Return the error for a grammar; the library's own state stays out of what it says."""
    text = problem.partition("\n<")[0].strip()
    return UserError(f"the {grammar.kind} is not valid: {text[:400]}", code=CODE)


class GrammarState:
    """How far one sequence is in its grammar, and what that has cost."""

    __slots__ = ("_matcher", "_num_tokens", "_spent_s", "is_over", "problem")

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._num_tokens = 0
        self._spent_s = 0.0
        self.is_over = False  # nothing may follow: the answer is complete
        self.problem: UserError | None = None  # why it allows nothing any more

    def fill(self, bits_RB: NDArray[np.int32], row: int) -> None:
        """Write which tokens may come next, 32 in each number, into one row.

        A grammar that fails allows nothing and says so in `problem`: others share the step.
        """
        if self.problem is None:
            began_s = time.thread_time()
            fill_next_token_bitmask(self._matcher, bits_RB, row)
            self._spend(time.thread_time() - began_s)
            if self._matcher.is_error():
                self.problem = self._failure()
        if self.problem is not None:
            bits_RB[row] = 0

    def consume(self, token_id: int) -> None:
        """Go on with a token that the mask allowed.

        Raises: UserError when the grammar fails with it, InternalError for a token that does not
        follow, which only an answer that another replica began can have.
        """
        if self.is_over:
            return
        began_s = time.thread_time()
        is_taken = self._matcher.try_consume_tokens([token_id]) == 1
        self._num_tokens += 1
        self._spend(time.thread_time() - began_s)
        if self._matcher.is_error():
            self.problem = self._failure()
        if self.problem is not None:
            raise self.problem
        if not is_taken:
            raise InternalError(
                f"token {token_id} does not follow the grammar after {self._num_tokens - 1} tokens",
                code=FAILED_CODE,
            )
        self.is_over = self._matcher.is_stopped()

    def _spend(self, spent_s: float) -> None:
        """Count processor time; it ends an answer whose grammar would hold up all others."""
        self._spent_s += spent_s
        limit_s = BUDGET_S + BUDGET_TOKEN_S * self._num_tokens
        if self._spent_s > limit_s and self.problem is None:
            self.problem = UserError(
                f"the grammar took {self._spent_s:.2f} s for {self._num_tokens} tokens, "
                f"the limit is {limit_s:.2f} s",
                hint="make it less ambiguous, or smaller",
                code=FAILED_CODE,
            )

    def _failure(self) -> UserError:
        reason = (self._matcher.get_error().splitlines() or [""])[0][:200]
        return UserError(
            f"the grammar failed after {self._num_tokens} tokens: {reason}",
            hint="make it less ambiguous, or smaller",
            code=FAILED_CODE,
        )


class Grammars:
    """Compiles grammars for one tokenizer; its trie is built in the background at the start."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        """`vocab_size` is the width of the logits; `tokenizer` knows the bytes of each token."""
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos_ids = list(eos_ids)
        self._made: LLTokenizer | None = None
        self._problem: Exception | None = None
        self._compiled = _Compiled()
        self._checker: Checker | None = None  # used in the compiler's thread only
        # One thread: a flood of large grammars holds up other grammars, and no step of anybody.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="mxn-grammar")
        self._building = threading.Thread(target=self._build, name="mxn-grammars", daemon=True)
        self._building.start()

    def prepare(self, grammar: Grammar) -> Future[GrammarState]:
        """Return the state at the beginning of an answer, or the promise of it.

        Raises, here or from the promise: UserError for a grammar that is wrong or too large,
        UnsupportedError when the tokenizer does not tell the bytes of its tokens.
        """
        check_size(grammar)
        matcher = self._compiled.get(grammar)
        if matcher is None:
            return self._compiler.submit(self._compile, grammar)
        ready: Future[GrammarState] = Future()
        ready.set_result(GrammarState(matcher.deep_copy()))
        return ready

    def begin(self, grammar: Grammar) -> GrammarState:
        """Return what `prepare` promises; waits for it."""
        return self.prepare(grammar).result()

    def close(self) -> None:
        """End the process that reads grammars first; the end of this one ends it too."""
        self._compiler.shutdown()
        if self._checker is not None:
            self._checker.close()

    def _compile(self, grammar: Grammar) -> GrammarState:
        self._building.join()
        if self._made is None:
            raise UnsupportedError(f"this model's tokenizer takes no grammars: {self._problem}")
        matcher = self._compiled.get(grammar)  # asked for twice, and made meanwhile
        if matcher is None:
            source = source_of(grammar)
            assert self._checker is not None, "it is made with the trie"
            if problem := self._checker.problem_of(source):
                raise _invalid(grammar, problem)
            try:
                matcher = LLMatcher(self._made, source, log_level=0, limits=LIMITS)
            except (ValueError, RuntimeError) as error:
                raise _invalid(grammar, str(error)) from error
            if matcher.is_error():
                raise _invalid(grammar, matcher.get_error())
            self._compiled.add(grammar, matcher)
        return GrammarState(matcher.deep_copy())

    def _build(self) -> None:
        try:
            tokens = _Tokens(self._tokenizer, self.vocab_size, self._eos_ids)
            wrapper = llguidance.TokenizerWrapper(tokens)
            made = LLTokenizer(wrapper, eos_token=self._eos_ids or None)
            vocabulary = Vocabulary(
                tokens=tokens.tokens,
                special_token_ids=tokens.special_token_ids,
                eos_token_id=tokens.eos_token_id,
                bos_token_id=tokens.bos_token_id,
                eos_ids=self._eos_ids,
            )
            self._checker, self._made = Checker(vocabulary), made
        except Exception as error:  # said to whoever asks for a grammar
            self._problem = error


class _Compiled:
    """The grammars used last, by a digest of their sources, which may be large."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[bytes, tuple[LLMatcher, int]] = OrderedDict()
        self._num_chars = 0

    def get(self, grammar: Grammar) -> LLMatcher | None:
        key = _digest(grammar)
        with self._lock:
            found = self._found.get(key)
            if found is None:
                return None
            self._found.move_to_end(key)
            return found[0]

    def add(self, grammar: Grammar, matcher: LLMatcher) -> None:
        with self._lock:
            self._found[_digest(grammar)] = (matcher, len(grammar.source))
            self._num_chars += len(grammar.source)
            while len(self._found) > _MAX_CACHED or self._num_chars > _MAX_CACHED_CHARS:
                self._num_chars -= self._found.popitem(last=False)[1][1]


def _digest(grammar: Grammar) -> bytes:
    return blake2b(f"{grammar.kind}\n{grammar.source}".encode(), digest_size=16).digest()


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


def problem_at_start(matcher: LLMatcher, vocab_size: int, eos_ids: Collection[int]) -> str:
    """Try the first two tokens, where most grammars fail that ever do; return how, or nothing."""
    state = GrammarState(matcher)
    allowed_V = masks([state], vocab_size)[0]
    if state.problem is None and not allowed_V.any():
        return "it allows no answer"
    allowed_V[[token for token in eos_ids if token < vocab_size]] = False
    if state.problem is None and allowed_V.any():
        try:
            state.consume(int(allowed_V.argmax()))
            masks([] if state.is_over else [state], vocab_size)
        except UserError as error:
            return error.message
    return "" if state.problem is None else state.problem.message
