"""Runs decoders that mxn has no spec for: the code of transformers with attention and linears
swapped.

Start at `load.py`. `reasons.py` refuses what cannot work by its config or class, `probe.py` learns
the caches and masks of every attention call, `attention.py` is the paged attention that
transformers calls, `linear.py` swaps the linear layers, `decoder.py` is the `CausalLM`, `check.py`
compares it with the untouched model before anyone uses it. Why it is built this way:
docs/design/0006-transformers-fallback.md.
"""
