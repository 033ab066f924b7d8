"""Device code in Triton. Importing a module of this package needs triton; no one imports it early.

The host side of each kernel (shapes, memory, launch) is `triton_.py` in the folder of its op, which
knows torch but imports this package only when it is called. Code here knows pointers and strides.
"""
