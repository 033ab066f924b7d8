"""What a machine has: from its signs over torch to devices, and why something is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mxn.chips import registry
from mxn.chips.chip import Chip, Device
from mxn.chips.discovery import choose_best, default_dtype, find_device, survey, utilization
from mxn.chips.probe import TorchDevice
from mxn.chips.testing import GIB, RecordedProbe
from mxn.errors import NotFoundError

GB = 10**9
CPUINFO = {"/proc/cpuinfo": "model name\t: Some CPU\nflags\t\t: avx2 fma sse4_2\n"}
NPUS = (TorchDevice("Ascend910B3", 64 * GB, has_bf16=True),) * 2
QUERY = "index,name,memory.total,memory.used,utilization.gpu"
NVIDIA_SMI = f"nvidia-smi --query-gpu={QUERY} --format=csv,noheader,nounits"


def ascend(said, **settings):
    defaults = {"modules": frozenset({"torch_npu"}), "backends": {"npu": NPUS}}
    return RecordedProbe(
        files=CPUINFO | {"/dev/davinci0": "", "/dev/davinci1": ""},
        tools={"npu-smi info": said("npu-smi.txt")},
        **(defaults | settings),
    )


def test_a_machine_without_accelerators_has_a_cpu_and_imports_no_torch():
    probe = RecordedProbe(files=CPUINFO)
    found = survey(probe)
    assert [(d.id, d.chip, d.name) for d in found.devices] == [("cpu:0", "x86-avx2", "Some CPU")]
    assert not found.broken
    assert not found.unusable
    assert "nvidia-smi" in found.absent["nvidia"]
    assert probe.torch_asked == []


def test_ascend_devices_are_described_with_evidence(said):
    device = survey(ascend(said)).devices[2]
    assert device.id == device.torch_device == "npu:1"
    assert (device.chip, device.vendor, device.collective) == ("ascend-910b3", "ascend", "hccl")
    assert device.native_dtypes == ("float32", "bfloat16", "float16")
    assert "npu-smi lists 2 x 910B3" in device.evidence
    assert "/dev/davinci0 and 1 more" in device.evidence


def test_a_missing_vendor_package_is_said_with_what_lies_idle(said):
    found = survey(ascend(said, modules=frozenset()))
    assert [d.id for d in found.devices] == ["cpu:0"]
    assert "npu-smi lists 2 x 910B3" in found.unusable["ascend"]
    assert "package 'torch_npu' is not installed" in found.unusable["ascend"]


def test_a_vendor_package_that_fails_to_import_is_reported_and_others_go_on(said):
    found = survey(ascend(said, backends={"npu": ImportError("libhccl.so: cannot open")}))
    assert [d.id for d in found.devices] == ["cpu:0"]
    assert "ImportError: libhccl.so: cannot open" in found.unusable["ascend"]
    with pytest.raises(NotFoundError, match=r"this machine has: cpu:0\n.*libhccl"):
        find_device("npu", ascend(said, backends={"npu": ImportError("libhccl.so")}))


def test_a_gpu_that_this_torch_build_cannot_use_is_said(said):
    probe = RecordedProbe(
        files=CPUINFO | {"/dev/nvidia0": ""},
        tools={NVIDIA_SMI: said("nvidia-smi.csv")},
        torch_version="2.13.0+cpu",
    )
    found = survey(probe)
    assert "lists 2 x NVIDIA H200, but torch 2.13.0+cpu sees no 'cuda'" in found.unusable["nvidia"]
    assert "install the CUDA build of torch" in found.unusable["nvidia"]


def test_a_hip_build_without_a_gpu_has_no_device():
    probe = RecordedProbe(files=CPUINFO, tools={"rocm-smi": "{}"}, hip="6.3")
    found = survey(probe)
    assert [d.id for d in found.devices] == ["cpu:0"]
    assert "HIP build and sees no device" in found.absent["amd"]


def test_two_vendors_at_once(said):
    gpus = (TorchDevice("NVIDIA H200", 141 * GB, "sm_90"),)
    probe = ascend(said, backends={"npu": NPUS, "cuda": gpus})
    probe.tools = {**probe.tools, NVIDIA_SMI: said("nvidia-smi.csv")}
    found = survey(probe)
    assert [d.id for d in found.devices] == ["cpu:0", "cuda:0", "npu:0", "npu:1"]
    assert found.devices[1].chip == "nvidia-h200"
    assert find_device("auto", probe).id == "cuda:0"  # 989 TFLOP/s against an assumed 313
    assert find_device("npu:1", probe).chip == "ascend-910b3"


def test_a_device_of_a_maker_nobody_knows_is_listed_as_unknown_with_the_reason():
    gpus = (TorchDevice("Wonder GPU 9", 8 * GB),)
    probe = RecordedProbe(files=CPUINFO | {"/dev/nvidia0": ""}, backends={"cuda": gpus})
    device = survey(probe).devices[1]
    assert (device.vendor, device.chip) == ("unknown", "unknown-wonder-gpu-9")
    assert "nothing says who makes the 'cuda' devices" in device.evidence


def test_a_known_maker_with_an_unknown_model_gets_a_name_made_from_the_drivers():
    gpus = (TorchDevice("NVIDIA GeForce RTX 5090", 32 * GB, "sm_120"),)
    probe = RecordedProbe(files=CPUINFO | {"/dev/nvidia0": ""}, backends={"cuda": gpus})
    device = find_device("cuda", probe)
    assert device.chip == "nvidia-geforce-rtx-5090"
    assert "float8_e4m3fn" in device.native_dtypes


@pytest.mark.parametrize("text", ["npu:0", "cuda:3", "cpu:1", "nonsense", "cpu:x"])
def test_an_unknown_device_is_refused_with_what_there_is(text):
    with pytest.raises(NotFoundError, match=rf"no device '{text}'; this machine has: cpu:0"):
        find_device(text, RecordedProbe(files=CPUINFO))


def test_a_simulated_device_is_never_chosen_unasked():
    cpu = find_device("cpu", RecordedProbe(files=CPUINFO))
    sim = Device("sim:0", "simulated", "simulated", "sim:0", "sim", 64 * GIB)
    assert choose_best([cpu, sim]) == cpu


def test_utilization_follows_the_visible_devices(said):
    gpus = (TorchDevice("NVIDIA H200", 141 * GB, "sm_90"),)
    probe = RecordedProbe(
        files=CPUINFO | {"/dev/nvidia0": ""},
        tools={NVIDIA_SMI: said("nvidia-smi.csv").replace("[N/A]", "80")},
        backends={"cuda": gpus},
        variables={"CUDA_VISIBLE_DEVICES": "1"},
    )
    device = find_device("cuda:0", probe)
    assert utilization(device, probe) == pytest.approx(0.8)
    probe.variables = {"CUDA_VISIBLE_DEVICES": "GPU-8f6d"}
    assert utilization(device, probe) is None


def test_the_default_dtype_is_the_checkpoints_only_where_it_is_native():
    cpu = find_device("cpu", RecordedProbe(files=CPUINFO))
    assert default_dtype(cpu, "torch.bfloat16") == (
        "float32",
        "the checkpoint is bfloat16, which x86-avx2 does not compute natively",
    )
    assert default_dtype(cpu, "float32")[0] == "float32"
    flags = "avx2 fma avx512f avx512bw avx512vl avx512_vnni avx512_bf16"
    files = {"/proc/cpuinfo": f"flags : {flags}\n"}
    assert (
        default_dtype(find_device("cpu", RecordedProbe(files=files)), "bfloat16")[0] == "bfloat16"
    )


class BrokenChip(Chip):
    vendor, title, torch_type, collective = "broken", "Broken", "brk", "gloo"

    def detect(self, probe):
        raise ZeroDivisionError("oops")

    def memory(self, device, probe):
        return 0, 0


def test_a_plug_in_that_fails_is_reported_and_the_others_go_on():
    plugins = [
        registry.Plugin("gone", "gone.plugin:Chip", None, "ModuleNotFoundError: No module 'gone'"),
        registry.Plugin("broken", "x:BrokenChip", BrokenChip()),
        *(p for p in registry.plugins() if p.name == "cpu"),
    ]
    found = survey(RecordedProbe(files=CPUINFO), plugins)
    assert [d.id for d in found.devices] == ["cpu:0"]
    assert found.broken == {
        "gone": "ModuleNotFoundError: No module 'gone'",
        "broken": "detection failed: ZeroDivisionError: oops",
    }


def test_listing_this_machines_devices_loads_no_torch_without_a_reason():
    code = (
        "import sys\n"
        "from mxn.chips import detect, survey, Probe\n"
        "detect()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    if find_device("auto").vendor != "cpu":
        pytest.skip("this machine has an accelerator: torch is needed to describe it")
    assert done.stdout.strip() == "False"
