"""Make the simulated chip a torch device of this process: ``load(); torch.device("sim:0")``.

What a test may turn is in `knobs.py`, what `torch.sim` offers in `torch_module.py`.
"""

from __future__ import annotations

import threading
from types import ModuleType

from mxn import env
from mxn.chips.sim import at_exit, build
from mxn.errors import ConfigError, UnsupportedError
from mxn.units import parse_bytes

TORCH_NAME = "sim"
COLLECTIVE_BACKEND = "simccl"
MAX_DEVICES = 64  # kMaxDevices of csrc/sim.h
_UNNAMED = "privateuseone"  # what torch calls the type before somebody claims it

_lock = threading.Lock()
_extension: ModuleType | None = None


def load() -> ModuleType:
    """Register the device with torch, once per process, and return the compiled extension.

    The first call on a machine compiles it (about half a minute); later ones import that build.
    The MXN_SIM_* variables are read here; `mxn.chips.sim.knobs` changes them afterwards.
    Raises: UnsupportedError without a compiler, with another PyTorch than tested, or when another
    plug-in has taken torch's one free device type; ConfigError for a variable that makes no sense.
    """
    global _extension
    with _lock:
        if _extension is None:
            _extension = _register()
        return _extension


def is_loaded() -> bool:
    """Return whether `load` has succeeded in this process."""
    return _extension is not None


def _register() -> ModuleType:
    import torch

    num_devices, memory_bytes = configured_size()
    launch_us, fail_after = _read_faults()
    _refuse_other_backend(torch._C._get_privateuse1_backend_name())
    extension = build.load_extension()
    extension.configure(num_devices, memory_bytes)
    extension.set_launch_us(launch_us)

    from mxn.chips.sim.torch_module import SimModule

    torch.utils.rename_privateuse1_backend(TORCH_NAME)
    torch._register_device_module(TORCH_NAME, SimModule(extension))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    if torch.distributed.is_available():
        from mxn.chips.sim import collectives

        collectives.register(extension)
    at_exit.register()
    extension.set_fail_after(fail_after, False)  # last, so that registration does not count
    return extension


def _refuse_other_backend(name: str) -> None:
    if name != _UNNAMED:
        raise UnsupportedError(
            f"PyTorch has room for one plug-in device type and {name!r} has taken it",
            hint=f"run the simulated chip in a process that does not load the {name!r} plug-in",
        )


def configured_size() -> tuple[int, int]:
    """Return the number of devices and the bytes of each that the environment asks for.

    Raises: ConfigError for a variable that makes no sense.
    """
    num_devices = env.get_int("MXN_SIM_DEVICES")
    if not 1 <= num_devices <= MAX_DEVICES:
        raise ConfigError(f"MXN_SIM_DEVICES must be 1 to {MAX_DEVICES}, got {num_devices}")
    try:
        memory_bytes = parse_bytes(env.get("MXN_SIM_MEMORY"))
    except ValueError as error:
        raise ConfigError(f"MXN_SIM_MEMORY: {error}") from None
    return num_devices, memory_bytes


def _read_faults() -> tuple[float, int]:
    text = env.get("MXN_SIM_LAUNCH_US")
    try:
        launch_us = float(text)
    except ValueError:
        raise ConfigError(f"MXN_SIM_LAUNCH_US must be a number, got {text!r}") from None
    fail_after = env.get_int("MXN_SIM_FAIL_AFTER")
    if launch_us < 0 or fail_after < 0:
        raise ConfigError(
            "MXN_SIM_LAUNCH_US and MXN_SIM_FAIL_AFTER must be at least 0, "
            f"got {launch_us} and {fail_after}"
        )
    return launch_us, fail_after
