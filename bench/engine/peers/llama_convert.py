"""A Hugging Face checkpoint as GGUF, with llama.cpp's own converter and quantizer.

    llama/bin/python bench/engine/peers/llama_convert.py SOURCE MODEL OUT q4_0

SOURCE is llama.cpp's source folder. One thing is changed: the converter knows pre-tokenizers by a
hash of known tokenizers, and ours is none of them, so it is told "gpt-2" (byte-level BPE).
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

# llama.h: LLAMA_FTYPE_*
KINDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k_m": 15, "bf16": 32}


def convert(source: Path, model: Path, out: Path) -> None:
    """Write a bf16 GGUF with the converter of `source`."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert", str(model), "--outfile", str(out), "--outtype", "bf16"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


def quantize(source: Path, out: Path, kind: str, threads: int) -> None:
    """Quantize with `llama_model_quantize` and its default settings."""
    import ctypes

    from llama_cpp import llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = KINDS[kind], threads
    code = llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"llama_model_quantize returned {code}")


def main() -> None:
    source, model, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    full = out.parent / f"{model.name}-bf16.gguf"
    if not full.is_file():
        partial = full.with_suffix(".partial")
        convert(source, model, partial)
        partial.rename(full)
    if kind != "bf16":
        partial = out.with_suffix(".partial")
        quantize(full, partial, kind, 2)
        partial.rename(out)


if __name__ == "__main__":
    main()
