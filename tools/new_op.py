"""Start a new op: ``python tools/new_op.py NAME`` writes its folder: truth, kernel and cases.

The stubs compute ``out = x``: the parity test passes at once, and fails as soon as the truth says
more than the kernel does.
"""

from __future__ import annotations

import argparse
import keyword
import sys
from pathlib import Path

OPS = Path(__file__).resolve().parent.parent / "src" / "mxn" / "kernels" / "ops"

FILES = {
    "__init__.py": '''"""The op `{name}`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="{name}",
    signature="{name}(x[..., D]) -> like x",
    meaning="Say what comes out, in which precision, and what happens at the edges.",
)
''',
    "naive.py": '''"""The truth of `{name}`.

Source: name the paper and the equation.
"""

from __future__ import annotations

from torch import Tensor


def {name}(x: Tensor) -> Tensor:
    return x.float().to(x.dtype)
''',
    "torch_.py": '''"""`{name}` in torch, for any device."""

from __future__ import annotations

from torch import Tensor

from mxn.kernels.registry import kernel


@kernel("{name}", name="torch")
def {name}(x: Tensor) -> Tensor:
    return x.clone()
''',
    "cases.py": '''"""Parity cases of `{name}`."""

from mxn.kernels.parity import Case

CASES = tuple(
    Case(
        name=f"{name} {{shape}}",
        build=lambda make, shape=shape: (make.normal(*shape),),
        is_typical=shape == (16, 1024),
    )
    for shape in ((0, 4), (1, 1), (3, 61), (16, 1024))
)
''',
}


def write(name: str, ops: Path = OPS) -> list[Path]:
    """Write the files of op `name`. Raises: ValueError for a bad or taken name."""
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ValueError(f"an op is named like a function, such as rms_norm; got {name!r}")
    folder = ops / name
    if folder.exists():
        raise ValueError(f"op {name!r} exists: {folder}")
    folder.mkdir()
    for file, text in FILES.items():
        (folder / file).write_text(text.format(name=name))
    return [folder / file for file in FILES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    try:
        paths = write(parser.parse_args().name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    print("next: the truth in naive.py, then: python -m pytest tests/parity/test_ops.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
