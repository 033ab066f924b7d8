"""What the compiler made of the native kernels: each variant keeps to its own instructions.

Reads the disassembly. An inline function that two variants share would be kept once, with the
instructions of either, and end the process on an older processor: so whatever lies outside of a
variant's namespace must use none of them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from mxn.kernels.native import library, missing_reason

pytestmark = pytest.mark.skipif(missing_reason() is not None, reason=str(missing_reason()))

VARIANT = re.compile(r"mxn::(?:kernels_)?(amx|avx512vnni|avx512|avx2|generic)\b")
HEADER = re.compile(r"^[0-9a-f]+ <(.+)>:$")
# Names of what only AVX and later have; an instruction with VEX or EVEX encoding begins with a v.
WIDE = {"ymm": re.compile(r"%ymm"), "zmm": re.compile(r"%zmm"), "vnni": re.compile(r"\bvpdpbusd"),
        "tiles": re.compile(r"\btdpbsud")}  # fmt: skip
ENCODED = re.compile(r"\tv(?!er[rw]\b)[a-z0-9]+\s.*%[xyz]mm")
KERNELS = ("gemm(", "gemm_glu(", "attend(", "cache_write(", "quantize(", "rms_norm(", "pack_block(")


@dataclass
class Function:
    name: str
    variant: str | None
    uses: set[str]


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    """Every function of the extension with what it uses."""
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("no objdump")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the variants are those of x86")
    path = library().__file__
    done = subprocess.run(
        [tool, "-d", "-C", "--no-show-raw-insn", path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: list[Function] = []
    for line in done.stdout.splitlines():
        header = HEADER.match(line)
        if header:
            variant = VARIANT.search(header[1])
            found.append(Function(header[1], variant[1] if variant else None, set()))
        elif found and "\t" in line:
            found[-1].uses |= {name for name, pattern in WIDE.items() if pattern.search(line)}
            if ENCODED.search(line):
                found[-1].uses.add("vex")
    if not any(f.variant for f in found):
        pytest.skip("the extension carries no symbols")
    return found


def used(functions: list[Function], variant: str | None) -> dict[str, set[str]]:
    return {f.name: f.uses for f in functions if f.variant == variant}


def test_every_variant_has_every_kernel(functions):
    for name, _ in library().variants():
        names = " ".join(used(functions, name))
        assert not [k for k in KERNELS if f"mxn::{name}::{k}" not in names]


def test_only_amx_uses_tiles_and_it_does(functions):
    for variant in ("avx512vnni", "avx512", "avx2", "generic", None):
        assert [n for n, uses in used(functions, variant).items() if "tiles" in uses] == []
    assert any("tiles" in uses for uses in used(functions, "amx").values())


def test_only_variants_with_vnni_multiply_with_vpdpbusd_and_they_do(functions):
    for variant in ("avx512", "avx2", "generic", None):
        assert [n for n, uses in used(functions, variant).items() if "vnni" in uses] == []
    for variant in ("avx512vnni", "amx"):
        vnni = [n for n, uses in used(functions, variant).items() if "vnni" in uses]
        assert any("tile<" in name for name in vnni), "products"
        assert any("score_i8" in name or "attend(" in name for name in vnni), "scores"


def test_registers_are_as_wide_as_the_variant_and_no_wider(functions):
    assert [n for n, uses in used(functions, "generic").items() if uses] == []
    avx2 = used(functions, "avx2").values()
    assert all("zmm" not in uses for uses in avx2)
    assert any("ymm" in uses for uses in avx2)
    for variant in ("avx512", "avx512vnni"):
        assert any("zmm" in uses for uses in used(functions, variant).values())


def test_nothing_outside_of_the_variants_needs_their_instructions(functions):
    assert [n for n, uses in used(functions, None).items() if uses] == []


def test_variants_share_no_function():
    """A weak symbol defined by several variants would be linked once, for all of them."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm")
    done = subprocess.run(
        [tool, "-C", library().__file__], capture_output=True, text=True, timeout=60
    )
    weak = [line for line in done.stdout.splitlines() if re.search(r" [WVu] ", line)]
    assert weak, "nm reads no symbols"
    for line in weak:
        variant = VARIANT.search(line)
        assert variant is None or line.split(" ", 2)[2].find(f"mxn::{variant[1]}::") >= 0, line


def run(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MXN_ISA": isa}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


def test_the_environment_picks_the_variant():
    code = "from mxn.kernels.native import library; print(library().variant())"
    usable = [name for name, is_usable in library().variants() if is_usable]
    for name, is_usable in library().variants():
        done = run(name, code)
        if is_usable:
            assert done.stdout.strip() == name, done.stderr
        else:
            assert done.returncode != 0
    assert run("auto", code).stdout.strip() == usable[0]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "neon", " avx2", ""])
def test_an_impossible_variant_is_refused_with_the_usable_ones(isa):
    code = """
from mxn.errors import ConfigError
from mxn.kernels.native import library
try:
    print(library().variant())
except ConfigError as error:
    print("refused:", error)
"""
    done = run(isa, code)
    usable = [name for name, is_usable in library().variants() if is_usable]
    assert done.returncode == 0, done.stderr
    if isa == "":  # set to nothing is not set
        assert done.stdout.strip() == usable[0]
        return
    assert done.stdout.startswith("refused:")
    assert repr(isa)[1:-1] in done.stdout
    assert all(name in done.stdout for name in usable)


def test_use_variant_refuses_and_keeps_the_one_in_use():
    before = library().variant()
    with pytest.raises(ValueError, match=r"usable: .*generic"):
        library().use_variant("avx9")
    assert library().variant() == before
