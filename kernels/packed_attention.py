"""Softmax attention within blocks of packed sequences, on the CPU: no padding, no map of all weights, no copies in another dtype.

    out[i, h] = sum over the keys j of query i's block of softmax_j(scale * q[i, h] . k[j, h]) v[j, h]

Letters: T queries and S keys of all blocks together, N blocks, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_fast import _native

DTYPES = torch.float32, torch.bfloat16


def packed_attention(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor) -> Tensor:
    """Attention of each block's queries to the same block's keys; differentiable in q, k and v.

    q:        [T, H, D], float32 or bfloat16, on the CPU; the D columns side by side, otherwise of any strides.
    k, v:     [S, H, D], the dtype of q.
    q_starts: int32 [N + 1]: block n has the queries q_starts[n] .. q_starts[n + 1] - 1, the last ends at T.
    k_starts: int32 [N + 1], likewise of the keys. Queries of a block without keys get zeros.
    returns:  [T, H, D], contiguous, the dtype of q; sums are in float32 and run in one order for any number of threads.
    errors:   ValueError where the compiled library is missing (`runs_here`); RuntimeError for shapes, dtypes or starts that do not fit.
    """
    if not runs_here():
        raise ValueError(f"packed_attention needs {_native.status()}")
    return torch.ops.syncmask.packed_attention(q, k, v, q_starts, k_starts, q.shape[-1] ** -0.5)[0]


def runs_here() -> bool:
    """Whether the compiled library is loaded."""
    return _native.loaded()


@torch.library.custom_op("syncmask::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and float32 [H, T]: the logarithm of each query's sum of exponentials. csrc/packed_attention.cpp has the kernel."""
    raise NotImplementedError(f"packed_attention runs on the CPU alone; {_native.status()}")


@torch.library.custom_op("syncmask::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError(f"packed_attention runs on the CPU alone; {_native.status()}")


@_packed_attention.register_fake
def _(q, k, v, q_starts, k_starts, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_packed_attention_backward.register_fake
def _(grad, q, k, v, out, log_sums, q_starts, k_starts, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, q_starts, k_starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, q_starts, k_starts)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None):
    grads = torch.ops.syncmask.packed_attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


_packed_attention.register_autograd(_backward, setup_context=_keep)
_native.load()  # after the schemas above, which the kernels belong to
