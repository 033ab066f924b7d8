"""Who takes part: the environment, runner and formats of each engine, and how its files are made.

A contender is written ENGINE:FORMAT, such as openvino:int4. Knows no measurements. Start at `find`.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from protocol import Failed, Peer
from setup_peers import llama_env, llama_source

HERE = Path(__file__).parent
FORMATS = {
    "mxn": ("plain", "bf16", "f32", "int8", "int4", "int4-g128"),
    "openvino": ("int8", "int4"),
    "llama.cpp": ("q4_0", "q8_0", "q4_k_m", "bf16"),
    "vllm": ("bf16",),
    "transformers": ("bf16", "f32", "rounded-8", "rounded-4"),
}
DEFAULT = (
    "mxn:int4-g128", "mxn:int8", "mxn:bf16", "openvino:int8", "openvino:int4", "llama.cpp:q4_0",
    "llama.cpp:q8_0", "vllm:bf16", "transformers:bf16",
)  # fmt: skip

_OPENVINO_EXPORT = {
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--ratio", "1.0"),
}


@dataclass(frozen=True, slots=True)
class Contender:
    engine: str
    weights: str

    @property
    def name(self) -> str:
        return f"{self.engine}:{self.weights}"

    @property
    def is_ours(self) -> bool:
        return self.engine == "mxn"

    @property
    def kv_bytes(self) -> int:
        """Bytes of one value of the key-value cache with the settings used here."""
        weights, _, cache = self.weights.partition("/")
        if self.engine == "openvino" or cache == "int8":
            return 1
        return 1 if self.is_ours and weights.startswith("int") and not cache else 2


def find(name: str) -> Contender:
    """Return a contender by its name. Raises: SystemExit with the choices."""
    engine, _, weights = name.partition(":")
    # The formats of mxn are checked by mxn itself: WEIGHTS or WEIGHTS/CACHE.
    if not weights or (engine != "mxn" and weights not in FORMATS.get(engine, ())):
        known = [f"{one}:{each}" for one, formats in FORMATS.items() for each in formats]
        raise SystemExit(f"no contender {name!r}; there are {', '.join(known)}")
    return Contender(engine, weights)


def built(contender: Contender, model: Path, peers: Path) -> Path:
    """Return the file or folder this engine loads, made at the first call.

    Raises: Failed with what the engine's own converter said.
    """
    folder = peers / "built"
    folder.mkdir(parents=True, exist_ok=True)
    if contender.engine == "openvino":
        out = folder / f"{model.name}-ov-{contender.weights}"
        if not (out / "openvino_config.json").is_file():
            _run(
                peers / "openvino/bin/optimum-cli", "export", "openvino", "-m", model, "--task",
                "text-generation-with-past", *_OPENVINO_EXPORT[contender.weights],
                *(("--group-size", _group(model)) if contender.weights == "int4" else ()), out,
            )  # fmt: skip
        return out
    if contender.engine == "llama.cpp":
        out = folder / f"{model.name}-{contender.weights}.gguf"
        if not out.is_file():
            _run(
                peers / "llama/bin/python", HERE / "peers/llama_convert.py",
                llama_source(peers) / "vendor/llama.cpp", model, out, contender.weights,
                env=llama_env(peers),
            )  # fmt: skip
        return out
    if contender.is_ours:
        _compile_sources()
    if contender.is_ours and contender.weights != "plain":
        return _packed(contender, model, folder)
    return model


def _compile_sources() -> None:
    """Compile mxn to bytecode as pip does for the peers: a source tree may have none of it."""
    import mxn

    if not compileall.compile_dir(str(Path(mxn.__file__).parent), quiet=1):
        raise Failed("mxn's sources do not compile")


def _packed(contender: Contender, model: Path, folder: Path) -> Path:
    """Return an artifact of mxn, as its users would make with `mxn pack`."""
    from mxn.errors import MxnError
    from mxn.kernels.native import formats
    from mxn.models.load import pack_model
    from mxn.models.native.artifact import LAYOUT

    weights, _, cache = contender.weights.partition("/")
    format = formats.parse(weights, cache or "auto")
    named = f"{format.weights}-head-{format.head}-kv-{format.cache}-layout{LAYOUT}"
    out = folder / f"{model.name}-mxn-{named}"  # what a name means may change
    if not out.is_dir():
        try:
            pack_model(model, format, out)
        except MxnError as error:
            raise Failed(f"mxn pack: {error}") from error
    return out


def _group(model: Path) -> str:
    """Return 128, or the widest group below it that fits a small model's rows."""
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    return next(str(group) for group in (128, 64, 32) if hidden % group == 0)


def peer(
    contender: Contender, peers: Path, threads: int, log: Path | None, limit_s: float = 600.0
) -> Peer:
    """Return the process of a contender, not started yet; a request may take `limit_s`."""
    name, folder, env = {
        "mxn": ("mxn_.py", None, {"OMP_NUM_THREADS": str(threads)}),
        "transformers": ("transformers_.py", None, {"OMP_NUM_THREADS": str(threads)}),
        "openvino": ("openvino_genai_.py", "openvino", {}),
        "llama.cpp": ("llama_cpp_.py", "llama", llama_env(peers)),
        "vllm": ("vllm_.py", "vllm", {"OMP_NUM_THREADS": str(threads)}),
    }[contender.engine]
    python = peers / folder / "bin/python" if folder else Path(sys.executable)
    script = HERE / "peers" / name
    return Peer(
        name=contender.name, python=python, script=script, env=env, log=log, limit_s=limit_s
    )


def _run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a converter. Raises: Failed with the last thing it said."""
    print("+", *command, file=sys.stderr)
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
    )  # fmt: skip
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise Failed(f"{Path(command[0]).name} returned {done.returncode}: {reason(done.stderr)}")


def reason(log: str) -> str:
    """Return the line of a log that says why: the last one that names an error, or the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|ERROR", line)]
    return (named or lines or ["it said nothing"])[-1][:500]
