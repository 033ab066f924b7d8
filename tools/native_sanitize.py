"""Build the native kernels with AddressSanitizer and UBSan, and run their tests on that build.

    python tools/native_sanitize.py [pytest arguments]

Needs g++ with its sanitizers, cmake, ninja and nanobind. Leaves the installed extension alone: the
build lies in a temporary folder (or in MXN_SANITIZE_DIR, to build only what changed) and is put in
its place inside the test process. Odd shapes are in the tests; what is read or written beside them,
and what overflows, shows here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "src/mxn/kernels/csrc"
TESTS = [f"tests/parity/test_native_{name}.py" for name in ("kernels", "attention", "recompute")]
TESTS += ["tests/unit/kernels/test_native_pack.py"]
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
    " -fno-omit-frame-pointer -g1"
)
RUN = """
import importlib.util, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.path.insert(0, {source!r})
import mxn.kernels
assert mxn.kernels.__file__.startswith({source!r}), mxn.kernels.__file__
spec = importlib.util.spec_from_file_location("mxn.kernels._C", {extension!r})
sys.modules["mxn.kernels._C"] = mxn.kernels._C = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
sys.exit(pytest.main({arguments!r}))
"""


def build(directory: Path) -> Path:
    """Return the path of the extension with sanitizers."""
    configure = ["cmake", "-S", CSRC, "-B", directory, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (configure, ["ninja", "-C", directory]):
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path}
        )
    return next(directory.glob("_C*.so"))


def run(extension: Path, arguments: list[str]) -> int:
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    env = {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # the interpreter keeps what it has
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    code = RUN.format(source=str(ROOT / "src"), extension=str(extension), arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        extension = build(Path(os.environ.get("MXN_SANITIZE_DIR", temporary)))
        return run(extension, sys.argv[1:] or ["-q", "-p", "no:randomly", "-x", *TESTS])


if __name__ == "__main__":
    sys.exit(main())
