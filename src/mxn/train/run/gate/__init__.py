"""The parity gate: before a mixed run each chip computes the same layers on the same data.

`record.py` writes down the operators that a layer calls, `check.py` repeats them on a chip and
compares, `optimizer.py` does so with the steps of AdamW, `process.py` does both in a process for
each chip and decides. Start at `process.run_gate`.
"""
