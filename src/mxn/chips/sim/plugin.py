"""The chip plug-in `simulated`: devices sim:0, sim:1, … in host memory, for tests.

Shown by detection only with MXN_SIM=1, given to whoever names `sim:0`. Whether it shows is decided
without importing torch; a device that is handed out is registered with torch and ready to use.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from mxn import env
from mxn.chips.chip import Chip, Device, UnusableError
from mxn.chips.sim import device as sim_device
from mxn.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from mxn.chips.probe import Probe

CHIP_NAME = "simulated"


class SimChip(Chip):
    """All simulated devices of this process."""

    vendor = "simulated"
    title = "mxn simulated chip"
    torch_type = sim_device.TORCH_NAME
    collective = sim_device.COLLECTIVE_BACKEND
    basis = "simulated"
    is_on_host = True

    def detect(self, probe: Probe) -> list[Device]:
        """Return the devices when MXN_SIM=1, or none.

        Raises: UnusableError when it was asked for and cannot be built here; ConfigError for a
        variable that makes no sense.
        """
        if not is_listed():
            return []
        try:
            return self.on_request(probe)
        except UnsupportedError as error:
            raise UnusableError(error.message, device="sim:0", hint=error.hint) from error

    def on_request(self, probe: Probe) -> list[Device]:
        """Register the devices with torch, on first use compiling them, and return them.

        Raises: UnsupportedError when it cannot be built here.
        """
        extension = sim_device.load()
        return [_describe(index, extension.memory_bytes(index)) for index in _indices(extension)]

    def memory(self, device: Device, probe: Probe) -> tuple[int, int]:
        """Return free and total bytes as the device counts them and the knobs limit them."""
        extension = sim_device.load()
        total = extension.memory_bytes(device.index)
        return max(0, total - extension.bytes_now(device.index)), total

    def absence(self, probe: Probe) -> str:
        return "MXN_SIM is not 1; naming sim:0 works all the same"


def is_listed() -> bool:
    """Return whether detection shows the chip unasked. Raises: ConfigError for odd values."""
    text = env.get("MXN_SIM")
    if text not in {"0", "1"}:
        raise ConfigError(f"MXN_SIM must be 0 or 1, got {text!r}")
    return text == "1"


def _indices(extension: ModuleType) -> range:
    return range(extension.num_devices())


def _describe(index: int, memory_bytes: int) -> Device:
    name = f"{sim_device.TORCH_NAME}:{index}"
    return Device(
        id=name,
        chip=CHIP_NAME,
        vendor=SimChip.vendor,
        torch_device=name,
        name=f"{SimChip.title} {index}",
        memory_bytes=memory_bytes,
        native_dtypes=("float32", "bfloat16", "float16"),
        collective=SimChip.collective,
        evidence=(f"registered with torch as {name!r}", f"MXN_SIM={env.get('MXN_SIM')}"),
    )
