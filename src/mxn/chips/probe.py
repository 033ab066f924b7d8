"""Everything that chip detection reads from outside: tools, files, packages, torch, environment.

Plug-ins ask a `Probe`, so that tests can answer in its place (`mxn.chips.testing.RecordedProbe`).
Knows nothing of vendors. Start at `Probe`.
"""

from __future__ import annotations

import glob
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mxn.chips.chip import UnusableError

TOOL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a tool said. `status` is its exit status; None: it did not end within the timeout."""

    status: int | None
    text: str
    error: str = ""

    @property
    def is_ok(self) -> bool:
        return self.status == 0


@dataclass(frozen=True, slots=True)
class TorchDevice:
    """One device as torch sees it."""

    name: str
    memory_bytes: int
    arch: str = ""  # "sm_90", "gfx942"; empty: torch does not say
    has_bf16: bool | None = None  # None: torch does not say


@dataclass(frozen=True, slots=True)
class TorchView:
    """What this torch build offers for one device type."""

    version: str
    hip: str | None
    devices: tuple[TorchDevice, ...]


class Probe:
    """The real machine."""

    def which(self, tool: str) -> str | None:
        """Return the path of a command-line tool, or None when it is not on PATH."""
        return shutil.which(tool)

    def run(self, *command: str, timeout_s: float = TOOL_TIMEOUT_S) -> Answer | None:
        """Run a vendor's tool and return what it said, or None when it is not on PATH."""
        path = self.which(command[0])
        if path is None:
            return None
        try:
            done = subprocess.run(
                [path, *command[1:]],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return Answer(None, "", f"no answer within {timeout_s:.0f} s")
        except OSError as error:
            return Answer(-1, "", str(error))
        return Answer(done.returncode, done.stdout, done.stderr.strip())

    def read(self, path: str) -> str | None:
        """Return the text of a file, or None when it cannot be read."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None

    def glob(self, pattern: str) -> list[str]:
        """Return the existing paths that match, sorted."""
        return sorted(glob.glob(pattern))

    def has_module(self, name: str) -> bool:
        """Return whether a top-level module is installed, without importing it."""
        return importlib.util.find_spec(name) is not None

    def version_of(self, distribution: str) -> str | None:
        """Return the installed version of a distribution, or None."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def environ(self, name: str) -> str | None:
        return os.environ.get(name)

    def machine(self) -> str:
        """Return the processor family: "x86_64", "aarch64", "arm64"."""
        return platform.machine()

    def host_memory(self) -> tuple[int, int]:
        """Return the machine's available and total bytes, without regard to control groups."""
        import psutil

        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def cpu_busy(self) -> float:
        """Return the busy share of all cores over a tenth of a second, 0 to 1."""
        import psutil

        return psutil.cpu_percent(interval=0.1) / 100

    def torch(self, device_type: str, package: str | None = None) -> TorchView:
        """Import torch, and `package` if it registers the type, and return what they offer.

        Raises: UnusableError when an import or the driver fails.
        """
        try:
            import torch

            if package is not None:
                importlib.import_module(package)
            backend = getattr(torch, device_type, None)
            count = backend.device_count() if backend and backend.is_available() else 0
            devices = tuple(_read_device(backend, index) for index in range(count))
        except Exception as error:  # vendor code may fail in any way, and one reports, not dies
            what = f"package {package!r}" if package else f"torch.{device_type}"
            raise UnusableError(
                f"{what} fails: {type(error).__name__}: {error}",
                device=device_type,
                hint=f"try it alone: python -c 'import {package or 'torch'}'",
            ) from error
        return TorchView(torch.__version__, torch.version.hip, devices)

    def torch_memory(self, device_type: str, index: int) -> tuple[int, int]:
        """Return free and total bytes as the driver tells torch.

        Raises: UnusableError when this torch cannot tell.
        """
        import torch

        backend = getattr(torch, device_type, None)
        read = getattr(backend, "mem_get_info", None) or torch.accelerator.get_memory_info
        try:
            free, total = read(index)
        except Exception as error:  # as above: any vendor code
            device = f"{device_type}:{index}"
            raise UnusableError(
                f"the driver does not tell the memory of {device}: {error}", device=device
            ) from error
        return int(free), int(total)


def _read_device(backend: object, index: int) -> TorchDevice:
    properties = backend.get_device_properties(index)  # type: ignore[attr-defined]
    arch = str(getattr(properties, "gcnArchName", "")).partition(":")[0]
    if not arch and hasattr(properties, "major"):
        arch = f"sm_{properties.major}{properties.minor}"
    can_bf16 = getattr(backend, "is_bf16_supported", None)
    return TorchDevice(
        name=str(backend.get_device_name(index)),  # type: ignore[attr-defined]
        memory_bytes=int(properties.total_memory),
        arch=arch,
        has_bf16=bool(can_bf16()) if can_bf16 else None,
    )
