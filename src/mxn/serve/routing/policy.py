"""Which replica takes a request: measured load, capacity, prefixes, cost and a latency target.

Pure: `Load` values in, a `Choice` with its reason out. One unit of a score is one request in flight
on an average replica; the smallest score wins. Start at `choose`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_MAX_DEFICIT = 0.1  # of the traffic; so that one who comes back is not flooded
_KV_FULL = 0.8  # above this share of its pages a replica begins to preempt


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRules:
    """Weights of the terms. 0 turns a term off."""

    spread: float = 20.0  # 0.05 too much of the traffic weighs like one request in flight
    affinity: float = 2.0  # a prompt that is kept whole weighs like two requests in flight
    kv: float = 4.0
    cost: float = 2.0  # for being twice as dear as the cheapest
    latency: float = 4.0  # for being twice as slow as the target
    target_first_token_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Load:
    """What is known of one replica that could take a request."""

    replica: str
    weight: float = 1.0  # share of the traffic it should get, of the sum of all
    in_flight: float = 0.0  # requests, ours and others'
    waiting: float = 0.0  # of these, not yet running
    share: float = 0.0  # of the recent traffic that it got, of the sum of all
    kv_used: float = 0.0  # share of its pages
    matched_tokens: int = 0  # of the prompt, probably kept
    first_token_s: float | None = None  # usual wait for a first token
    cost: float | None = None  # per token, any unit


@dataclass(frozen=True, slots=True)
class Choice:
    """The replica that was chosen; `scores` explains all of them, best first."""

    replica: str
    reason: str
    scores: tuple[tuple[str, float, Mapping[str, float]], ...] = field(default=())

    def explain(self) -> str:
        """Return one line for each candidate, for `--explain` and logs."""
        lines = [f"{self.replica}: {self.reason}"]
        for replica, score, terms in self.scores:
            parts = ", ".join(f"{name} {value:+.2f}" for name, value in terms.items() if value)
            lines.append(f"  {replica}: score {score:.2f} ({parts or 'nothing speaks against it'})")
        return "\n".join(lines)


def choose(loads: Sequence[Load], prompt_tokens: int, rules: PolicyRules) -> Choice:
    """Return the best of at least one replica; the earlier one where scores are equal."""
    if len(loads) == 1:
        return Choice(loads[0].replica, "only replica")
    total = sum(load.weight for load in loads) or 1.0
    recent = sum(load.share for load in loads)
    mean_in_flight = sum(load.in_flight for load in loads) / len(loads)
    costs = [load.cost for load in loads if load.cost is not None]
    cheapest = min(costs, default=0.0)
    scored = []
    for load in loads:
        part = max(load.weight / total, 1e-6)
        terms = {
            "load": (load.in_flight + load.waiting) / (part * len(loads)),
            "spread": rules.spread * _deficit(load.share, recent, part),
            "prefix": -rules.affinity * _prefix(load, prompt_tokens) * (1 + mean_in_flight / 8),
            "kv": rules.kv * max(0.0, load.kv_used - _KV_FULL) / (1 - _KV_FULL),
            "cost": rules.cost * _dearer(load.cost, cheapest),
            "latency": rules.latency * _slower(load.first_token_s, rules.target_first_token_s),
        }
        scored.append((sum(terms.values()), load, terms))
    scored.sort(key=lambda item: item[0])
    _, best, terms = scored[0]
    rows = tuple((load.replica, score, terms) for score, load, terms in scored)
    return Choice(best.replica, _reason(best, terms, total, prompt_tokens), rows)


def _deficit(share: float, recent: float, part: float) -> float:
    """Return how much more of the recent traffic it got than it should."""
    if not recent:
        return 0.0
    return min(_MAX_DEFICIT, max(-_MAX_DEFICIT, share / recent - part))


def _prefix(load: Load, prompt_tokens: int) -> float:
    return min(1.0, load.matched_tokens / prompt_tokens) if prompt_tokens else 0.0


def _dearer(cost: float | None, cheapest: float) -> float:
    """Return 1 for twice the price of the cheapest; an unknown price speaks neither way."""
    return 0.0 if cost is None or cheapest <= 0 else cost / cheapest - 1


def _slower(first_token_s: float | None, target_s: float | None) -> float:
    return 0.0 if not first_token_s or not target_s else max(0.0, first_token_s / target_s - 1)


def _reason(best: Load, terms: Mapping[str, float], total: float, prompt_tokens: int) -> str:
    if terms["prefix"] < 0:
        return f"prefix {best.matched_tokens} of {prompt_tokens} tokens"
    return f"load {best.in_flight:.0f}, weight {best.weight / total:.2f}"
