"""Which implementation of each op runs on this chip, and why. Start at `Ops.bind`.

An op is a folder under `ops/` that declares `OP`; a kernel is a function registered with `@kernel`.
The choice is made once, when `Ops` is bound (or, for `linear`, when a weight is prepared), never in
the hot path. Knows no models and no requests. Importing this module loads no torch.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from mxn import env
from mxn.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from mxn.kernels.tune import Table

log = logging.getLogger("mxn.kernels")

NAIVE_PRIORITY = -100


@dataclass(frozen=True, slots=True)
class Op:
    """One operator of the contract."""

    name: str
    signature: str  # with shape letters, as in `kernels/batch.py`
    meaning: str
    is_prepared: bool = False  # kernels take weights once and return a callable (`linear`)


class Ways(Protocol):
    """How a kernel that multiplies in several ways learns which is fastest for how many rows."""

    def settle(self, made: Any, table: Table) -> str:
        """Use in a prepared weight what is known of its shape on this chip; say what it is."""
        ...

    def measure(
        self, table: Table, in_features: int, out_features: int, dtype: str, device: torch.device
    ) -> str:
        """Measure a shape, store its times and say what they mean. Raises: Busy."""
        ...


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of an op.

    `shapes` sees the arguments of a call (for a prepared op: the weight's in and out features) and
    says whether the kernel takes them. `chips` are patterns with `|` between them. `missing` is
    given the dtype and returns the reason why the kernel cannot run in this process, or None.
    `needs_proof`: not chosen before it passed its parity test on this chip (`mxn kernels verify`),
    for kernels that a compiler makes anew on each machine. `ways`: of a prepared op whose kernel
    chooses by the number of rows. `is_static`: what it learns on the host of a batch are bounds, so
    that a graph of it is right for other batches; of ops that get a batch or plan by numbers.
    """

    op: str
    name: str
    fn: Callable[..., Any] = field(repr=False)
    chips: str = "*"
    dtypes: tuple[str, ...] | None = None  # None: every floating dtype
    shapes: Callable[..., bool] | None = None
    priority: int = 0
    missing: Callable[[str], str | None] | None = None
    needs_proof: bool = False
    ways: Ways | None = None
    is_static: bool = False

    def prepare(
        self, table: Table, weight_FD: Tensor, bias_F: Tensor | None = None
    ) -> tuple[Linear, str]:
        """Return a weight in this kernel's form, and what was measured for its shape, or ""."""
        made = self.fn(weight_FD, bias_F)
        return made, self.ways.settle(made, table) if self.ways else ""

    def reject_reason(self, chip: str, dtype: str) -> str | None:
        """Return why this kernel does not apply, or None when it does."""
        if not any(fnmatchcase(chip, pattern) for pattern in self.chips.split("|")):
            return f"is for chips {self.chips!r}, this is {chip!r}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"is for {', '.join(self.dtypes)}, not {dtype}"
        return self.missing(dtype) if self.missing else None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which kernel an op got. `times_us` are measured, the least of each; empty if none were."""

    op: str
    kernel: str
    reason: str
    candidates: tuple[str, ...]
    times_us: dict[str, dict[str, float]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)  # kernel -> why not
    shape: str = ""


class Linear(Protocol):
    """A weight prepared for one kernel. Maps x [..., in_features] to y [..., out_features]."""

    in_features: int
    out_features: int
    num_bytes: int
    kernel: str

    def __call__(self, x: Tensor) -> Tensor: ...


_KERNELS: dict[str, dict[str, Kernel]] = {}


def kernel(
    op: str,
    *,
    name: str,
    chips: str = "*",
    dtypes: tuple[str, ...] | None = None,
    shapes: Callable[..., bool] | None = None,
    priority: int = 0,
    missing: Callable[[str], str | None] | None = None,
    needs_proof: bool = False,
    ways: Ways | None = None,
    is_static: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as kernel `name` of `op`; see `Kernel` for the arguments."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        entry = Kernel(
            op, name, fn, chips, dtypes, shapes, priority, missing, needs_proof, ways,
            is_static,
        )  # fmt: skip
        add_kernel(entry)
        return fn

    return register


def add_kernel(entry: Kernel) -> None:
    """Register a kernel. A vendor plug-in may call this too; a name may be taken once per op."""
    kernels = _KERNELS.setdefault(entry.op, {})
    if entry.name in kernels and kernels[entry.name].fn is not entry.fn:
        raise ConfigError(f"op {entry.op!r} already has a kernel named {entry.name!r}")
    kernels[entry.name] = entry


@cache
def all_ops() -> dict[str, Op]:
    """Return every op of the contract by name. Loads no torch."""
    package = importlib.import_module("mxn.kernels.ops")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg)
    return {name: importlib.import_module(f"mxn.kernels.ops.{name}").OP for name in names}


@cache
def _load_own_kernels() -> None:
    for name in all_ops():
        package = importlib.import_module(f"mxn.kernels.ops.{name}")
        for info in pkgutil.iter_modules(package.__path__):
            if info.name not in ("naive", "cases"):
                importlib.import_module(f"{package.__name__}.{info.name}")
        naive = importlib.import_module(f"{package.__name__}.naive")
        add_kernel(Kernel(name, "naive", getattr(naive, name), priority=NAIVE_PRIORITY))


def kernels_of(op: str) -> dict[str, Kernel]:
    """Return the registered kernels of an op, naive included. Imports torch."""
    _load_own_kernels()
    return dict(_KERNELS[op])


def pinned() -> dict[str, str]:
    """Return what MXN_KERNELS pins: op -> kernel. Raises: ConfigError when it cannot be read."""
    pins: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in env.get("MXN_KERNELS").split(","))):
        op, found, name = part.partition("=")
        if not found or op not in all_ops():
            raise ConfigError(
                f"MXN_KERNELS: cannot read {part!r}; ops: {', '.join(all_ops())}",
                hint="write op=kernel, separated by commas",
            )
        pins[op] = name
    return pins


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Ops:
    """The ops, bound to one device, chip and dtype; the attributes are the chosen callables."""

    def __init__(
        self,
        device: torch.device,
        chip: str,
        dtype: torch.dtype,
        table: Table,
        pins: dict[str, str],
    ) -> None:
        self.device = device
        self.chip = chip
        self.dtype = dtype
        self._table = table
        self._pins = pins
        self._choices: dict[tuple[str, str], Choice] = {}

    @classmethod
    def bind(
        cls,
        torch_device: str | torch.device,
        chip: str,
        dtype: torch.dtype,
        only: Collection[str] | None = None,
    ) -> Ops:
        """Choose a kernel for every op, or for those named in `only`.

        Raises: UnsupportedError when MXN_KERNELS pins a kernel that is not available here.
        """
        import torch

        from mxn.kernels.tune import Table

        ops = cls(torch.device(torch_device), chip, dtype, Table.open(chip), pinned())
        for op in all_ops().values():
            if not op.is_prepared and (only is None or op.name in only):
                setattr(ops, op.name, ops._choose(op.name))
        return ops

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    def prepare_linear(self, weight_FD: Tensor, bias_F: Tensor | None = None) -> Linear:
        """Return `weight_FD` in the form of the kernel that is fastest for its shape.

        The result owns the weight; drop your own reference, so that one copy stays alive.
        """
        out_features, in_features = weight_FD.shape
        dtype = dtype_name(weight_FD.dtype)
        name = self.choose_linear(in_features, out_features, dtype)
        made, note = kernels_of("linear")[name].prepare(self._table, weight_FD, bias_F)
        key = ("linear", f"{in_features}x{out_features} {dtype}")
        if note and note not in self._choices[key].reason:
            chosen = self._choices[key]
            self._choices[key] = replace(chosen, reason=f"{chosen.reason}; {note}")
        return made

    def choose_linear(self, in_features: int, out_features: int, dtype: str) -> str:
        """Return the kernel for weights of this shape; measured on first sight, then remembered."""
        shape = f"{in_features}x{out_features} {dtype}"
        known = self._choices.get(("linear", shape))
        if known:
            return known.kernel
        usable, rejected = self.candidates("linear", dtype)
        usable = [k for k in usable if k.shapes is None or k.shapes(in_features, out_features)]
        contenders = [entry for entry in usable if entry.priority > NAIVE_PRIORITY]
        times: dict[str, dict[str, float]] = {}
        if "linear" in self._pins:
            name, reason = (
                self._pick_pinned("linear", usable, rejected).name,
                "pinned by MXN_KERNELS",
            )
        elif len(contenders) == 1:
            name, reason = contenders[0].name, "the only kernel for this chip and dtype"
        elif env.get("MXN_KERNEL_TUNING") == "off":
            name, reason = contenders[0].name, "priority (MXN_KERNEL_TUNING=off)"
        else:
            name, reason, times = self._fastest_linear(contenders, in_features, out_features, dtype)
        names = tuple(entry.name for entry in usable)
        self._note(Choice("linear", name, reason, names, times, rejected, shape))
        return name

    def why_not_static(self, names: Collection[str]) -> str | None:
        """Return which of the ops `names` must not be captured in a graph, or None."""
        for name in names:
            chosen = self._choices[name, ""].kernel
            if not kernels_of(name)[chosen].is_static:
                return f"{name}={chosen} learns lengths on the host"
        return None

    @property
    def table_path(self) -> Path:
        """Where the measured times of this chip are kept."""
        return self._table.path

    def measure_products(self, report: Callable[[str], None]) -> dict[str, str]:
        """Measure the ways of a product for every weight that was prepared; return the results.

        Raises: UnsupportedError when no kernel here has ways to choose from; Busy.
        """
        products = [choice for choice in self.explain() if choice.op == "linear"]
        usable, rejected = self.candidates("linear", dtype_name(self.dtype))
        ways = [entry.ways for entry in usable if entry.ways]
        if not ways:
            why = "; ".join(f"{name} {reason}" for name, reason in rejected.items())
            raise UnsupportedError(
                f"no product has ways to choose from on {self.chip}: {why}",
                hint="`mxn kernels verify` proves kernels on this chip",
            )
        found: dict[str, str] = {}
        for choice in products:
            size, dtype = choice.shape.split()
            in_features, out_features = map(int, size.split("x"))
            report(choice.shape)
            for one in ways:
                found[choice.shape] = one.measure(
                    self._table, in_features, out_features, dtype, self.device
                )
        return found

    def explain(self) -> list[Choice]:
        """Return every choice made so far, with its reason, candidates and measured times."""
        return list(self._choices.values())

    def chosen(self) -> dict[str, str]:
        """Return op -> kernel and reason, for people."""
        return {
            f"{c.op}[{c.shape}]" if c.shape else c.op: f"{c.kernel}: {c.reason}"
            for c in self._choices.values()
        }

    def candidates(self, op: str, dtype: str) -> tuple[list[Kernel], dict[str, str]]:
        """Return the kernels that apply here, best priority first, and why the others do not."""
        usable, rejected = [], {}
        for entry in kernels_of(op).values():
            reason = entry.reject_reason(self.chip, dtype) or self._table.off_reason(
                op, entry.name, dtype, entry.needs_proof
            )
            if reason:
                rejected[entry.name] = reason
            else:
                usable.append(entry)
        usable.sort(key=lambda entry: -entry.priority)
        return usable, rejected

    def _pick_pinned(self, op: str, usable: list[Kernel], rejected: dict[str, str]) -> Kernel:
        name = self._pins[op]
        for entry in usable:
            if entry.name == name:
                return entry
        why = f" ({rejected[name]})" if name in rejected else ""
        raise UnsupportedError(
            f"MXN_KERNELS pins {op}={name}, which is not available on chip {self.chip!r}{why}; "
            f"available: {', '.join(entry.name for entry in usable)}",
            hint=f"set MXN_KERNELS={op}={usable[0].name}",
        )

    def _choose(self, op: str) -> Callable[..., Any]:
        dtype = dtype_name(self.dtype)
        usable, rejected = self.candidates(op, dtype)
        if op in self._pins:
            best, reason = self._pick_pinned(op, usable, rejected), "pinned by MXN_KERNELS"
            times: dict[str, dict[str, float]] = {}
        else:
            best, reason, times = self._best(op, usable, dtype)
        names = tuple(entry.name for entry in usable)
        self._note(Choice(op, best.name, reason, names, times, rejected))
        if best.shapes is None:
            return best.fn
        rest = [entry for entry in usable if entry is not best and entry.shapes is None]
        return _guarded(best.fn, best.shapes, rest[0].fn)

    def _best(
        self, op: str, usable: list[Kernel], dtype: str
    ) -> tuple[Kernel, str, dict[str, dict[str, float]]]:
        contenders = [entry for entry in usable if entry.priority > NAIVE_PRIORITY]
        if len(contenders) <= 1:
            return (contenders or usable)[0], "the only kernel for this chip and dtype", {}
        if env.get("MXN_KERNEL_TUNING") == "off":
            return contenders[0], "priority (MXN_KERNEL_TUNING=off)", {}
        from mxn.kernels import tune

        try:
            times = tune.op_times(self._table, op, contenders, self.device, self.dtype)
        except tune.Busy as busy:
            return contenders[0], f"priority: not measured, machine busy ({busy})", {}
        name = tune.fastest(times, [entry.name for entry in contenders])
        return next(e for e in contenders if e.name == name), "fastest measured here", times

    def _fastest_linear(
        self, contenders: list[Kernel], in_features: int, out_features: int, dtype: str
    ) -> tuple[str, str, dict[str, dict[str, float]]]:
        from mxn.kernels import tune

        try:
            times = tune.linear_times(
                self._table, contenders, in_features, out_features, dtype, self.device
            )
        except tune.Busy as busy:
            return contenders[0].name, f"priority: not measured, machine busy ({busy})", {}
        name = tune.fastest(times, [entry.name for entry in contenders])
        return name, "fastest measured here over M = 1, 16, 256", times

    def _note(self, choice: Choice) -> None:
        self._choices[choice.op, choice.shape] = choice
        if len(choice.candidates) > 2:  # more than one kernel beside naive: a real choice
            name = f"{choice.op} {choice.shape}".strip()
            log.info("%s: %s (%s)", name, choice.kernel, choice.reason)


def _guarded(
    fn: Callable[..., Any], shapes: Callable[..., bool], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return (fn if shapes(*args, **options) else otherwise)(*args, **options)

    return call
