"""Training on the simulated chip: a device that torch takes for another maker's.

In a process of its own: autograd counts the devices at its first backward pass, which in a run of
all tests comes before the chip is loaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxn.chips.sim.testing import skip_reason

TESTS = Path(__file__).parents[2]
SCRIPT = """
import tempfile
from pathlib import Path
from mxn.chips.sim import device
device.load()
from mxn.train.run.data import MicroBatch
from mxn.train.run.weights import ModelSource
from support import tiny
from support.training import gradients, random_ids, relative, whole_stage
for case in ("llama3", "gemma2", "deepseek_v3", "mixtral"):
    with tempfile.TemporaryDirectory() as folder:
        tiny.write(case, Path(folder))
        source = ModelSource.open(folder, seq_tokens=32)
        batch = MicroBatch.of_rows(random_ids(2, 29))
        here = whole_stage(source)
        there = whole_stage(source, device="sim:0", recompute="full")
        loss, other = here(None, batch), there(None, batch.to("sim:0"))
        loss.backward()
        other.backward()
        assert abs(other.item() / loss.item() - 1) < 1e-6, case
        want, got = gradients([here]), gradients([there])
        assert want.keys() == got.keys()
        worst = max(relative(got[name].cpu(), want[name]) for name in want)
        assert worst < 2e-5, (case, worst)
        print(case)
"""


@pytest.mark.sim
def test_the_simulated_chip_trains_as_the_processor_does():
    reason = skip_reason()
    if reason:
        pytest.skip(reason)
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["llama3", "gemma2", "deepseek_v3", "mixtral"]
