"""The processor itself: x86-64 with its instruction set levels, and 64-bit Arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mxn.chips import host_memory
from mxn.chips.chip import Chip, Device

if TYPE_CHECKING:
    from mxn.chips.probe import Probe

# Strongest first: a processor is named after the first level whose flags it all has.
_X86_LEVELS = (
    ("x86-amx", ("amx_tile", "amx_int8", "amx_bf16")),
    ("x86-avx512-bf16", ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")),
    ("x86-avx512-vnni", ("avx512f", "avx512bw", "avx512vl", "avx512_vnni")),
    ("x86-avx512", ("avx512f", "avx512bw", "avx512vl")),
    ("x86-avx2", ("avx2", "fma")),
)
_X86_ISA = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq",
    "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "amx_fp16",
)  # fmt: skip
_ARM_ISA = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")
_X86_DTYPES = {
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "float16": ("avx512_fp16", "amx_fp16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}
_ARM_DTYPES = {"bfloat16": ("bf16",), "float16": ("asimdhp",), "int8": ("asimddp", "i8mm")}


class CpuChip(Chip):
    """Always there, always last choice."""

    vendor: ClassVar[str] = "cpu"
    title: ClassVar[str] = "CPU"
    torch_type: ClassVar[str] = "cpu"
    collective: ClassVar[str] = "gloo"

    def detect(self, probe: Probe) -> list[Device]:
        cpuinfo = probe.read("/proc/cpuinfo")
        flags = read_flags(cpuinfo or "")
        machine = probe.machine()
        chip, isa, dtypes = classify(machine, flags)
        evidence = [f"machine={machine}"]
        if cpuinfo is None:
            evidence.append("no /proc/cpuinfo: instruction set extensions unknown")
        else:
            evidence.append("/proc/cpuinfo flags: " + (" ".join(isa) or "none that matter"))
        total = host_memory.read(probe)[1]
        host_total = probe.host_memory()[1]
        if total < host_total:
            evidence.append(f"control group limits memory to {total} of {host_total} bytes")
        name = _model_name(cpuinfo or "") or machine
        return [
            Device("cpu:0", chip, self.vendor, "cpu", name, total, dtypes, self.collective,
                   tuple(evidence), isa)
        ]  # fmt: skip

    def memory(self, device: Device, probe: Probe) -> tuple[int, int]:
        return host_memory.read(probe)

    def utilization(self, device: Device, probe: Probe) -> float | None:
        return probe.cpu_busy()


def read_flags(cpuinfo: str) -> frozenset[str]:
    """Return the flags that all cores have, from the text of /proc/cpuinfo."""
    sets = [
        set(value.split())
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset(set.intersection(*sets)) if sets else frozenset()


def classify(machine: str, flags: frozenset[str]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Return chip name, ISA extensions and natively computed dtypes of a processor."""
    if machine in ("aarch64", "arm64"):
        known, table, chip = _ARM_ISA, _ARM_DTYPES, "arm64-neon"
    elif machine in ("x86_64", "AMD64", "amd64"):
        known, table = _X86_ISA, _X86_DTYPES
        levels = (name for name, needs in _X86_LEVELS if flags.issuperset(needs))
        chip = next(levels, "x86-generic")
    else:
        known, table, chip = (), {}, f"{machine.lower() or 'unknown'}-generic"
    isa = tuple(flag for flag in known if flag in flags)
    dtypes = tuple(dtype for dtype, any_of in table.items() if flags.intersection(any_of))
    return chip, isa, ("float32", *dtypes)


def _model_name(cpuinfo: str) -> str | None:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip() or None
    return None
