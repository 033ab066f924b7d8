"""Compile the simulated chip once for each PyTorch, Python and source, and import the result.

Test workers share the cache: the first one builds under a file lock, the others wait for it. Knows
compilers and files; knows nothing of devices.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mxn import env
from mxn.errors import UnsupportedError

TESTED_TORCH = "2.13"  # PrivateUse1 hooks change between minor versions
MODULE_NAME = "mxn_sim"
SOURCE_FOLDER = Path(__file__).parent / "csrc"
CXX_FLAGS = ("-O1",)  # the CPU kernels do the work; -O2 only makes the build slower
_LINES_OF_COMPILER = 10


def load_extension() -> ModuleType:
    """Return the compiled extension, building it when no build of these sources is cached.

    Raises: UnsupportedError when this machine cannot build it or PyTorch is another than tested.
    """
    reason = why_unsupported()
    library = build_folder() / f"{MODULE_NAME}.so"
    if reason and not (library.exists() and has_tested_torch()):
        raise reason
    if not library.exists():
        with _locked(library.parent):
            if not library.exists():
                _build(library)
    return _import(library)


def has_tested_torch() -> bool:
    import torch

    return torch.__version__.startswith(f"{TESTED_TORCH}.")


def why_unsupported() -> UnsupportedError | None:
    """Return why the simulated chip cannot be built here, or None when it can."""
    import torch

    if not has_tested_torch():
        return UnsupportedError(
            f"the simulated chip needs PyTorch {TESTED_TORCH}, this is {torch.__version__}",
            hint=f"pip install 'torch=={TESTED_TORCH}.0'",
        )
    if sys.platform != "linux":
        return UnsupportedError(
            f"the simulated chip is built on Linux only, this is {sys.platform!r}",
            hint="use --device cpu",
        )
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        return UnsupportedError(
            f"the simulated chip is compiled on first use; there is no C++ compiler {compiler!r}",
            hint="install g++ (Debian: apt install g++) or set CXX",
        )
    if not shutil.which("ninja", path=_path_with_scripts()):
        return UnsupportedError(
            "the simulated chip is compiled on first use; there is no 'ninja'",
            hint="pip install ninja",
        )
    return None


def build_folder() -> Path:
    """Return where the build of these sources for this PyTorch and this Python belongs."""
    import torch

    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    root = env.get("MXN_BUILD_DIR")
    parent = Path(root).expanduser() if root else env.home() / "build"
    return parent / f"sim-torch{torch.__version__}-{python}-{source_hash()}"


def source_hash() -> str:
    """Return a short hash over the C++ sources and the flags they are compiled with."""
    digest = hashlib.sha256(" ".join(CXX_FLAGS).encode())
    for path in sorted(SOURCE_FOLDER.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _build(library: Path) -> None:
    """Compile in a process of its own, next to the final place, and move the library there whole.

    The child keeps what a build does to a process (PATH, setuptools, warnings) out of this one, and
    has loaded the library before anybody else may see it.
    """
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as work:
        variables = os.environ | {"PATH": _path_with_scripts()}
        variables.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        done = subprocess.run(
            [sys.executable, "-m", "mxn.chips.sim.build", work],
            env=variables,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise UnsupportedError(
                f"compiling the simulated chip failed:\n{_errors_of(done.stdout + done.stderr)}",
                hint="it needs a C++20 compiler and the headers of Python (Debian: python3-dev)",
            )
        os.replace(Path(work) / f"{MODULE_NAME}.so", library)


def _compile(folder: str) -> None:
    from torch.utils import cpp_extension

    cpp_extension.load(
        MODULE_NAME,
        [str(path) for path in sorted(SOURCE_FOLDER.glob("*.cpp"))],
        extra_cflags=list(CXX_FLAGS),
        build_directory=folder,
    )


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE_NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _path_with_scripts() -> str:
    """Return PATH with the folder of this Python first, where pip puts ninja."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _errors_of(output: str) -> str:
    """Return the first lines with an error in them, or the last lines when none says so."""
    lines = output.strip().splitlines()
    errors = [line for line in lines if " error: " in line]
    return "\n".join(errors[:_LINES_OF_COMPILER] or lines[-_LINES_OF_COMPILER:])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the build lock of `folder`. The system frees it when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    _compile(sys.argv[1])
