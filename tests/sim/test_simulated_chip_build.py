"""Where the simulated chip comes from, where it cannot be built, and its collectives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mxn.errors import ConfigError, UnsupportedError

TWO_RANKS = """
import sys, torch, torch.distributed as dist
from mxn.chips.sim import device
device.load()
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("simccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
here = torch.device("sim", rank)
x = torch.full((3,), rank + 1.0, device=here)
dist.all_reduce(x)
assert x.device == here and x.tolist() == [3, 3, 3], x
parts = [torch.zeros(1, device=here) for _ in range(2)]
dist.all_gather(parts, torch.full((1,), float(rank), device=here))
assert [p.item() for p in parts] == [0, 1], parts
y = torch.full((2,), 5.0 if rank == 0 else 0.0, device=here)
dist.broadcast(y, 0)
assert y.tolist() == [5, 5], y
halves = torch.zeros(2, device=here)
dist.reduce_scatter_tensor(halves, torch.arange(4.0, device=here))
assert halves.tolist() == [[0, 2], [4, 6]][rank], halves
if rank == 0:
    dist.send(torch.tensor([7.0], device=here), 1)
else:
    got = torch.zeros(1, device=here)
    dist.recv(got, 0)
    assert got.item() == 7
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1, bias=False).to(here))
net(torch.full((1, 2), rank + 1.0, device=here)).sum().backward()
assert net.module.weight.grad.tolist() == [[1.5, 1.5]], net.module.weight.grad
try:
    dist.all_reduce(torch.ones(1), group=dist.group.WORLD)
    raise SystemExit("host tensors must be refused")
except RuntimeError:
    pass
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def torch_version(monkeypatch):
    import torch

    return lambda version: monkeypatch.setattr(torch, "__version__", version)


def test_another_torch_than_tested_is_refused_with_a_hint(torch_version):
    from mxn.chips.sim import build

    torch_version("2.99.0+cpu")
    with pytest.raises(UnsupportedError, match=r"needs PyTorch 2\.13, this is 2\.99") as caught:
        build.load_extension()
    assert "pip install" in caught.value.hint


def test_no_compiler_is_refused_with_a_hint(monkeypatch, tmp_path):
    from mxn.chips.sim import build

    monkeypatch.setenv("MXN_BUILD_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnsupportedError, match="no C\\+\\+ compiler 'no-such-compiler'") as caught:
        build.load_extension()
    assert "install g++" in caught.value.hint


def test_no_ninja_is_refused_with_a_hint(monkeypatch, tmp_path):
    from mxn.chips.sim import build

    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_path_with_scripts", lambda: str(tmp_path))
    assert "pip install ninja" in str(build.why_unsupported())


@pytest.mark.sim
def test_a_failed_compilation_says_what_the_compiler_said(sim, monkeypatch, tmp_path):
    from mxn.chips.sim import build

    compiler = tmp_path / "broken-c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$1" in -v|--version|-dumpfullversion) exec c++ "$@";; esac\n'
        "echo 'sim.h:1:1: error: no such thing' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MXN_BUILD_DIR", str(tmp_path))
    with pytest.raises(UnsupportedError, match="error: no such thing"):
        build.load_extension()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.sim
def test_the_build_is_cached_and_loading_twice_is_loading_once(sim):
    from mxn.chips.sim import build, device

    assert device.load() is device.load()
    assert (build.build_folder() / "mxn_sim.so").exists()


def test_changed_sources_make_another_build(monkeypatch, tmp_path):
    from mxn.chips.sim import build

    before = build.source_hash()
    for path in build.SOURCE_FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path)
    assert build.source_hash() == before
    (tmp_path / "sim.h").write_text("// changed")
    assert build.source_hash() != before


@pytest.mark.parametrize(
    ("name", "value"),
    [("MXN_SIM_DEVICES", "0"), ("MXN_SIM_DEVICES", "65"), ("MXN_SIM_MEMORY", "much")],
)
def test_impossible_sizes_are_refused(monkeypatch, name, value):
    from mxn.chips.sim import device

    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        device.configured_size()


@pytest.mark.parametrize("name", ["MXN_SIM_LAUNCH_US", "MXN_SIM_FAIL_AFTER"])
@pytest.mark.parametrize("value", ["-1", "often"])
def test_impossible_faults_are_refused(monkeypatch, name, value):
    from mxn.chips.sim import device

    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        device._read_faults()


def _python(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.sim
def test_the_environment_sets_the_chip_up(sim):
    code = """
import torch
from mxn.chips.sim import device, knobs
device.load()
print(torch.accelerator.device_count(), knobs.current().memory_bytes, knobs.current().launch_us)
x = torch.empty(1, device="sim")
x.fill_(1)
try:
    x.fill_(2)
except RuntimeError as error:
    print(type(error).__name__)
"""
    process = _python(
        code,
        MXN_SIM_DEVICES="3", MXN_SIM_MEMORY="5MiB", MXN_SIM_LAUNCH_US="2.5", MXN_SIM_FAIL_AFTER="2",
    )  # fmt: skip
    output, _ = process.communicate(timeout=60)
    assert output.splitlines() == [f"3 {5 * 2**20} 2.5", "AcceleratorError"]


@pytest.mark.sim
def test_collectives_work_on_device_memory(sim):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [_python(TWO_RANKS, str(rank), port) for rank in range(2)]
    for rank in ranks:
        output, _ = rank.communicate(timeout=90)
        assert rank.returncode == 0, output


@pytest.mark.sim
def test_a_process_may_end_right_after_a_backward_pass(sim):
    """torch's device threads still held Python objects then, and the process aborted at exit."""
    code = """
import torch
from mxn.chips.sim import device
device.load()
net = torch.nn.Linear(2, 1).to("sim")
net(torch.ones(1, 2, device="sim")).sum().backward()
"""
    processes = [_python(code) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
