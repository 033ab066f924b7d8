"""Captures on a processor: what a CUDA graph does, done with operators.

The operators that a call starts are written down with the memory they work on, and started again
one by one at a replay. Python does not run again: a number that was read on the host stays what it
was, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeCapture:
    """Implements `mxn.engine.graphs.Capture`."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        tape = _Tape()
        with tape:
            out = run()
        self.num_recorded += 1

        def replay() -> Tensor:
            tape.replay()
            return out

        return replay
