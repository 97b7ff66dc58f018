"""A bfloat16 matrix with its rows and columns exchanged: on the CPU several times as fast as PyTorch's copy.

Letters: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_fast.kernels import checks, library


def transpose_reference(x: Tensor) -> Tensor:
    """Return the transpose of x [R, C] as a contiguous copy [C, R]: the definition of `transpose`."""
    return x.t().clone(memory_format=torch.contiguous_format)


OPS = library.define(
    "transpose", "(Tensor x) -> Tensor", fake=lambda x: x.new_empty(x.shape[::-1]), reference=transpose_reference
)


def transpose(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the transpose of a matrix as a contiguous copy.

    x:       [R, C] bfloat16, contiguous.
    returns: [C, R] bfloat16, contiguous.      grad: none.
    errors:  ValueError for shape, dtype, strides, a backend that is not built.
    runs:    C++ on the CPU; elsewhere the reference, with one warning.
    source:  our own.
    """
    checks.check_tensor("x", x, "R, C", (torch.bfloat16,))
    checks.check_contiguous("x", x)
    return OPS.pick(backend, x.device)(x)
