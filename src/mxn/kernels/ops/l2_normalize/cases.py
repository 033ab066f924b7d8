"""Parity cases of `l2_normalize`, a zero vector included."""

from mxn.kernels.parity import Case, Maker


def _with_zero_row(make: Maker, rows: int, dim: int) -> tuple[object, ...]:
    x = make.normal(rows, dim)
    x[:1] = 0
    return (x,)


CASES = tuple(
    Case(
        name=f"l2_normalize {rows}x{dim}",
        build=lambda make, a=(rows, dim): _with_zero_row(make, *a),
        is_typical=dim == 384,
    )
    for rows, dim in ((0, 4), (1, 1), (3, 61), (16, 384))
)
