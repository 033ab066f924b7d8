"""Asks the devices of dropped groups whether they compute again. No decisions.

Start at `Probes.answered`.
"""

from __future__ import annotations

from collections.abc import Mapping

from mxn.train.run.job import Job
from mxn.train.run.supervise.needs import Probe, StartProbe
from mxn.train.run.supervise.words import Dropped


class Probes:
    """One probe at a time for each group, from when an answer of it is believed."""

    def __init__(self, job: Job, start: StartProbe, every_s: float) -> None:
        self._job, self._start, self._every_s = job, start, every_s
        self._known: dict[str, tuple[float, Probe | None]] = {}  # when to try next; what runs

    def answered(self, dropped: Mapping[str, Dropped], now_s: float) -> list[str]:
        """Return the groups that passed since the last look, and start the probes that are due."""
        passed = []
        for group, gone in dropped.items():
            next_s, probe = self._known.get(group, (gone.back_after_s, None))
            if probe is not None:
                answer = probe.answer()
                if answer is None:
                    continue
                if answer:
                    passed.append(group)
                self._known[group] = (now_s + self._every_s, None)
            elif now_s >= max(next_s, gone.back_after_s):
                self._known[group] = (now_s, self._start(self._job, group))
        return passed
