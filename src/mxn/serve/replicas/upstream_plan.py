"""What a gateway knows of a request for a foreign server, what it may cost, and its row.

Knows bodies of OpenAI's routes as far as they must be changed or counted; sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from mxn.ledger.types import Ledger, OpenUsage, Settlement, Ticket
from mxn.serve.context import Hop, RequestContext
from mxn.serve.http import explain
from mxn.serve.metering import open_row, settle_row
from mxn.serve.openai.errors import ApiError
from mxn.serve.openai.types import Count, NumChoices
from mxn.serve.replicas.counting import BYTES_PER_TOKEN, measure
from mxn.serve.replicas.upstream import DEFAULT_MAX_OUTPUT, Upstream

MAX_SEQUENCES = 1024  # prompts x choices in one request
# Every name that a server may read the limit of an answer from, the one that counts most first.
# Which of them it reads is not known, so the largest is what may be spent.
LIMITS = ("max_completion_tokens", "max_tokens", "n_predict", "max_new_tokens", "max_output_tokens")
_WITH_USAGE = msgspec.Raw(b'{"include_usage":true}')
_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Head(msgspec.Struct):
    """What a gateway must know of a body; everything else only passes through.

    Each field that multiplies or limits what is spent has bounds: some servers read a negative
    limit as none.
    """

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    n_predict: Count | None = None
    max_new_tokens: Count | None = None
    max_output_tokens: Count | None = None
    n: NumChoices | None = None
    n_cmpl: NumChoices | None = None
    best_of: NumChoices | None = None

    def limits(self) -> dict[str, int]:
        """Return the limits that were given, by name."""
        given = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in given.items() if value is not None}


_head_decoder = msgspec.json.Decoder(Head)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(slots=True, kw_only=True)
class Plan:
    """A request as it came, ready to be sent to any server of the model."""

    id: str
    model: str  # the name the caller used
    path: str
    head: Head
    fields: dict[str, msgspec.Raw]
    context: RequestContext
    num_prompts: int
    input_estimate: int  # tokens
    is_streamed: bool  # to the client; `head.stream` is what the server is asked for
    own_limit: int | None = None  # that we set on an answer, since the caller gave none

    @classmethod
    def read(cls, body: bytes, *, id: str, model: str, path: str, context: RequestContext) -> Plan:
        """Read a body. Raises: ApiError."""
        try:
            head = _head_decoder.decode(body)
            fields = _fields_decoder.decode(body)
            num_prompts, tokens = _measured(fields, path)
        except msgspec.ValidationError as exc:
            raise explain(exc, body) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise ApiError(f"The body is not valid JSON: {exc}", code="invalid_json") from None
        plan = cls(
            id=id,
            model=model,
            path=path,
            head=head,
            fields=fields,
            context=context,
            num_prompts=num_prompts,
            input_estimate=len(body) // BYTES_PER_TOKEN + 1 if tokens is None else tokens,
            is_streamed=bool(head.stream),
        )
        most = plan.num_prompts * plan._most_choices
        if plan.makes_tokens and most > MAX_SEQUENCES:
            raise ApiError(f"At most {MAX_SEQUENCES} answers in one request, got {most}.")
        return plan

    @property
    def is_chat(self) -> bool:
        return _is_chat(self.path) and "messages" in self.fields

    @property
    def makes_tokens(self) -> bool:
        return not self.path.endswith("/embeddings")

    @property
    def num_choices(self) -> int:
        """Answers that are due, over all prompts."""
        return self.num_prompts * (self.head.n or self.head.n_cmpl or 1)

    @property
    def limit(self) -> int | None:
        """Tokens of one answer, as most servers read it; None: as many as the server likes."""
        return next(iter(self.head.limits().values()), self.own_limit)

    @property
    def _most_choices(self) -> int:
        return max(self.head.n or 1, self.head.n_cmpl or 1, self.head.best_of or 1)

    def most_output(self, default: int) -> int:
        """Return the most tokens that any server may make of it; `default`: without a limit.

        A limit of 0 is none: many servers read it so.
        """
        if not self.makes_tokens:
            return 0
        largest = max(self.head.limits().values(), default=0) or default
        return largest * self.num_prompts * self._most_choices

    def body_for(self, upstream: Upstream, rest: dict[str, msgspec.Raw] | None = None) -> bytes:
        """Return the body for a server; `rest`: the fields that ask for the rest of an answer."""
        fields = self.fields | {"model": upstream.model_json}
        if self.head.stream:
            fields["stream_options"] = _WITH_USAGE
        if self.own_limit is not None:
            fields["max_tokens"] = msgspec.Raw(b"%d" % self.own_limit)
        if rest is not None:
            fields |= rest
            if upstream.continues == "field":
                fields["continue_final_message"] = _TRUE
                fields["add_generation_prompt"] = _FALSE
        return msgspec.json.encode(fields)

    def limits_after(self, num_tokens: int) -> dict[str, msgspec.Raw]:
        """Return the limit fields of a request for the rest of an answer."""
        limits = self.head.limits()
        if not limits and self.own_limit is not None:
            limits = {"max_tokens": self.own_limit}
        return {
            name: msgspec.Raw(b"%d" % max(1, value - num_tokens)) for name, value in limits.items()
        }


def _is_chat(path: str) -> bool:
    return path.endswith("/chat/completions")


def _measured(fields: dict[str, msgspec.Raw], path: str) -> tuple[int, int | None]:
    """Return the number of prompts and, where they are a list, their tokens."""
    num_prompts, num_tokens = 0, None
    for name in () if _is_chat(path) else ("prompt", "input", "prompt_embeds"):
        if name in fields and bytes(memoryview(fields[name])[:1]) == b"[":
            more, tokens = measure(msgspec.json.decode(fields[name]))
            num_prompts, num_tokens = num_prompts + more, (num_tokens or 0) + tokens
    return max(1, num_prompts), num_tokens


@dataclass(slots=True)
class Account:
    """The row of a request in the ledger; without a ledger every method does nothing."""

    ledger: Ledger | None
    chips: tuple[str, ...] = ()
    max_output: int = DEFAULT_MAX_OUTPUT  # tokens of an answer whose caller sets no limit
    ticket: Ticket | None = field(default=None, init=False)
    is_settled: bool = field(default=False, init=False)

    async def open(self, plan: Plan) -> None:
        """Write the row. Sets the limit of an answer that a budget pays for and nobody limits.

        Raises: RateLimitError, QuotaError.
        """
        plan.context.is_stream = plan.is_streamed
        principal = plan.context.principal
        if self.ledger is None or principal is None or not plan.context.is_billed:
            return
        usage = OpenUsage(
            usage_id=plan.context.usage_id or plan.id,
            request_id=plan.context.request_id,
            principal=principal,
            endpoint=plan.context.endpoint or plan.path,
            model=plan.model,
            chips=self.chips,
            input_tokens=plan.input_estimate,
            max_output_tokens=plan.most_output(self.max_output),
            is_stream=plan.is_streamed,
            batch_id=plan.context.batch_id,
        )
        self.ticket = await open_row(plan.context, self.ledger, usage)
        if self.ticket.reserved and plan.makes_tokens and not plan.head.limits():
            plan.own_limit = self.max_output

    def progress(self, hop: Hop, input_tokens: int, output_tokens: int) -> None:
        if self.ticket is not None and self.ledger is not None:
            self.ledger.progress(
                self.ticket, input_tokens, output_tokens, chip=hop.chip, replica=hop.replica
            )

    async def settle(self, context: RequestContext, used: Settlement) -> None:
        """The first call counts, also without a ledger."""
        if self.is_settled:
            return
        self.is_settled = True
        ticket, self.ticket = self.ticket, None
        await settle_row(context, self.ledger, ticket, used)
