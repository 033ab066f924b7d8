"""A probe that answers from records, for tests of detection, ours and those of other plug-ins."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mxn.chips.chip import UnusableError
from mxn.chips.probe import TOOL_TIMEOUT_S, Answer, Probe, TorchDevice, TorchView

GIB = 2**30


@dataclass
class RecordedProbe(Probe):
    """A machine that is only records. What is not recorded does not exist.

    `tools` maps a tool, or a tool with its arguments, to what it prints: text, or an `Answer`.
    `backends` maps a device type to its devices, or to an exception that importing it raises.
    Asking for torch is counted in `torch_asked`: detection must not without a reason.
    """

    tools: Mapping[str, str | Answer] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    versions: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, tuple[TorchDevice, ...] | Exception] = field(default_factory=dict)
    torch_version: str = "2.13.0"
    hip: str | None = None
    family: str = "x86_64"
    host: tuple[int, int] = (12 * GIB, 16 * GIB)
    torch_asked: list[str] = field(default_factory=list)

    def which(self, tool: str) -> str | None:
        has = any(name == tool or name.startswith(f"{tool} ") for name in self.tools)
        return f"/usr/bin/{tool}" if has else None

    def run(self, *command: str, timeout_s: float = TOOL_TIMEOUT_S) -> Answer | None:
        if self.which(command[0]) is None:
            return None
        said = self.tools.get(" ".join(command), self.tools.get(command[0]))
        if said is None:
            return Answer(2, "", f"{command[0]}: unknown arguments {command[1:]}")
        return Answer(0, said) if isinstance(said, str) else said

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def glob(self, pattern: str) -> list[str]:
        return sorted(fnmatch.filter(self.files, pattern))

    def has_module(self, name: str) -> bool:
        return name in self.modules

    def version_of(self, distribution: str) -> str | None:
        return self.versions.get(distribution)

    def environ(self, name: str) -> str | None:
        return self.variables.get(name)

    def machine(self) -> str:
        return self.family

    def host_memory(self) -> tuple[int, int]:
        return self.host

    def cpu_busy(self) -> float:
        return 0.25

    def torch(self, device_type: str, package: str | None = None) -> TorchView:
        self.torch_asked.append(device_type)
        devices: Any = self.backends.get(device_type, ())
        if isinstance(devices, Exception):
            raise UnusableError(
                f"package {package!r} fails: {type(devices).__name__}: {devices}",
                device=device_type,
            ) from devices
        return TorchView(self.torch_version, self.hip, devices)

    def torch_memory(self, device_type: str, index: int) -> tuple[int, int]:
        devices: Any = self.backends[device_type]
        total = devices[index].memory_bytes
        return total // 2, total
