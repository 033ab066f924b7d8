"""A replica that answers with given texts: for tests of what is read out of answers.

It tokenizes, detokenizes and stops like the real engine, and checks that a grammar, where the
request has one, would have let the answer pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import llguidance
from tokenizers import AddedToken

from mxn.engine.detokenize import StreamDetokenizer
from mxn.engine.echo import EchoEngine, byte_tokenizer, logprob_of
from mxn.engine.protocol import Delta, Generate, Grammar
from mxn.models.tokenizer import Tokenizer

TEMPLATE = (
    "{% if tools %}<|system|><tool_call></tool_call>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if thinks is defined and thinks %}<think>\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def marked_tokenizer(*, is_special: bool = False, template: str | None = TEMPLATE) -> Tokenizer:
    """Return a byte tokenizer with a token for each mark."""
    raw = byte_tokenizer().raw
    assert raw is not None
    raw.add_tokens([AddedToken(mark, special=is_special, normalized=False) for mark in MARKS])
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": template}
    return Tokenizer.from_tokenizers(raw, config=config)


class ScriptedEngine(EchoEngine):
    """Answers the n-th choice with the n-th text, again from the first after the last."""

    def __init__(
        self, *texts: str, tokenizer: Tokenizer | None = None, tokens_per_delta: int = 1
    ) -> None:
        tokenizer = tokenizer or marked_tokenizer()
        super().__init__(tokenizer, tokens_per_delta=tokens_per_delta, max_context=1 << 16)
        self.texts: Sequence[str] = texts
        self.refused: list[str] = []  # answers that the request's grammar forbids
        self._num_answers = 0

    @property
    def grammars(self) -> list[Grammar | None]:
        return [item.sampling.grammar for item in self.seen if isinstance(item, Generate)]

    async def generate(self, request: Generate) -> AsyncIterator[Delta]:
        self.seen.append(request)
        text = self.texts[self._num_answers % len(self.texts)]
        self._num_answers += 1
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        limit = request.sampling.max_tokens
        is_cut = limit is not None and limit <= len(ids)
        ids = ids[:limit] if is_cut else [*ids, *self.info.eos_ids]
        self._judge(request, ids, text, is_cut=is_cut)
        text_of = StreamDetokenizer(
            self.tokenizer, skip_special_tokens=request.sampling.skip_special_tokens
        )
        num_made = 0
        while num_made < len(ids):
            await asyncio.sleep(0)
            part = ids[num_made : num_made + self.tokens_per_delta]
            num_made += len(part)
            is_last = num_made == len(ids)
            piece, _ = text_of.push(part)
            top = request.sampling.logprobs
            yield Delta(
                request_id=request.request_id,
                token_ids=part,
                text=piece + (text_of.finish()[0] if is_last else ""),
                logprobs=None if top is None else [logprob_of(one, top) for one in part],
                finish_reason=None if not is_last else "length" if is_cut else "stop",
                prompt_tokens=len(request.prompt_ids),
                completion_tokens=num_made,
            )

    def _judge(self, request: Generate, ids: list[int], text: str, *, is_cut: bool) -> None:
        grammar = request.sampling.grammar
        if grammar is None:
            return
        matcher = self._matcher(grammar)
        wanted = ids if is_cut else ids[:-1]
        if matcher.try_consume_tokens(wanted) < len(wanted) or not (
            is_cut or matcher.is_accepting()
        ):
            self.refused.append(text)

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        make = {
            "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "lark": llguidance.LLMatcher.grammar_from_lark,
        }
        if grammar.kind == "choice":
            source = "start: " + " | ".join(f'"{line}"' for line in grammar.source.split("\n"))
            made = make["lark"](source)
        else:
            made = make[grammar.kind](grammar.source)
        assert self.tokenizer.raw is not None
        native = llguidance.LLTokenizer(self.tokenizer.raw.to_str())
        assert not llguidance.LLMatcher.validate_grammar(made, native), grammar.source
        return llguidance.LLMatcher(native, made)
