"""A set of page ids that knows its contiguous runs, so that a sequence gets neighbouring pages.

Knows nothing of sequences or contents. Taking and giving a page costs O(log runs).
Start at `PageRuns.take`.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from mxn.errors import InternalError


class PageRuns:
    """The blank pages. Starts with all of ``range(num_pages)``."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._end_of: dict[int, int] = {0: num_pages}  # first page of a run -> page behind it
        self._start_of: dict[int, int] = {num_pages: 0}
        self._longest: list[tuple[int, int]] = [(-num_pages, 0)]  # a heap; may hold stale runs

    def __iter__(self) -> Iterator[int]:
        for start, end in self._end_of.items():
            yield from range(start, end)

    def take(self, num_pages: int, *, after: int | None = None) -> list[int]:
        """Remove and return `num_pages` pages: those behind page `after` first, then longest runs.

        Raises: InternalError when there are fewer.
        """
        if num_pages > self.num_pages:
            raise InternalError(f"{num_pages} pages wanted, {self.num_pages} are blank")
        taken: list[int] = []
        if after is not None and after + 1 in self._end_of:
            start, end = after + 1, self._end_of[after + 1]
            taken += self._cut(start, end, start, min(end, start + num_pages))
        while len(taken) < num_pages:
            missing = num_pages - len(taken)
            start, end = self._pop_longest()
            first = start
            if start > 0 and end - start > 2 * missing:
                first = (start + end) // 2  # leave room for the sequence that ends before the run
            taken += self._cut(start, end, first, min(end, first + missing))
        self.num_pages -= len(taken)
        return taken

    def give(self, pages: list[int]) -> None:
        """Add pages that are not in the set; runs that touch become one."""
        end_of, start_of = self._end_of, self._start_of
        previous = start = None
        for page in pages:
            if start is not None and previous not in (page - 1, page + 1):
                self._note(start)
            previous, start = page, start_of.pop(page, page)
            end = end_of.pop(page + 1, page + 1)
            end_of[start] = end
            start_of[end] = start
        if start is not None:
            self._note(start)
        self.num_pages += len(pages)

    def _cut(self, start: int, end: int, first: int, last: int) -> range:
        """Remove pages first..last-1 from the run start..end-1."""
        end_of, start_of = self._end_of, self._start_of
        del end_of[start], start_of[end]
        for rest_start, rest_end in ((start, first), (last, end)):
            if rest_start < rest_end:
                end_of[rest_start] = rest_end
                start_of[rest_end] = rest_start
                self._note(rest_start)
        return range(first, last)

    def _note(self, start: int) -> None:
        """Put a new or changed run where `_pop_longest` finds it; stale notes are skipped there."""
        longest = self._longest
        heappush(longest, (start - self._end_of[start], start))
        if len(longest) > 64 + 4 * len(self._end_of):
            longest[:] = [(first - end, first) for first, end in self._end_of.items()]
            heapify(longest)

    def _pop_longest(self) -> tuple[int, int]:
        longest, end_of = self._longest, self._end_of
        while longest:
            negative_length, start = heappop(longest)
            end = end_of.get(start)
            if end is not None and start - end == negative_length:
                return start, end
        raise InternalError("page runs: blank pages exist but no run is noted")

    def validate(self) -> None:
        """Raises: InternalError when the runs are not maximal, disjoint and all noted."""
        total, previous_end = 0, -1
        noted = set(self._longest)
        for start, end in sorted(self._end_of.items()):
            is_good = previous_end < start < end and self._start_of.get(end) == start
            if not is_good or (start - end, start) not in noted:
                raise InternalError(f"page runs: bad run {start}..{end - 1} after {previous_end}")
            total, previous_end = total + end - start, end
        if total != self.num_pages or len(self._start_of) != len(self._end_of):
            raise InternalError(f"page runs: {total} pages in runs, {self.num_pages} counted")
