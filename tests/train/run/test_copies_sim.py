"""What goes between a device and the host is there before it is used or dropped.

On the simulated chip, whose copies are done at once: so it is counted who waits. In a process of
its own, see test_net_sim.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mxn.chips.sim.testing import skip_reason

SAVE = """
import sys
from pathlib import Path
from mxn.chips.sim import device
device.load()
import torch
from mxn.train.run.checkpoint import Checkpointer, Position
from mxn.train.run.checkpoint.writer import Identity

waited = []
torch.accelerator.synchronize = waited.append
identity = Identity(job="j", plan="p", plan_json="{}", num_layers=1, num_ranks=1, launch=1)
writer = Checkpointer(Path(sys.argv[1]), rank=0, identity=identity, keep=1)
w = torch.arange(6.0, device=sys.argv[2])
for step in (1, 2):
    writer.save(Position(step=step, micro_batch=0), {0: {"w": w}}, {"seed": torch.ones(1)})
    writer._join()
kept = {name: buffer.is_pinned() for (_, name), buffer in writer._buffers.items()}
print(*map(str, waited), kept)
"""

BATCH = """
import sys
from mxn.chips.sim import device
device.load()
import torch
from mxn.train.run.data import MicroBatch

real, told = torch.Tensor.to, []

def to(tensor, *args, non_blocking=False, **options):
    told.append(non_blocking)
    return real(tensor, *args, non_blocking=non_blocking, **options)

torch.Tensor.to = to
there = MicroBatch.of_rows(torch.arange(8).view(2, 4)).to("sim:0")
print(there.ids.device, told)
"""


def _run(script: str, *arguments: str) -> str:
    if reason := skip_reason():
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.sim
@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("sim:0", "sim:0 sim:0 {'w': True, 'seed': False}"),
        ("cpu", "{'w': False, 'seed': False}"),
    ],
)
def test_a_checkpoint_waits_for_its_copies_from_any_device(tmp_path, device, told):
    assert _run(SAVE, str(tmp_path), device) == told


@pytest.mark.sim
def test_a_batch_is_on_its_device_before_the_hosts_is_dropped():
    assert _run(BATCH) == "sim:0 [False, False, False, False]"
