"""Whether the devices of a dropped group compute again: a process beside the job that tries.

    python -m mxn.train.run.probe sim:0 sim:1

Ends with 0 when a product on each device is right. Start at `start_probe`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from mxn.train.run import child
from mxn.train.run.job import Job

_LONGEST_S = 120.0
_SIZE = 64


class DeviceProbe:
    """One try. `answer` is None while it runs."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._until_s = time.monotonic() + _LONGEST_S
        self._process = subprocess.Popen(
            child.command("mxn.train.run.probe", *devices),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def answer(self) -> bool | None:
        code = self._process.poll()
        if code is None and time.monotonic() > self._until_s:
            self._process.kill()
            return self._process.wait() == 0
        return None if code is None else code == 0


def start_probe(job: Job, group: str) -> DeviceProbe:
    """Try all devices of a group: one that is gone would fail the plan that they are all in."""
    from mxn.train.run.launch import device_of

    names = [device_of(job, group, number) for number in range(job.group(group).count)]
    return DeviceProbe(list(dict.fromkeys(names)))  # ranks on the processor share its name


def computes(device_name: str) -> bool:
    """Return whether a product on a device is that of the CPU. Raises: what the device raises."""
    import torch

    from mxn.chips import find_device

    device = torch.device(find_device(device_name).torch_device)
    x = torch.arange(float(_SIZE * _SIZE)).reshape(_SIZE, _SIZE) / _SIZE**2
    return torch.allclose((x.to(device) @ x.to(device)).cpu(), x @ x, rtol=1e-3)


if __name__ == "__main__":
    sys.exit(0 if all(map(computes, sys.argv[1:])) else 1)
