"""The op `route`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="route",
    signature=("route(logits_TE, bias_E | None, router) -> (weights_Tk float32, ids_Tk int64)"),
    meaning=(
        "Which experts a token uses and with what weight. The bias takes part in the choice only."
    ),
)
