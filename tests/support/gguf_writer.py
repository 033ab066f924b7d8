"""Writes GGUF files, good and bad ones, straight from the format's description."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

F32, F16, Q4_K, Q6_K, Q2_K = 0, 1, 12, 14, 10
BLOCK = {F32: (1, 4), F16: (1, 2), 2: (32, 18), 8: (32, 34), Q4_K: (256, 144), Q6_K: (256, 210)}


@dataclass(frozen=True)
class Stored:
    """A tensor: rows first, as PyTorch counts."""

    shape: tuple[int, ...]
    type: int
    data: bytes

    @classmethod
    def plain(cls, tensor: torch.Tensor) -> Stored:
        return cls(tuple(tensor.shape), F32, tensor.float().contiguous().numpy().tobytes())

    @classmethod
    def random(cls, rows: int, columns: int, kind: int, generator: torch.Generator) -> Stored:
        """Random blocks of a K type, whose half floats are small scales."""
        values, size = BLOCK[kind]
        blocks = torch.randint(
            0, 256, (rows * columns // values, size), dtype=torch.uint8, generator=generator
        )
        for start in {Q4_K: (0, 2), Q6_K: (208,)}[kind]:
            scale = 0.0005 + 0.001 * torch.rand(len(blocks), 1, generator=generator)
            blocks[:, start : start + 2] = scale.half().view(torch.uint8)
        return cls((rows, columns), kind, blocks.numpy().tobytes())


def write(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, Stored],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Write a file and return its bytes."""
    out = bytearray(magic + struct.pack("<IQQ", version, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _typed(value)
    data = bytearray()
    for name, tensor in tensors.items():
        data += bytes(-len(data) % alignment)
        sizes = tensor.shape[::-1]
        out += _string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        out += struct.pack("<IQ", tensor.type, len(data))
        data += tensor.data
    out += bytes(-len(out) % alignment) + data
    path.write_bytes(out)
    return bytes(out)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    if isinstance(value, list):
        kind = struct.unpack("<I", _typed(value[0])[:4])[0]
        items = b"".join(_typed(item)[4:] for item in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)


def llama(**changes: Any) -> dict[str, Any]:
    """Return the metadata of a llama of one layer, 256 wide; None removes a key."""
    fields = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 128,
        "llama.embedding_length": 256, "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
    }  # fmt: skip
    fields |= changes
    return {key: value for key, value in fields.items() if value is not None}


def llama_tensors(seed: int = 0, kinds: tuple[int, int] = (Q4_K, Q6_K)) -> dict[str, Stored]:
    """Return the tensors of that llama: most of the first type, v and down of the second."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"attn_q": 256, "attn_k": 128, "attn_v": 128, "attn_output": 256, "ffn_gate": 256,
            "ffn_up": 256, "ffn_down": 256}  # fmt: skip

    def norm() -> Stored:
        return Stored.plain(1 + 0.1 * torch.randn(256, generator=generator))

    out = {"token_embd.weight": Stored.plain(torch.randn(40, 256, generator=generator))}
    for name, count in rows.items():
        kind = kinds[name in ("attn_v", "ffn_down")]
        out[f"blk.0.{name}.weight"] = Stored.random(count, 256, kind, generator)
    out |= {f"blk.0.{name}.weight": norm() for name in ("attn_norm", "ffn_norm")}
    return out | {"output_norm.weight": norm()}
