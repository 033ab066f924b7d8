"""The op `choose`: see OP.meaning."""

from mxn.kernels.registry import Op

OP = Op(
    name="choose",
    signature="choose(logits_RV, num_tokens, rules=None, edits=()) -> list of R token ids",
    meaning=(
        "A token for each row from its first num_tokens logits, which are as before afterwards: "
        "edits as by penalize, then what each row's ChoiceRule says, as by filter_logits and "
        "sample; the first of the largest where its temperature is 0 or there are no rules. "
        "-1 where the largest is no finite number or the row holds a NaN."
    ),
)
