"""Write `src/mxn/chips/specs/*.toml` from a table of chips: one row per chip and basis.

    python tools/import_chip_specs.py CHIPS.csv

Columns: chip, vendor, torch_device, basis (datasheet, measured, derived, unverified),
fp16_dense_tflops, int8_dense_tops, memory_gb, memory_gb_per_s, link_gb_per_s, allreduce_gb_per_s,
source, note. An empty cell is unknown and stays absent. "unverified" becomes the basis "assumed".
Figures of other dtypes are read from the note where it states single numbers ("BF16 304.3"); a
range there ("BF16 259.2-291.8") stays in the note.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SPECS = Path(__file__).parents[1] / "src" / "mxn" / "chips" / "specs"

VENDORS = {
    "Huawei Ascend": "ascend", "Cambricon": "cambricon", "Moore Threads": "moorethreads",
    "MetaX": "metax", "Iluvatar CoreX": "iluvatar", "Hygon": "hygon", "Biren": "biren",
    "Kunlunxin": "kunlunxin", "Enflame": "enflame", "T-Head": "thead", "Tsingmicro": "tsingmicro",
    "Sunrise": "sunrise", "AMD": "amd", "Intel Gaudi": "gaudi", "Google": "google",
    "NVIDIA": "nvidia", "Moffett": "moffett",
}  # fmt: skip

# What a driver calls the chip, where that is not simply its name.
PATTERNS = {
    "Ascend 910B (Atlas 800T A2)": ["910B"],
    "Ascend 910B2": [r"910B2\b"],  # torch says "Ascend910B2", the tool "910B2"
    "Ascend 910B3": [r"910B3\b"],
    "Ascend 910B4": [r"910B4\b"],
    "Ascend 910C": ["910C", "910_93"],
    "A100-40G SXM": ["A100-SXM4-40GB", "A100-SXM.*40"],
    "A100-80G SXM": ["A100-SXM4-80GB", "A100-SXM.*80"],
    "A800-80G": ["A800.*80G"],
    "V100-16": ["V100.*16GB"],
    "GH200-96": ["GH200"],
    "H100 SXM": ["H100 80GB HBM3"],  # "H100 PCIe" is another chip
    "H200 SXM": [r"H200\b(?! NVL)"],
    "H800 SXM": [r"H800\b(?! PCIe)"],
    "Hygon K100": [r"\bK100\b(?![-_ ]?AI)"],
    "Hygon K100-AI": ["K100[-_ ]?AI"],
    "Gaudi 2": ["Gaudi ?2", "HL-225"],
    "Gaudi 3": ["Gaudi ?3", "HL-325"],
    "MetaX C500": [r"\bC500\b", r"\bMXC500\b"],
    "MetaX C550": [r"\bC550\b", r"\bMXC550\b"],
    "BR104": ["BR104", "Biren104"],
}
# Versions of one name that differ in memory: only this size is the chip of the row.
MEMORY = {"H20": [96], "GH200-96": [96], "V100-16": [16]}

# Board or thermal limits of the makers' sheets, which the table does not have.
WATTS = {
    "nvidia-a100-40g": 400,
    "nvidia-a100-80g": 400,
    "nvidia-h100": 700,
    "nvidia-h200": 700,
    "nvidia-l20": 275,
    "nvidia-l40": 300,
    "nvidia-rtx-2080": 215,
    "nvidia-rtx-3080-ti": 350,
    "nvidia-rtx-3090": 350,
    "nvidia-rtx-4090": 450,
    "nvidia-rtx-a5000": 230,
    "nvidia-rtx-a6000": 300,
    "nvidia-t4": 70,
    "nvidia-titan-rtx": 280,
    "amd-mi210": 300,
    "amd-mi300x": 750,
    "gaudi-2": 600,
    "gaudi-3": 900,
}

_NOT_ANOTHER = "(?! ?(Ti|SUPER|D|Laptop|Ada)\\b)"  # an "RTX 2080 Ti" is no "RTX 2080"
_STATED = re.compile(r"\b(BF16|FP16|FP32|TF32) (\d+(?:\.\d+)?)(?![\d.]*-|[\d.])")
_COLUMN_IS_BF16 = re.compile(r"^BF16(;| and|$)|^bf16;", re.IGNORECASE)


def main(table: str) -> None:
    chips: dict[str, list[dict[str, str]]] = {}
    with open(table, newline="") as file:
        for row in csv.DictReader(file):
            chips.setdefault(row["chip"], []).append(row)
    for title, rows in chips.items():
        name = chip_name(title, rows[0]["vendor"])
        (SPECS / f"{name}.toml").write_text(spec_text(title, rows) + power_text(name))
    print(f"{len(chips)} chips written to {SPECS}")


def power_text(name: str) -> str:
    """Return the power of a chip as TOML; empty where it is unknown."""
    if name not in WATTS:
        return ""
    source = "the maker's board or thermal limit"
    return f'\n[[power]]\nwatts = {WATTS[name]}\nbasis = "datasheet"\nsource = "{source}"\n'


def chip_name(title: str, vendor_title: str) -> str:
    """Return the name mxn uses: "H200 SXM" by NVIDIA is "nvidia-h200"."""
    vendor = VENDORS[vendor_title]
    short = re.sub(r" SXM$| \(.*\)$", "", title)
    slug = re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-")
    slug = slug.removeprefix("mtt-").removeprefix("t-head-")
    return slug if slug.partition("-")[0] == vendor else f"{vendor}-{slug}"


def spec_text(title: str, rows: list[dict[str, str]]) -> str:
    first = rows[0]
    short = re.sub(r" SXM$| \(.*\)$", "", title)
    for prefix in ("Hygon ", "MetaX ", "Ascend ", "Kunlunxin ", "Enflame ", "T-Head "):
        short = short.removeprefix(prefix)
    patterns = PATTERNS.get(title, [rf"\b{short}\b{_NOT_ANOTHER if short[:3] == 'RTX' else ''}"])
    lines = [
        f"name = {quoted(chip_name(title, first['vendor']))}",
        f"title = {quoted(title)}",
        f"vendor = {quoted(VENDORS[first['vendor']])}",
        f"torch_device = {quoted(first['torch_device'])}",
        f"match = [{', '.join(quoted(pattern) for pattern in patterns)}]",
    ]
    if title in MEMORY:
        lines.append(f"memory_gb = {MEMORY[title]}")
    for row in rows:
        lines += figure_lines(row)
    return "\n".join(lines) + "\n"


def figure_lines(row: dict[str, str]) -> Iterator[str]:
    basis = {"unverified": "assumed"}.get(row["basis"], row["basis"])
    tail = [f'basis = "{basis}"']
    if row["source"]:
        tail.append(f"source = {quoted(row['source'])}")
    note = row["note"]
    for dtype, value in peaks(row):
        unit = "tera_op_per_s" if dtype == "int8" else "tflop_per_s"
        yield from entry("peak", [f'dtype = "{dtype}"', f"{unit} = {value}"], tail, note)
    if row["memory_gb"]:
        size = round(float(row["memory_gb"]) * 10**9)
        yield from entry("memory", [f"bytes = {size}"], tail, note)
    if row["memory_gb_per_s"]:
        yield from entry("memory", [f"gb_per_s = {row['memory_gb_per_s']}"], tail, note)
    if row["link_gb_per_s"]:
        yield from entry("link", [f"gb_per_s = {row['link_gb_per_s']}"], tail, note)
    if row["allreduce_gb_per_s"]:
        yield from entry("link", [f"allreduce_gb_per_s = {row['allreduce_gb_per_s']}"], tail, note)


def peaks(row: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (dtype, value); the column fp16 holds bf16 figures where the note says so."""
    stated = {dtype.lower(): value for dtype, value in _STATED.findall(row["note"])}
    column = row["fp16_dense_tflops"]
    if column:
        is_bf16 = _COLUMN_IS_BF16.search(row["note"]) or stated.get("bf16") == column
        yield ("bf16" if is_bf16 else "fp16"), column
    for dtype, value in stated.items():
        if value != column:
            yield dtype, value
    if row["int8_dense_tops"]:
        yield "int8", row["int8_dense_tops"]


def entry(kind: str, head: list[str], tail: list[str], note: str) -> list[str]:
    return ["", f"[[{kind}]]", *head, *tail, *([f"note = {quoted(note)}"] if note else [])]


def quoted(text: str) -> str:
    """Return a TOML string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
