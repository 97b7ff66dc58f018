"""Softmax attention within blocks of packed sequences: no padding, no map of all weights, no copies in another dtype.

    out[i, h] = sum over the keys j of query i's block of softmax_j(scale * q[i, h] . k[j, h]) v[j, h]

Letters: T queries and S keys of all blocks together, N blocks, H heads, D head width. Source: FlashAttention's
backward, which recomputes the weights from the logarithm of each query's sum of exponentials.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from syncmask_fast import _native
from syncmask_fast.kernels import checks, library

DTYPES = torch.float32, torch.bfloat16


def packed_attention_reference(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor) -> Tensor:
    """Return `packed_attention` by its definition in plain PyTorch, one block at a time; float64 for float64 inputs."""
    _check(q, k, v, q_starts, k_starts, (*DTYPES, torch.float64))
    return _forward(q, k, v, q_starts, k_starts, q.shape[-1] ** -0.5)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [T, H, D], and [H, T] the logarithm of each query's sum of exponentials."""
    dtype = library.reference_dtype(q)
    out, log_sums = [q.new_empty(0, *q.shape[1:], dtype=dtype)], [q.new_empty(q.shape[1], 0, dtype=dtype)]
    with library.autocast_off(q):
        for queries, keys in _blocks(q_starts, k_starts):
            scores = scale * torch.einsum("ihd,jhd->hij", q[queries].to(dtype), k[keys].to(dtype))
            log_sum = scores.logsumexp(-1)  # -inf for a block without keys
            weights = (scores - log_sum[..., None]).exp()
            out.append(torch.einsum("hij,jhd->ihd", weights, v[keys].to(dtype)))
            log_sums.append(log_sum)
    return torch.cat(out).to(q.dtype), torch.cat(log_sums, 1).to(torch.promote_types(dtype, torch.float32))


def _backward(
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
    """Return the gradients of q, k and v."""
    dtype = library.reference_dtype(q)
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)]
    for queries, keys in _blocks(q_starts, k_starts):
        rows, given, given_out = (x[queries].to(dtype) for x in (q, grad, out))
        columns, values = (x[keys].to(dtype) for x in (k, v))
        scores = scale * torch.einsum("ihd,jhd->hij", rows, columns)
        weights = (scores - log_sums[:, queries, None]).exp()
        mean = (given * given_out).sum(-1).T[..., None]
        grad_scores = scale * weights * (torch.einsum("ihd,jhd->hij", given, values) - mean)
        grads[0][queries] = torch.einsum("hij,jhd->ihd", grad_scores, columns)
        grads[1][keys] = torch.einsum("hij,ihd->jhd", grad_scores, rows)
        grads[2][keys] = torch.einsum("hij,ihd->jhd", weights, given)
    return tuple(x.to(q.dtype) for x in grads)


def _blocks(q_starts: Tensor, k_starts: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of q and of k of each block."""
    queries, keys = q_starts.tolist(), k_starts.tolist()
    for block in range(len(queries) - 1):
        yield slice(*queries[block : block + 2]), slice(*keys[block : block + 2])


def _fake(q, k, v, q_starts, k_starts, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=library.reference_dtype(q))


def _fake_backward(grad, q, k, v, out, log_sums, q_starts, k_starts, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


OPS = library.define(
    "packed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor k_starts, float scale) -> (Tensor out, Tensor log_sums)",
    fake=_fake,
    reference=_forward,
)
BACKWARD_OPS = library.define(
    "packed_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, Tensor q_starts, Tensor k_starts, "
    "float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    fake=_fake_backward,
    reference=_backward,
)


def _save(ctx, inputs, output) -> None:
    q, k, v, q_starts, k_starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, q_starts, k_starts)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad: Tensor, _: Tensor | None):
    return *BACKWARD_OPS.auto(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None


def _differentiate_reference(ctx, grad: Tensor, _: Tensor | None):
    return *BACKWARD_OPS.reference(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None


torch.library.register_autograd(OPS.auto, _differentiate, setup_context=_save)
torch.library.register_autograd(OPS.reference, _differentiate_reference, setup_context=_save)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Return the attention of each block's queries to the same block's keys; differentiable in q, k and v.

    q:        [T, H, D], float32 or bfloat16; the D columns next to each other, otherwise any strides.
    k, v:     [S, H, D], the dtype of q.
    q_starts: int32 [N + 1]: block n has the queries q_starts[n] .. q_starts[n + 1] - 1; the last is T.
    k_starts: int32 [N + 1], the same for the keys. Queries of a block without keys get zeros.
    returns:  [T, H, D], contiguous, the dtype of q; sums are float32 and do not depend on the number of threads.
    errors:   ValueError for shape, dtype or device, a backend that is not built; RuntimeError of the C++ kernel for
              strides and starts that do not fit.
    memory:   64 rows of one head's map for each thread.
    runs:     C++ on the CPU; elsewhere the reference, with one warning.
    """
    _check(q, k, v, q_starts, k_starts, DTYPES)
    return OPS.pick(backend, q.device)(q, k, v, q_starts, k_starts, q.shape[-1] ** -0.5)[0]


def is_available() -> bool:
    """Return whether the compiled kernel is loaded."""
    return _native.is_loaded()


def _check(q, k, v, q_starts, k_starts, dtypes) -> None:
    checks.check_tensor("q", q, "T, H, D", dtypes)
    checks.check_tensor("k", k, "S, H, D", (q.dtype,))
    checks.check_tensor("v", v, "S, H, D", (q.dtype,))
    checks.check_shape("k", k, (k.shape[0], *q.shape[1:]), "H and D of q")
    checks.check_shape("v", v, k.shape, "the shape of k")
    checks.check_tensor("q_starts", q_starts, "N + 1", (torch.int32,))
    checks.check_tensor("k_starts", k_starts, "N + 1", (torch.int32,))
    checks.check_shape("k_starts", k_starts, q_starts.shape, "as many blocks as q_starts")
