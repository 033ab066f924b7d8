"""The C++ kernels for processors: packed weights, their products, attention over a quantized cache.

Knows matrices and rows; knows no models. `library()` loads the extension and picks the variant for
this processor, `pack` turns a matrix into the layout the kernels read. Start at `pack.pack`.
"""

from mxn.kernels.native.library import library, missing_reason, pool

__all__ = ["library", "missing_reason", "pool"]
