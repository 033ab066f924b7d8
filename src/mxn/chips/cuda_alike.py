"""Seven makers answer to `cuda`. Which one is it? Start at `guess_vendor`.

`torch.cuda.is_available()` says nothing about NVIDIA, `nccl` says nothing either, and several
makers ship a work-alike of nvidia-smi. So evidence decides, the strongest first, and is kept; where
it disagrees, or there is none, the vendor is unknown and only reference kernels run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mxn.chips import smi
from mxn.chips.accelerator import Accelerator
from mxn.chips.chip import Device

if TYPE_CHECKING:
    from mxn.chips.probe import Probe, TorchView

VENDORS = ("nvidia", "amd", "hygon", "metax", "iluvatar", "kunlunxin", "thead")
QUERY = "index,name,memory.total,memory.used,utilization.gpu"

_NAMES = (
    ("nvidia", r"NVIDIA"),
    ("amd", r"\bAMD\b|Instinct|Radeon"),
    ("hygon", r"\bDCU\b|\bHCU\b|\bK100|\bBW\d"),
    ("metax", r"MetaX|\bMXC?\d|\bC5[05]0\b"),
    ("iluvatar", r"Iluvatar|\bBI-V"),
    ("thead", r"\bPPU\b"),
    ("kunlunxin", r"\bP800\b|Kunlun"),
)
_BUILD_TAGS = (
    ("metax", "maca"),
    ("iluvatar", "corex"),
    ("hygon", "dtk"),
    ("kunlunxin", "xpytorch"),
    ("thead", "ppu"),
)
_TOOLS = (
    ("metax", "mx-smi"),
    ("iluvatar", "ixsmi"),
    ("hygon", "hy-smi"),
    ("kunlunxin", "xpu-smi"),  # Intel's tool has the same name; the header tells
    ("kunlunxin", "xpu_smi"),
    ("thead", "ppu-smi"),
    ("nvidia", "nvidia-smi"),
)
_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/mxcd", "/dev/iluvatar[0-9]*", "/dev/xpu[0-9]*",
          "/dev/alixpu*")  # fmt: skip
_OTHER_SIGNS = ("rocm-smi",)
# Unverified: gfx numbers that DTK reports and AMD never sold.
_HYGON_ARCH = re.compile(r"gfx(926|928|936|938)$")
_KUNLUN_HEADER = "XPU-RT"


@dataclass(frozen=True, slots=True)
class VendorGuess:
    """Who is behind `cuda`. `vendor` None: unknown, and `reason` says why."""

    vendor: str | None
    evidence: tuple[str, ...]
    reason: str = ""


class CudaAlike(Accelerator):
    """A maker whose chips show up as `cuda`."""

    torch_type: ClassVar[str] = "cuda"
    collective: ClassVar[str] = "nccl"
    visible_devices: ClassVar[str | None] = "CUDA_VISIBLE_DEVICES"

    def detect(self, probe: Probe) -> list[Device]:
        if not has_signs(probe):
            return []
        view = probe.torch(self.torch_type)
        if not view.devices:
            self.refuse_if_listed(probe, view.version)
            return []
        guess = guess_vendor(probe, view)
        if guess.vendor != self.claims():
            return []
        evidence = (*guess.evidence, guess.reason) if guess.reason else guess.evidence
        return [self.describe(i, found, evidence) for i, found in enumerate(view.devices)]

    def claims(self) -> str | None:
        """Return the guess that makes the devices ours."""
        return self.vendor

    def parse(self, text: str) -> list[smi.Row]:
        """Read the CSV of nvidia-smi and of the tools that copy its options."""
        return smi.csv(text)

    def absence(self, probe: Probe) -> str:
        if not has_signs(probe):
            return super().absence(probe)
        view = probe.torch(self.torch_type)
        if view.hip is not None and not view.devices:
            return f"torch {view.version} is a HIP build and sees no device"
        if not view.devices:
            return f"torch {view.version} sees no 'cuda' device"
        guess = guess_vendor(probe, view)
        return f"the 'cuda' devices are by {guess.vendor or 'an unknown maker'}"


def has_signs(probe: Probe) -> bool:
    """Return whether anything cheap says that torch might see a `cuda` device."""
    tools = [tool for _, tool in _TOOLS] + list(_OTHER_SIGNS)
    return any(probe.which(tool) for tool in tools) or any(probe.glob(node) for node in _NODES)


def guess_vendor(probe: Probe, view: TorchView | None = None) -> VendorGuess:
    """Return who makes the `cuda` devices of this machine, with the evidence.

    What torch, the device name and the build say (steps 1 to 3) must agree. Tools on PATH (step 4)
    count only when those are silent, and then only one maker's; an nvidia-smi is believed only when
    it gives a driver version (step 5).
    """
    view = view or probe.torch("cuda")
    strong = _hip(probe, view) + _names(view) + _build(probe, view)
    evidence = tuple(text for _, text in strong)
    vendors = list(dict.fromkeys(vendor for vendor, _ in strong))
    if len(vendors) == 1:
        return VendorGuess(vendors[0], evidence)
    if vendors:
        return VendorGuess(None, evidence, f"evidence disagrees: {' or '.join(vendors)}")
    weak = _tools(probe)
    evidence = tuple(text for _, text in weak) or tuple(
        dict.fromkeys(f"name={device.name!r} says nothing" for device in view.devices)
    )
    vendors = list(dict.fromkeys(vendor for vendor, _ in weak))
    if not vendors:
        return VendorGuess(None, evidence, "nothing says who makes the 'cuda' devices")
    if len(vendors) > 1:
        return VendorGuess(None, evidence, f"tools of several makers: {', '.join(vendors)}")
    if vendors == ["nvidia"]:
        return _ask_nvml(probe, evidence)
    return VendorGuess(vendors[0], evidence)


def _hip(probe: Probe, view: TorchView) -> list[tuple[str, str]]:
    """Step 1: a HIP build is AMD's or Hygon's."""
    if view.hip is None:
        return []
    why = f"torch.version.hip={view.hip}"
    arches = [d.arch for d in view.devices if _HYGON_ARCH.match(d.arch)]
    if arches:
        return [("hygon", f"{why}, arch={arches[0]}")]
    if any(re.search(dict(_NAMES)["hygon"], device.name) for device in view.devices):
        return [("hygon", why)]
    if probe.which("hy-smi"):
        return [("hygon", f"{why}, hy-smi on PATH")]
    return [("amd", why)]


def _names(view: TorchView) -> list[tuple[str, str]]:
    """Step 2: the names of the devices."""
    return [
        (vendor, f"name={name!r}")
        for name in dict.fromkeys(device.name for device in view.devices)
        for vendor, pattern in _NAMES
        if re.search(pattern, name, re.IGNORECASE)
    ]


def _build(probe: Probe, view: TorchView) -> list[tuple[str, str]]:
    """Step 3: vendor packages and the build tag of torch."""
    found = []
    local = view.version.partition("+")[2].lower()
    for vendor, tag in _BUILD_TAGS:
        if re.search(rf"(^|[^a-z]){tag}", local):
            found.append((vendor, f"torch={view.version}"))
        if version := probe.version_of(tag):
            found.append((vendor, f"package {tag}={version}"))
    return found


def _tools(probe: Probe) -> list[tuple[str, str]]:
    """Step 4: tools on PATH. Presence only, except where two makers use one name."""
    found = []
    for vendor, tool in _TOOLS:
        if probe.which(tool) is None:
            continue
        if vendor == "kunlunxin":
            answer = probe.run(tool)
            if answer is None or _KUNLUN_HEADER not in answer.text:
                continue
        found.append((vendor, f"{tool} on PATH"))
    return found


def _ask_nvml(probe: Probe, evidence: tuple[str, ...]) -> VendorGuess:
    """Step 5: an nvidia-smi alone is believed when the driver answers through it."""
    answer = probe.run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    version = answer.text.strip().splitlines()[0] if answer and answer.text.strip() else ""
    if answer is not None and answer.is_ok and re.fullmatch(r"\d+(\.\d+)+", version):
        return VendorGuess("nvidia", (*evidence, f"NVML driver version {version}"))
    return VendorGuess(None, evidence, "nvidia-smi is there but gives no driver version")
