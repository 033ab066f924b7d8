"""Write the generated reference pages: commands, environment variables, operators, families.

python tools/make_docs.py            # write
python tools/make_docs.py --check    # exit 1 when a page is not what it would write
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
HEADER = "Written by `python tools/make_docs.py`; do not edit.\n"


def commands_page() -> str:
    from typer.main import get_command

    from mxn.cli.main import app

    lines = ["# Commands", "", HEADER]
    for name, command in _walk("mxn", get_command(app)):
        lines += [f"## `{name}`", "", (command.help or "").strip().split("\f")[0], ""]
        rows = [_parameter(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            lines += ["| argument | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for child_name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _walk(f"{name} {child_name}", child)


def _parameter(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    flags = [*parameter.opts, *parameter.secondary_opts]
    label = ", ".join(f"`{flag}`" for flag in flags) if is_option else f"`{parameter.name.upper()}`"
    default = parameter.default
    shown = "" if default in (None, False, ()) or callable(default) else f"`{default}`"
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| {label} | {shown} | {text} |"


def environment_page() -> str:
    from mxn.env import VARIABLES

    rows = [f"| `{v.name}` | `{v.default or ' '}` | {v.meaning} |" for v in VARIABLES]
    head = ["# Environment variables", "", HEADER, "| variable | default | meaning |"]
    head.append("|---|---|---|")
    tail = [
        "",
        "`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to",
        "`huggingface_hub`.",
    ]
    return "\n".join([*head, *rows, *tail]) + "\n"


def operators_page() -> str:
    from mxn.kernels.registry import all_ops, kernels_of

    lines = ["# Operators", "", HEADER, "| op | signature | meaning | kernels |"]
    lines.append("|---|---|---|---|")
    for op in all_ops().values():
        kernels = ", ".join(sorted(kernels_of(op.name)))
        signature = op.signature.replace("|", "\\|")
        lines.append(f"| `{op.name}` | `{signature}` | {op.meaning} | {kernels} |")
    return "\n".join(lines) + "\n"


def families_page() -> str:
    from mxn.models.families import decoder_families
    from mxn.models.families.encoders import ENCODER_FAMILIES

    lines = ["# Native families", "", HEADER, "| family | kind | architectures |", "|---|---|---|"]
    for family in decoder_families():
        lines.append(f"| {family.name} | decoder | {', '.join(family.architectures)} |")
    for encoder in ENCODER_FAMILIES:
        names = ", ".join(f"{prefix}*" for prefix in encoder.class_prefixes)
        lines.append(f"| {encoder.name} | encoder: embeddings, reranking | {names} |")
    lines += ["", "Other decoders of transformers run through the fallback: `fallback.md`."]
    return "\n".join(lines) + "\n"


PAGES = {
    "commands.md": commands_page,
    "environment.md": environment_page,
    "operators.md": operators_page,
    "families.md": families_page,
}


def main() -> int:
    is_check = "--check" in sys.argv[1:]
    stale = []
    for name, render in PAGES.items():
        path, text = REFERENCE / name, render()
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if not is_check:
                path.write_text(text)
    for name in stale:
        print(f"docs/reference/{name}: {'stale' if is_check else 'written'}")
    return 1 if is_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
