"""Says what ranks decided about their micro-batches, and keeps what the plan should then take.

Runs beside the supervisor: ranks decide (`rebalance.py`) and write it down (`counts_log.py`), and
have neither profiles nor the user's ear. Start at `CountsTold`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from mxn.train.plan.plan import TrainPlan
from mxn.train.run import counts_log
from mxn.train.run.following import Following
from mxn.train.run.rebalance import Change, with_counts

log = logging.getLogger("mxn.train")

_POLL_S = 0.5


class CountsTold:
    """Follows `micro-batches.jsonl` while the block runs, and once more behind it."""

    def __init__(
        self,
        out: Path,
        *,
        plan: Callable[[], TrainPlan | None],
        say: Callable[[str], None],
        keep: Callable[[TrainPlan], None],
    ) -> None:
        """`plan`: the one that ranks were started with, None before there is one. `keep`: takes
        the plan with its counts of now, whenever they or the plan have changed.
        """
        self._out, self._plan, self._say, self._keep = out, plan, say, keep
        self._said = set(counts_log.read_all(out))
        self._kept: tuple[TrainPlan, Change] | None = None
        self._failed = ""  # with what, at the last look
        self._following = Following(self._try_to_look, every_s=_POLL_S, name="mxn-counts")

    def __enter__(self) -> CountsTold:
        self._following.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._following.__exit__()

    def _try_to_look(self) -> None:
        """What ranks decided holds all the same: a full disk here does not end the telling."""
        try:
            self.look()
        except Exception as error:
            if repr(error) != self._failed:  # said once, not twice a second
                log.exception("what ranks decided about micro-batches cannot be told now")
            self._failed = repr(error)
        else:
            self._failed = ""

    def look(self) -> None:
        plan = self._plan()
        changes = counts_log.read(self._out, plan.fingerprint) if plan is not None else []
        if plan is None or not changes:
            return
        for change in changes:
            if change not in self._said:
                self._said.add(change)
                self._say(change.text())
        # A plan that was made anew is another object, and what it is predicted to do was written.
        if self._kept is None or self._kept[0] is not plan or self._kept[1] != changes[-1]:
            self._keep(with_counts(plan, changes[-1].after))
            self._kept = plan, changes[-1]
