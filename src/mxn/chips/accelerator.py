"""What all accelerators share: cheap signs first, then torch, then names and numbers.

`Accelerator` is the base of makers whose device type is their own (`npu`, `mlu`, …);
`cuda_alike.py` adds what it takes to share the type `cuda`. A vendor file states names and
patterns, little code.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from mxn.chips import smi, specs
from mxn.chips.chip import Chip, Device, UnusableError

if TYPE_CHECKING:
    from mxn.chips.probe import Answer, Probe, TorchDevice

_SLUG = re.compile(r"[^a-z0-9]+")


class Accelerator(Chip):
    """A maker whose torch package registers a device type of its own."""

    package: ClassVar[str | None] = None  # module that registers the type; None: torch does
    tool: ClassVar[str | None] = None  # management tool
    query: ClassVar[tuple[str, ...]] = ()  # its arguments that list the devices
    nodes: ClassVar[tuple[str, ...]] = ()  # patterns of device files the driver makes
    torch_has_it: ClassVar[str | None] = None  # hint where no package can be named
    has_float16: ClassVar[bool] = True  # every accelerator we have facts about computes it

    def parse(self, text: str) -> list[smi.Row]:
        """Read what the tool printed for `query`."""
        return []

    # -- detection -------------------------------------------------------------------------------

    def detect(self, probe: Probe) -> list[Device]:
        signs = self.signs(probe)
        if not signs:
            return []
        if self.package is not None and not probe.has_module(self.package):
            raise UnusableError(
                f"{self.title}: {'; '.join(self.testimony(probe))}, "
                f"but the package {self.package!r} is not installed",
                device=self.torch_type,
                hint=f"install {self.package} for this version of torch",
            )
        view = probe.torch(self.torch_type, self.package)
        if not view.devices:
            self.refuse_if_listed(probe, view.version)
            return []
        evidence = (*self.testimony(probe), f"torch={view.version}")
        return [
            self.describe(index, found, (*evidence, f"torch.{self.torch_type} name={found.name!r}"))
            for index, found in enumerate(view.devices)
        ]

    def signs(self, probe: Probe) -> list[str]:
        """Return cheap hints that it is worthwhile to import torch."""
        found = [f"{self.tool} on PATH"] if self.tool and probe.which(self.tool) else []
        for pattern in self.nodes:
            if nodes := probe.glob(pattern):
                found.append(f"{nodes[0]}" + (f" and {len(nodes) - 1} more" if nodes[1:] else ""))
        if self.package and probe.has_module(self.package):
            found.append(f"package {self.package} installed")
        return found

    def testimony(self, probe: Probe) -> list[str]:
        """Return the signs, and what the management tool lists."""
        rows = self.rows(probe)
        listed = [f"{self.tool} lists {_count(rows)}"] if rows else []
        return self.signs(probe) + listed

    def refuse_if_listed(self, probe: Probe, torch_version: str) -> None:
        """Raise when the tool lists devices that torch does not see."""
        rows = self.rows(probe)
        if rows:
            raise UnusableError(
                f"{self.title}: {self.tool} lists {_count(rows)}, but torch {torch_version} "
                f"sees no {self.torch_type!r} device",
                device=self.torch_type,
                hint=self.torch_has_it or f"check the driver and {self.visible_devices or 'torch'}",
            )

    def describe(self, index: int, found: TorchDevice, evidence: tuple[str, ...]) -> Device:
        """Return the device that torch sees under `index`."""
        return Device(
            id=f"{self.torch_type}:{index}",
            chip=self.chip_name(found.name, found.memory_bytes),
            vendor=self.vendor,
            torch_device=f"{self.torch_type}:{index}",
            name=found.name,
            memory_bytes=found.memory_bytes,
            native_dtypes=self.native_dtypes(found),
            collective=self.collective,
            evidence=evidence,
        )

    def chip_name(self, name: str, memory_bytes: int) -> str:
        """Return the kind behind a driver's name: a known chip, or a name made from it."""
        spec = specs.match(self.vendor, name, memory_bytes)
        if spec:
            return spec.name
        slug = _SLUG.sub("-", name.lower()).strip("-")
        return slug if slug.startswith(f"{self.vendor}-") else f"{self.vendor}-{slug or 'device'}"

    def native_dtypes(self, found: TorchDevice) -> tuple[str, ...]:
        """Return the dtypes that the device computes without emulation, as far as torch tells."""
        dtypes = ["float32"]
        if found.has_bf16:
            dtypes.append("bfloat16")
        if self.has_float16:
            dtypes.append("float16")
        return tuple(dtypes)

    def absence(self, probe: Probe) -> str:
        looked = [self.tool, *self.nodes, f"package {self.package}" if self.package else None]
        return "none of: " + ", ".join(item for item in looked if item)

    # -- readings --------------------------------------------------------------------------------

    def rows(self, probe: Probe) -> list[smi.Row]:
        """Return what the management tool lists; an empty list when it is absent or fails."""
        answer = self.ask(probe)
        return self.parse(answer.text) if answer is not None and answer.is_ok else []

    def ask(self, probe: Probe) -> Answer | None:
        return probe.run(self.tool, *self.query) if self.tool else None

    def memory(self, device: Device, probe: Probe) -> tuple[int, int]:
        return probe.torch_memory(self.torch_type, device.index)

    def utilization(self, device: Device, probe: Probe) -> float | None:
        physical = self.physical_index(device, probe)
        return next((row.busy for row in self.rows(probe) if row.index == physical), None)

    def physical_index(self, device: Device, probe: Probe) -> int | None:
        """Return the tool's number of a device: torch counts only visible ones. None: unclear."""
        visible = probe.environ(self.visible_devices) if self.visible_devices else None
        if not visible:
            return device.index
        listed = [item.strip() for item in visible.split(",")]
        if device.index >= len(listed) or not listed[device.index].isdigit():
            return None  # named by UUID
        return int(listed[device.index])


def _count(rows: list[smi.Row]) -> str:
    names = dict.fromkeys(row.name for row in rows)
    return f"{len(rows)} x {', '.join(names)}"
