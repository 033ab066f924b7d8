"""Writes tests/parity/golden/quantized/: packed weights made by other projects' own code.

Run in an environment of its own (mxn is not needed): `pip install torch==2.13.0 transformers
compressed-tensors gguf`. For GPTQ and AWQ name the folders of their sources, which are read and
never copied: `--autogptq DIR` (github.com/AutoGPTQ/AutoGPTQ) and `--autoawq DIR`
(github.com/casper-hansen/AutoAWQ). Each file says in its metadata what made it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parents[1] / "tests" / "parity" / "golden" / "quantized"


def save(name: str, tensors: dict[str, torch.Tensor], origin: str) -> None:
    """Write one file; `origin` tells which code made the numbers."""
    OUT.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, OUT / f"{name}.safetensors", metadata={"origin": origin})
    print(f"{name}: {origin}")


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


# name, bytes of a block, where its half floats are
RANDOM_BLOCKS = (
    ("Q4_K", 144, (0, 2)), ("Q5_K", 176, (0, 2)), ("Q6_K", 210, (208,)), ("Q2_K", 84, (80, 82)),
    ("Q3_K", 110, (108,)), ("IQ4_NL", 18, (0,)), ("IQ4_XS", 136, (0,)),
)  # fmt: skip


def make_gguf_blocks() -> None:
    """ggml's block types. The K types are random bytes: the package only takes those apart."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    rng = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        weight = rng.normal(size=(5, 96)).astype(np.float32)
        out[f"{name}.raw"] = quants.quantize(weight, GGMLQuantizationType[name])
    for name, size, halves in RANDOM_BLOCKS:
        blocks = rng.integers(0, 256, size=(6, size), dtype=np.uint8)
        for start in halves:
            scale = rng.normal(scale=0.01, size=6).astype(np.float16)
            blocks[:, start : start + 2] = scale.view(np.uint8).reshape(-1, 2)
        if name in ("Q4_K", "Q5_K"):  # one sub-block without a scale: it is constant
            blocks[0, 4] &= 0xC0
        out[f"{name}.raw"] = blocks.reshape(3, 2 * size)
    for key in list(out):
        name = key.removesuffix(".raw")
        out[f"{name}.want"] = quants.dequantize(out[key], GGMLQuantizationType[name])
    tensors = {key: torch.from_numpy(value.copy()) for key, value in out.items()}
    save("gguf_blocks", tensors, f"{version('gguf')}: gguf.quants")


# name, bits, symmetric, strategy, group, in_features, layout
COMPRESSED = (
    ("w8a8", 8, True, "channel", None, 40, "int-quantized"),
    ("w8a8-asym", 8, False, "channel", None, 40, "int-quantized"),
    ("w8-tensor", 8, True, "tensor", None, 40, "int-quantized"),
    ("w4a16", 4, True, "group", 32, 96, "pack-quantized"),
    ("w4a16-asym", 4, False, "group", 32, 96, "pack-quantized"),
    ("w4a16-odd", 4, False, "channel", None, 37, "pack-quantized"),
    ("w4a16-actorder", 4, True, "group", 32, 96, "pack-quantized"),
    ("w8a16", 8, False, "group", 32, 64, "pack-quantized"),
)


def make_compressed() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    out: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, bits, symmetric, strategy, group, width, layout in COMPRESSED:
        weight = torch.randn(20, width, generator=generator) + (0.0 if symmetric else 0.3)
        args = QuantizationArgs(
            num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group, type="int"
        )
        index = torch.arange(width) // (group or width)
        if "actorder" in name:
            index = index[torch.randperm(width, generator=generator)]
        scale, zero = _scales(weight, index, args, calculate_qparams)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
        compressor = BaseCompressor.get_value_from_registry(layout)
        if "actorder" in name:  # the package's functions take columns already in order
            order = index.argsort(stable=True)
            packed = compressor.compress(state | {"weight": weight[:, order]}, scheme)
            want = torch.empty_like(weight)
            want[:, order] = compressor.decompress(dict(packed), scheme)["weight"]
            # A checkpoint stores the columns in the model's order, beside their groups.
            packed = _in_model_order(packed, order) | {"weight_g_idx": index.int()}
        else:
            packed = compressor.compress(state, scheme)
            want = compressor.decompress(dict(packed), scheme)["weight"]
        out |= {f"{name}.{key}": value for key, value in packed.items() if value is not None}
        out[f"{name}.want"] = want.float()
    save("compressed_tensors", out, version("compressed-tensors"))


def _scales(weight: Any, index: Any, args: Any, calculate: Any) -> tuple[Any, Any]:
    if args.strategy == "tensor":
        return calculate(weight.min().view(1), weight.max().view(1), args)
    parts = [weight[:, index == i] for i in range(int(index.max()) + 1)]
    low, high = (torch.stack([getattr(p, f)(dim=1)[0] for p in parts], 1) for f in ("min", "max"))
    return calculate(low, high, args)


def _in_model_order(packed: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    stored = unpack_from_int32(packed["weight_packed"], 4, torch.Size(packed["weight_shape"]))
    values = torch.empty_like(stored)
    values[:, order] = stored
    return packed | {"weight_packed": pack_to_int32(values.contiguous(), 4)}


def _load(path: Path, name: str) -> Any:
    """Import one file of a project without its package, whose other imports are not needed."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# name, bits, group, symmetric, act-order
GPTQ = (
    ("sym-g32", 4, 32, True, False),
    ("asym-g32", 4, 32, False, False),
    ("asym-g64", 4, 64, False, False),
    ("asym-g128", 4, 128, False, False),
    ("asym-channel", 4, -1, False, False),
    ("actorder-g32", 4, 32, False, True),
    ("asym-8bit", 8, 32, False, False),
    ("zero16-g32", 4, 32, False, False),
)


def _affine(weight: Any, index: Any, bits: int, symmetric: bool) -> tuple[Any, Any]:
    """Round-to-nearest scales and zeros [out, groups]; zeros from 1 on, as version 1 needs."""
    top = 2**bits - 1
    scales, zeros = [], []
    for i in range(int(index.max()) + 1):
        part = weight[:, index == i]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = (high - low) / top
        zero = torch.full_like(scale, (top + 1) / 2) if symmetric else (-low / scale).round()
        scales.append(scale)
        zeros.append(zero.clamp(1, top))
    return torch.stack(scales, 1).half().float(), torch.stack(zeros, 1)


def make_gptq(source: Path) -> None:
    file = source / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"
    quant_linear = _load(file, "autogptq_qlinear_cuda").QuantLinear
    out: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for name, bits, group, symmetric, is_ordered in GPTQ:
        width = 128
        linear = torch.nn.Linear(width, 32, bias=False)
        linear.weight.data = torch.randn(32, width, generator=generator)
        index = torch.arange(width) // (width if group == -1 else group)
        if is_ordered:
            index = index[torch.randperm(width, generator=generator)]
        scales, zeros = _affine(linear.weight.data, index, bits, symmetric)
        layer = quant_linear(bits, group, width, 32, False, weight_dtype=torch.float32)
        layer.pack(linear, scales, zeros.clone(), index.int())
        if name == "zero16-g32":
            layer.qzeros.fill_(-1)  # every stored zero is 15
        out |= {
            f"{name}.{key}": getattr(layer, key).clone()
            for key in ("qweight", "qzeros", "scales", "g_idx")
        }
        out[f"{name}.want"] = layer(torch.eye(width)).detach().t()
    save("gptq", out, "AutoGPTQ: qlinear_cuda.QuantLinear, pack and forward")


def make_awq(source: Path) -> None:
    # Its package imports kernels and models; the two files need three names of it.
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.triton"):
        sys.modules[name] = types.ModuleType(name)
    utils = types.ModuleType("awq.utils.module")
    utils.try_import = lambda name: (None, "")  # type: ignore[attr-defined]
    helpers = types.ModuleType("awq.utils.utils")
    helpers.get_best_device = lambda: "cpu"  # type: ignore[attr-defined]
    sys.modules |= {"awq.utils.module": utils, "awq.utils.utils": helpers}
    packing = _load(source / "awq/utils/packing_utils.py", "awq.utils.packing_utils")
    gemm = _load(source / "awq/modules/linear/gemm.py", "awq_gemm")
    out: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(2)
    for group in (32, 128):
        linear = torch.nn.Linear(128, 64, bias=False)
        linear.weight.data = torch.randn(64, 128, generator=generator)
        index = torch.arange(128) // group
        scales, zeros = (part.t() for part in _affine(linear.weight.data, index, 4, False))
        layer = gemm.WQLinear_GEMM.from_linear(
            linear, 4, group, scales=scales.contiguous(), zeros=zeros.contiguous()
        )
        parts = (layer.qweight, layer.qzeros, layer.scales)
        names = (f"g{group}.{key}" for key in ("qweight", "qzeros", "scales"))
        out |= dict(zip(names, parts, strict=True))
        want = packing.dequantize_gemm(parts[0], parts[1], parts[2].float(), 4, group)
        out[f"g{group}.want"] = want.t()
    save("awq", out, "AutoAWQ: WQLinear_GEMM.from_linear and packing_utils.dequantize_gemm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autogptq", type=Path, help="a clone of AutoGPTQ; without it: not made")
    parser.add_argument("--autoawq", type=Path, help="a clone of AutoAWQ; without it: not made")
    options = parser.parse_args()
    make_gguf_blocks()
    make_compressed()
    if options.autogptq:
        make_gptq(options.autogptq)
    if options.autoawq:
        make_awq(options.autoawq)


if __name__ == "__main__":
    main()
