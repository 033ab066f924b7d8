"""The operator contract: about twenty operators that every model is written in.

Each op is a folder: `__init__.py` holds its name, signature and meaning, `naive.py` the truth in
plain torch, other files the kernels. A model calls ops through `mxn.kernels.registry.Ops`, which is
bound to one device once, at load; nothing is chosen in the hot path.
"""
