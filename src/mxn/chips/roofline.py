"""What a device really reaches: memory bandwidth, matrix throughput, cost of a launch.

Runs on any torch device; start at `measure`. Knows no vendor: what a device cannot do is found by
trying and kept with the reason. Every figure is the median of repeats, with its spread beside it.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mxn import __version__
from mxn.chips.discovery import free_memory
from mxn.chips.registry import chip_of
from mxn.errors import CapacityError

if TYPE_CHECKING:
    import torch

    from mxn.chips.chip import Device

SCHEMA = "mxn.chip-measurement/1"
DTYPES = ("float32", "bfloat16", "float16", "int8")
_CPU_BUFFER_BYTES = 512 * 2**20  # several times any last-level cache
_CHIP_BUFFER_BYTES = 2 * 2**30
_MIN_BUFFER_BYTES = 16 * 2**20
_FIRST_SIZE, _LAST_SIZE = 256, 16384  # square matrices
_FAIR_SIZE = 1024  # a smaller product says more about starting threads than about the device
_TOO_LONG_S = 1.0  # except where even one of those takes this long
_CHAIN = 1000  # launches that share one synchronization


@dataclass(frozen=True, slots=True)
class Pace:
    """How thoroughly to measure. A matrix product grows until one takes `product_s`."""

    repeats: int
    product_s: float
    buffer_share: float


QUICK = Pace(repeats=5, product_s=0.02, buffer_share=0.25)
FULL = Pace(repeats=15, product_s=0.2, buffer_share=1.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured quantity: the median, with the 20th and 80th percentile of the repeats."""

    what: str
    unit: str
    value: float
    p20: float
    p80: float
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Everything measured on one device in one run. `basis` is "simulated" on a simulated chip."""

    chip: str
    device: str
    name: str
    vendor: str
    basis: str
    date: str
    versions: dict[str, str]
    threads: int
    is_quick: bool
    readings: tuple[Reading, ...]
    unsupported: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMA

    def reading(self, what: str) -> Reading | None:
        return next((reading for reading in self.readings if reading.what == what), None)


def measure(
    device: Device,
    *,
    is_quick: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Measurement:
    """Measure `device`; `on_progress` is told what comes next, how many are done, and of how many.

    Raises: CapacityError when too little memory is free to say anything about bandwidth.
    """
    import torch

    pace = QUICK if is_quick else FULL
    target = torch.device(device.torch_device)
    steps: list[tuple[str, Callable[[], list[Reading]]]] = [
        ("memory", lambda: _memory(target, _buffer_bytes(device, pace), pace)),
        ("launch", lambda: _launch(target, pace)),
    ]
    steps += [(f"matmul {name}", _product_step(target, name, pace)) for name in DTYPES]
    readings: list[Reading] = []
    unsupported: dict[str, str] = {}
    with torch.inference_mode():
        for done, (title, step) in enumerate(steps):
            if on_progress:
                on_progress(title, done, len(steps))
            try:
                readings += step()
            except (RuntimeError, NotImplementedError) as error:
                unsupported[title] = str(error).partition("\n")[0]
    if on_progress:
        on_progress("done", len(steps), len(steps))
    return _describe(device, is_quick, tuple(readings), unsupported)


def synchronize(target: torch.device) -> None:
    """Wait until everything launched on `target` is done, whatever kind of device it is."""
    import torch

    if target.type == "cpu":
        return
    backend = getattr(torch, target.type, None)
    wait = getattr(backend, "synchronize", None) or torch.accelerator.synchronize
    wait(target)


def _buffer_bytes(device: Device, pace: Pace) -> int:
    free = free_memory(device)
    most = _CPU_BUFFER_BYTES if device.torch_device == "cpu" else _CHIP_BUFFER_BYTES
    size = min(int(most * pace.buffer_share), free // 4)
    if size < _MIN_BUFFER_BYTES:
        raise CapacityError(
            f"{device.id} has {free} bytes free, too few to measure its bandwidth",
            hint="end what uses the device, then measure again",
        )
    return size


def _memory(target: torch.device, num_bytes: int, pace: Pace) -> list[Reading]:
    """Read: one pass of a sum over a buffer. Copy: read and written bytes count both."""
    import torch

    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=target)
    sink = torch.empty_like(source)
    note = f"{num_bytes // 2**20} MiB buffers"
    read_s = _times(target, lambda: source.sum(), pace.repeats)
    copy_s = _times(target, lambda: sink.copy_(source), pace.repeats)
    return [
        _rate("memory read", source.nbytes, read_s, "B/s", note),
        _rate("memory copy", 2 * source.nbytes, copy_s, "B/s", note),
    ]


def _launch(target: torch.device, pace: Pace) -> list[Reading]:
    """Time one tiny operation: in a chain, as in a model, and waited for, as a first token is."""
    import torch

    x = torch.zeros(1, device=target)

    def chain() -> None:
        for _ in range(_CHAIN):
            x.add_(1.0)

    def waited() -> None:
        for _ in range(_CHAIN // 10):
            x.add_(1.0)
            synchronize(target)

    chained = [t / _CHAIN for t in _times(target, chain, pace.repeats)]
    alone = [t / (_CHAIN // 10) for t in _times(target, waited, pace.repeats)]
    return [
        _reading("launch", "s", chained, "add_ on one element, chained"),
        _reading("launch and wait", "s", alone, "add_ on one element, synchronized each time"),
    ]


def _product_step(target: torch.device, dtype: str, pace: Pace) -> Callable[[], list[Reading]]:
    return lambda: [_product(target, dtype, pace)]


def _product(target: torch.device, dtype: str, pace: Pace) -> Reading:
    """Grow square matrices until one product takes long enough; the best size counts.

    Raises: RuntimeError, torch's own, when the device does not multiply in this dtype.
    """
    best: tuple[float, int, list[float]] | None = None
    size = _FIRST_SIZE
    while size <= _LAST_SIZE:
        run = _multiply(target, dtype, size)
        first_s = min(_times(target, run, 2))
        if best is None or size**3 / first_s > best[0]:
            best = (size**3 / first_s, size, _times(target, run, pace.repeats))
        if first_s > (pace.product_s if size >= _FAIR_SIZE else _TOO_LONG_S):
            break
        size *= 2
    assert best is not None
    _, size, times = best
    unit = "OP/s" if dtype == "int8" else "FLOP/s"
    return _rate(f"matmul {dtype}", 2 * size**3, times, unit, f"{size} x {size}")


def _multiply(target: torch.device, dtype: str, size: int) -> Callable[[], Any]:
    import torch

    if dtype == "int8":
        a = torch.ones(size, size, dtype=torch.int8, device=target)
        return lambda: torch._int_mm(a, a)  # pyright: ignore[reportPrivateImportUsage]
    a = torch.full((size, size), 0.5, dtype=getattr(torch, dtype), device=target)
    b = a.clone()
    return lambda: a @ b


def _times(target: torch.device, run: Callable[[], Any], repeats: int) -> list[float]:
    """Return seconds of each repeat, after one that does not count."""
    run()
    synchronize(target)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        synchronize(target)
        times.append(time.perf_counter() - started)
    return times


def _rate(what: str, amount: float, times: list[float], unit: str, note: str) -> Reading:
    return _reading(what, unit, [amount / t for t in times], note)


def _reading(what: str, unit: str, values: list[float], note: str) -> Reading:
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Reading(what, unit, statistics.median(values), p20, p80, note)


def _describe(
    device: Device, is_quick: bool, readings: tuple[Reading, ...], unsupported: dict[str, str]
) -> Measurement:
    import torch

    return Measurement(
        chip=device.chip,
        device=device.id,
        name=device.name,
        vendor=device.vendor,
        basis=chip_of(device.vendor).basis,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "mxn": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        threads=torch.get_num_threads(),
        is_quick=is_quick,
        readings=readings,
        unsupported=unsupported,
    )
