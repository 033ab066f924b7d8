"""What a chip and a device are, and what a vendor plug-in provides. Start at `Chip`.

A plug-in is a class without arguments that derives from `Chip`, named by an entry point of the
group `mxn.chips`. It sees the machine only through the `Probe` it is handed. Knows no models and no
kernels; importing this module loads no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mxn.errors import ChipError

if TYPE_CHECKING:
    from mxn.chips.probe import Probe


class UnusableError(ChipError):
    """The hardware is there, but this process cannot use it; the message says why."""


@dataclass(frozen=True, slots=True)
class Device:
    """One unit of a chip on this machine, ready for `torch.device(torch_device)`."""

    id: str  # what a user types: "cpu:0", "cuda:1", "sim:0"
    chip: str  # the kind: "x86-avx512-vnni", "nvidia-h200", "ascend-910b3"
    vendor: str  # the `vendor` of its plug-in, "unknown" when evidence disagrees
    torch_device: str  # "cpu", "cuda:1"
    name: str  # as the driver calls it
    memory_bytes: int  # what this process may use at most
    native_dtypes: tuple[str, ...] = ("float32",)  # torch names; computed without emulation
    collective: str = "gloo"  # torch.distributed backend
    evidence: tuple[str, ...] = ()  # why mxn believes all this
    isa: tuple[str, ...] = ()  # CPU only: instruction set extensions that kernels may use

    @property
    def index(self) -> int:
        """The number after the colon of `id`."""
        return int(self.id.rpartition(":")[2])


class Chip(ABC):
    """A vendor plug-in. One instance serves all devices of its vendor in this process."""

    vendor: ClassVar[str]  # short and unique: "nvidia", "ascend"
    title: ClassVar[str]  # for people: "Huawei Ascend"
    torch_type: ClassVar[str]  # "cpu", "cuda", "npu", ...; several vendors share "cuda"
    collective: ClassVar[str]  # torch.distributed backend; never a key: vendors share names
    visible_devices: ClassVar[str | None] = None  # variable that hides devices from a process
    environment: ClassVar[Mapping[str, str]] = {}  # variables a process of this chip needs
    basis: ClassVar[str] = "measured"  # of what is measured on it; "simulated" for a simulator
    is_on_host: ClassVar[bool] = False  # its devices compute on this machine's processor

    @abstractmethod
    def detect(self, probe: Probe) -> list[Device]:
        """Return the usable devices of this vendor; an empty list when there is none.

        Imports torch or a vendor package only when something cheap says that it is worthwhile.
        Raises: UnusableError when there is hardware that this process cannot use.
        """

    @abstractmethod
    def memory(self, device: Device, probe: Probe) -> tuple[int, int]:
        """Return free and total bytes of `device` for this process.

        Raises: ChipError when the driver does not answer.
        """

    def utilization(self, device: Device, probe: Probe) -> float | None:
        """Return the busy share of `device`, 0 to 1, or None when nobody tells."""
        return None

    def on_request(self, probe: Probe) -> list[Device]:
        """Return devices that are given only to who names them, such as simulated ones."""
        return []

    def absence(self, probe: Probe) -> str:
        """Return, for people, what was looked for when `detect` found nothing."""
        return "no sign of it"
