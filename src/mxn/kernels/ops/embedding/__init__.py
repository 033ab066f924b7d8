"""The op `embedding`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="embedding",
    signature=("embedding(ids_T, table_VD) -> x_TD"),
    meaning=("Rows of the table."),
)
