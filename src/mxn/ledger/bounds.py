"""How large the numbers of one request may be, so that sums of them stay within 63 bits.

A count beyond these is a bug of whoever counted. A request that has not begun is refused with it; a
settlement is never lost because of one: it is written with the nearest number that can be.
"""

from __future__ import annotations

import logging

import msgspec

from mxn.errors import UserError
from mxn.ledger.types import OpenUsage, Settlement

log = logging.getLogger(__name__)

MAX_TOKENS = 2**40  # of one request and kind
MAX_DEVICE_US = 2**50  # 35 years
MAX_COST_MICRO = 2**50  # of one request: about 1.1e9 units of its currency
MAX_SUM = 2**62  # of what a budget has spent in a period
_MAX_SMALL = 10_000  # replicas of a request, and HTTP statuses


def check_usage(usage: OpenUsage) -> None:
    """Raises: UserError for counts that no request has."""
    if 0 <= usage.input_tokens <= MAX_TOKENS and 0 <= usage.max_output_tokens <= MAX_TOKENS:
        return
    raise UserError(
        f"a request of {usage.input_tokens} input tokens and at most {usage.max_output_tokens} "
        f"output tokens cannot be counted; each must be from 0 to {MAX_TOKENS}",
        hint="lower max_tokens",
    )


def bounded(usage_id: str, used: Settlement) -> Settlement:
    """Return a settlement whose counts fit each other and the database; logs what did not."""
    if (
        0 <= used.cached_tokens <= used.input_tokens <= MAX_TOKENS
        and 0 <= used.reasoning_tokens <= used.output_tokens <= MAX_TOKENS
        and 0 <= used.device_us <= MAX_DEVICE_US
        and 0 <= used.num_replicas <= _MAX_SMALL
        and 0 <= used.status <= _MAX_SMALL
    ):
        return used
    input_tokens = _clamp(used.input_tokens, MAX_TOKENS)
    output_tokens = _clamp(used.output_tokens, MAX_TOKENS)
    fitting = msgspec.structs.replace(
        used,
        input_tokens=input_tokens,
        cached_tokens=_clamp(used.cached_tokens, input_tokens),
        output_tokens=output_tokens,
        reasoning_tokens=_clamp(used.reasoning_tokens, output_tokens),
        device_us=_clamp(used.device_us, MAX_DEVICE_US),
        num_replicas=_clamp(used.num_replicas, _MAX_SMALL),
        status=_clamp(used.status, _MAX_SMALL),
    )
    log.error("usage row %s has counts that cannot be: %r; it is settled as %r", usage_id, used,
              fitting)  # fmt: skip
    return fitting


def _clamp(value: int, largest: int) -> int:
    return max(0, min(value, largest))
