"""Writes down which torch functions a layer calls, with what: so each can be repeated alone.

Functions are caught as Python calls them, above the choice of kernels: `linear`, `silu`,
`scaled_dot_product_attention` are the same names on every chip. Knows no chips and judges nothing.
Start at `record`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

# Only move or cast. Rounding by a cast is part of what calls it.
_NO_WORK = frozenset({"to", "float", "type_as", "detach", "contiguous", "tolist", "item"})


@dataclass(frozen=True, slots=True)
class Call:
    """One call; tensors in `args` and `kwargs` are detached, on the CPU, and say if they want a
    gradient."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        shapes = [list(t.shape) for t in tensors_of((self.args, self.kwargs))]
        return f"{self.name}({', '.join(map(str, shapes))})"

    def run(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Call it again with each tensor changed by `change`."""
        return self.fn(*mapped(self.args, change), **mapped(self.kwargs, change))


def record(run: Callable[[], Any], *, in_place: bool = False) -> list[Call]:
    """Return the calls that `run` makes, one for each function, set of shapes, dtypes and numbers.

    Views, casts and what takes no tensor are left out, and what writes to its first argument
    (`lerp_`) but with `in_place`.
    """
    recorder = _Recorder(in_place)
    with recorder:
        run()
    return list(recorder.calls.values())


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the same nest with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: mapped(part, change) for name, part in value.items()}
    return value


class _Recorder(TorchFunctionMode):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self._in_place = in_place
        self.calls: dict[str, Call] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "?")).rsplit(".", 1)[-1]
        given = list(tensors_of((args, kwargs)))
        if not given or name in _NO_WORK or name.endswith("__get__"):
            return func(*args, **kwargs)
        signature = f"{name} {mapped((args, kwargs), _signature)!r}"
        if signature in self.calls:
            return func(*args, **kwargs)
        before = mapped((args, kwargs), _copy)  # first: the function may write to what it is given
        out = func(*args, **kwargs)
        writes = self._in_place and name.endswith("_") and not name.endswith("__")
        if writes or _is_work(given, out):
            self.calls[signature] = Call(name, func, before[0], before[1])
        return out


def _signature(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}{tensor.requires_grad}"


def _copy(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        copy = tensor.detach().clone()
        return copy.requires_grad_(tensor.requires_grad)


def _is_work(given: list[Tensor], out: Any) -> bool:
    """Whether a result lies in new memory: views compute nothing."""
    with torch._C.DisableTorchFunction():
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        made = [t for t in tensors_of(out) if t.numel()]
        return any(t.untyped_storage().data_ptr() not in known for t in made)
