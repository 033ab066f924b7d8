"""The processor: its instruction set level, what it computes natively, what memory it may use."""

from __future__ import annotations

import pytest

from mxn.chips import host_memory
from mxn.chips.testing import GIB, RecordedProbe
from mxn.chips.vendors.cpu import CpuChip, classify, read_flags

AVX512 = "avx2 fma avx512f avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "chip", "dtypes"),
    [
        ("sse4_2", "x86-generic", ("float32",)),
        ("avx2", "x86-generic", ("float32",)),
        ("avx2 fma", "x86-avx2", ("float32",)),
        ("avx2 fma avx_vnni", "x86-avx2", ("float32", "int8")),
        (AVX512, "x86-avx512", ("float32",)),
        (f"{AVX512} avx512_vnni", "x86-avx512-vnni", ("float32", "int8")),
        (f"{AVX512} avx512_vnni avx512_bf16", "x86-avx512-bf16", ("float32", "bfloat16", "int8")),
        (
            f"{AVX512} avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16",
            "x86-amx",
            ("float32", "bfloat16", "float16", "int8"),
        ),
    ],
)
def test_an_x86_processor_is_named_after_its_level(flags, chip, dtypes):
    assert classify("x86_64", frozenset(flags.split()))[::2] == (chip, dtypes)


def test_an_arm_processor():
    chip, isa, dtypes = classify("aarch64", frozenset(["asimd", "asimdhp", "bf16", "fp"]))
    assert (chip, isa) == ("arm64-neon", ("asimd", "asimdhp", "bf16"))
    assert dtypes == ("float32", "bfloat16", "float16")


def test_only_flags_of_all_cores_count():
    assert read_flags("flags : avx2 fma amx_tile\nflags : avx2 fma\n") == {"avx2", "fma"}
    assert read_flags("Features : asimd bf16\n") == {"asimd", "bf16"}


def test_a_machine_without_cpuinfo_is_generic_and_says_so():
    device = CpuChip().detect(RecordedProbe())[0]
    assert device.chip == "x86-generic"
    assert "no /proc/cpuinfo: instruction set extensions unknown" in device.evidence


V2 = {
    "/proc/self/cgroup": "0::/user/job\n",
    "/sys/fs/cgroup/user/job/memory.max": "max\n",
    "/sys/fs/cgroup/user/memory.max": f"{4 * GIB}\n",
    "/sys/fs/cgroup/user/memory.current": f"{3 * GIB}\n",
    "/sys/fs/cgroup/user/memory.stat": f"anon 5\ninactive_file {1 * GIB}\n",
}
V1 = {
    "/proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
    # the path is the host's; inside the container only the mount point exists
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}",
    "/sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {1 * GIB}\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["v2-parent", "v1-container"])
def test_a_control_group_limits_memory_and_its_cache_counts_as_free(files):
    assert host_memory.read(RecordedProbe(files=files)) == (2 * GIB, 4 * GIB)


def test_a_limit_above_the_machine_changes_nothing():
    files = {
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": f"{64 * GIB}",
        "/sys/fs/cgroup/memory.current": "0",
    }
    assert host_memory.read(RecordedProbe(files=files)) == (12 * GIB, 16 * GIB)


def test_a_full_group_has_nothing_free_even_where_the_machine_has():
    files = V2 | {"/sys/fs/cgroup/user/memory.current": f"{6 * GIB}"}
    assert host_memory.read(RecordedProbe(files=files))[0] == 0
