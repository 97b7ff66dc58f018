"""Attention over packed sequences: one function with several backends.

On CUDA the faster of xformers and PyTorch's `varlen_attn` runs, on the CPU our own kernel. SDPA on padded sequences
runs everywhere. Sequences of one length may stay dense, [N, L, ...], and then need no layout.

Shape letters: N blocks (sequences, or the queries of an image), L queries and S keys of a block, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.kernels import packed_attention as cpu_attention
from syncmask_fast.model.layout import PackedLayout


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None = None, k_layout: PackedLayout | None = None
) -> Tensor:
    """Return softmax attention within blocks: the queries of block n attend to the keys of block n, and to no others.

    q:        [total, H, D] with `q_layout`, or dense [N, L, H, D] without; float32, bfloat16 or float16.
    k, v:     [total, H, D] with `k_layout`, or dense [N, S, H, D] without; the same number of blocks N.
    returns:  like q.
    runs:     the backend that `attention_backend` returns.
    compiled: in the graph on the CPU, after `PackedLayout.materialize`; on CUDA the graph breaks here.
    """
    if q.is_cuda:
        return _attention_cuda(q, k, v, q_layout, k_layout)
    if attention_backend(q.device, q.dtype) == "padded":  # float16, or the C++ library is not built
        return sdpa_padded(q, k, v, q_layout, k_layout)
    (queries, q_starts, _), (keys, k_starts, _), (values, _, _) = (
        _flat(q, q_layout),
        _flat(k, k_layout),
        _flat(v, k_layout),
    )
    return cpu_attention.packed_attention(queries, keys, values, q_starts, k_starts).view(q.shape)


@torch.compiler.disable  # the blocks around it are compiled, the choice of the kernel is not
def _attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None, k_layout: PackedLayout | None
) -> Tensor:
    backend = attention_backend(q.device, q.dtype)
    return _BACKENDS.get(backend, sdpa_padded)(q, k, v, q_layout, k_layout)


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return "packed" (our CPU kernel), "xformers", "varlen" or "padded" (SDPA): what attention in `dtype` runs on.

    On CUDA the first call in a dtype times the two packed backends, which takes milliseconds and waits for the device.
    """
    if device.type != "cuda":
        return "packed" if dtype in cpu_attention.DTYPES and cpu_attention.is_available() else "padded"
    # Which one is faster depends on the GPU and on both libraries' versions.
    if dtype not in _chosen:
        seconds = {name: _time_backend(run, device, dtype) for name, run in _BACKENDS.items()}
        best = min(seconds, key=lambda name: seconds[name])
        _chosen[dtype] = best if seconds[best] < float("inf") else "padded"
    return _chosen[dtype]


def uses_varlen(device: torch.device) -> bool:
    """Return whether the host need not know the rows of packed sequences: on CUDA, unless attention pads."""
    # Reading lengths back would make the host wait for the device, but padding needs the longest one.
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
    return device.type == "cuda" and attention_backend(device, dtype) != "padded"


def sdpa_padded(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None = None, k_layout: PackedLayout | None = None
) -> Tensor:
    """Return `attention` computed by PyTorch's SDPA on padded sequences, which runs everywhere."""
    # Padded keys are masked. Padded queries give rows that `unpad` drops.
    mask = None if k_layout is None else k_layout.valid[:, None, None, :]
    q_dense = q if q_layout is None else q_layout.pad(q)
    if k_layout is not None:
        k, v = k_layout.pad(k), k_layout.pad(v)
    # PyTorch's CPU attention is nine times as slow in bfloat16 as in float32.
    heads_first = [(x if q.is_cuda else x.float()).transpose(1, 2) for x in (q_dense, k, v)]
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).to(q.dtype)
    return out if q_layout is None else q_layout.unpad(out)


def _attention_xformers(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None, k_layout: PackedLayout | None
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # Images of one size need no mask.
    if q_layout is None and k_layout is None:
        return memory_efficient_attention(q, k, v)
    blocks = len(q_layout if q_layout is not None else k_layout)
    bias = block_diagonal_mask(blocks, q_layout or q.shape[1], k_layout or k.shape[1])
    packed = [_flat(x, layout)[0][None] for x, layout in ((q, q_layout), (k, k_layout), (v, k_layout))]
    return memory_efficient_attention(*packed, attn_bias=bias)[0].view(q.shape)


def _attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None, k_layout: PackedLayout | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q_layout is None and k_layout is None:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    queries, q_starts, longest_q = _flat(q, q_layout)
    keys, k_starts, longest_k = _flat(k, k_layout)
    values, _, _ = _flat(v, k_layout)
    return varlen_attn(queries, keys, values, q_starts, k_starts, longest_q, longest_k).view(q.shape)


_BACKENDS = {"xformers": _attention_xformers, "varlen": _attention_varlen}  # of CUDA
_chosen: dict[torch.dtype, str] = {}  # filled at the first use, since importing must not start CUDA


def _flat(x: Tensor, layout: PackedLayout | None) -> tuple[Tensor, Tensor, int]:
    """Return x as [total, H, D], where its blocks begin, int32 [N + 1], and the length of the longest."""
    if layout is not None:
        return x, layout.cu_seqlens, layout.max_seqlen
    return x.flatten(0, 1), _dense_starts(len(x), x.shape[1], x.device), x.shape[1]


def _dense_starts(blocks: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(blocks + 1, dtype=torch.int32, device=device) * length


def block_diagonal_mask(blocks: int, q_layout: PackedLayout | int, k_layout: PackedLayout | int):
    """Return xformers' block-diagonal mask for packed queries and keys; an int is the length of dense blocks."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    layouts = [x for x in (q_layout, k_layout) if isinstance(x, PackedLayout)]
    device = layouts[0].cu_seqlens.device if layouts else torch.device("cuda")

    def info(layout: PackedLayout | int) -> _SeqLenInfo:
        if isinstance(layout, int):
            starts, longest, shortest, total = _dense_starts(blocks, layout, device), layout, layout, blocks * layout
        else:
            starts, longest, shortest, total = layout.cu_seqlens, layout.max_seqlen, 0, layout.total
        # The starts stay on the device and nothing is read back: xformers' host copies may be bounds.
        return _SeqLenInfo(seqstart=starts, max_seqlen=longest, min_seqlen=shortest, seqstart_py=[0, total])

    return BlockDiagonalMask(q_seqinfo=info(q_layout), k_seqinfo=info(k_layout))


def _time_backend(run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of texts that attend to images of 257 rows, forward and backward; infinite if it fails."""
    layout = PackedLayout.of(list(range(40, 168)), device)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q = torch.randn(layout.total, 12, 64, device=device, dtype=dtype, requires_grad=True)
            k = torch.randn(len(layout), 257, 12, 64, device=device, dtype=dtype, requires_grad=True)
            v = torch.randn_like(k, requires_grad=True)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for calls in (3, 10):  # the first three warm up
                begin.record()
                for _ in range(calls):
                    run(q, k, v, layout, None).sum().backward()
                end.record()
            torch.cuda.synchronize(device)
    except Exception:  # not installed, built for another PyTorch, GPU or precision: each fails in its own way
        return float("inf")
    return begin.elapsed_time(end) / 1e3
