"""Attention over packed sequences: one function; on CUDA the fastest of xformers and PyTorch's `varlen_attn`, on the CPU our own.

Tokens of many sequences lie behind each other in one [total, ...] tensor. A `PackedLayout` says where each sequence begins. Sequences of one
length may stay dense, [N, L, ...], and then need no layout.
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
    """Softmax attention within blocks: the queries of block n look at the keys of block n, and at no others.

    q:        [total, H, D] with `q_layout`, or dense [N, L, H, D] without; float32, bfloat16 or float16.
    k, v:     [total, H, D] with `k_layout`, or dense [N, S, H, D] without; the same number of blocks N.
    returns:  like q.
    runs:     what `attention_backend` names.
    compiled: on the CPU with what is around it, if `PackedLayout.materialize` came before; on CUDA the graph breaks here.
    """
    if q.is_cuda:
        return _attention_cuda(q, k, v, q_layout, k_layout)
    if attention_backend(q.device, q.dtype) == "padded" or (k_layout is not None and k_layout.gaps):
        return sdpa_padded(q, k, v, q_layout, k_layout)
    return _attention_packed(q, k, v, q_layout, k_layout)


def _attention_packed(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None, k_layout: PackedLayout | None
) -> Tensor:
    one = [x if layout is not None else x.flatten(0, 1) for x, layout in ((q, q_layout), (k, k_layout), (v, k_layout))]
    starts = [
        layout.cu_seqlens if layout is not None else _dense_starts(len(x), x.shape[1], x.device)
        for x, layout in ((q, q_layout), (k, k_layout))
    ]
    return cpu_attention.packed_attention(*one, *starts).view(q.shape)


@torch.compiler.disable  # the blocks around it are compiled, not the choice of the kernel
def _attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None, k_layout: PackedLayout | None
) -> Tensor:
    kind = attention_backend(q.device, q.dtype)
    if kind != "padded" and not (k_layout is not None and k_layout.gaps):
        return _PACKED[kind](q, k, v, q_layout, k_layout)
    return sdpa_padded(q, k, v, q_layout, k_layout)


def sdpa_padded(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None = None, k_layout: PackedLayout | None = None
) -> Tensor:
    """`attention` by PyTorch's SDPA on padded sequences, which runs everywhere."""
    mask = None if k_layout is None else k_layout.valid[:, None, None, :]
    q_dense = q if q_layout is None else q_layout.pad(q)
    if k_layout is not None:
        k, v = k_layout.pad(k), k_layout.pad(v)
    with torch.autocast(q.device.type, enabled=False):
        # PyTorch's CPU attention is nine times as slow in bfloat16.
        heads_first = ((x if q.is_cuda else x.float()).transpose(1, 2) for x in (q_dense, k, v))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).to(q.dtype)
    return out if q_layout is None else q_layout.unpad(out)


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What attention in `dtype` runs on: "packed" (our kernel, on the CPU alone), "xformers" or "varlen" (the faster of those that work here), or
    "padded" (SDPA).

    On CUDA the first call in a dtype tries them, which takes some milliseconds and waits for the device.
    """
    if device.type != "cuda":
        return "packed" if dtype in cpu_attention.DTYPES and cpu_attention.runs_here() else "padded"
    if dtype not in _chosen:
        seconds = {kind: _seconds(run, device, dtype) for kind, run in _PACKED.items()}
        best = min(seconds, key=lambda kind: seconds[kind])
        _chosen[dtype] = best if seconds[best] < float("inf") else "padded"
    return _chosen[dtype]


def uses_varlen(device: torch.device) -> bool:
    """Whether to leave the rows of packed sequences unknown to the host: on CUDA, where reading them back would wait, unless attention pads."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
    return device.type == "cuda" and attention_backend(device, dtype) != "padded"


def block_diagonal_mask(blocks: int, q_layout: PackedLayout | int, k_layout: PackedLayout | int):
    """xformers' block-diagonal mask for packed queries and keys; an int is the length of dense blocks.

    The starts stay on the device: nothing is read back. The host copies that xformers keeps beside them are upper bounds.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    device = next(
        (x.cu_seqlens.device for x in (q_layout, k_layout) if isinstance(x, PackedLayout)), torch.device("cuda")
    )

    def info(layout: PackedLayout | int) -> _SeqLenInfo:
        if isinstance(layout, int):
            starts = _dense_starts(blocks, layout, device)
            return _SeqLenInfo(seqstart=starts, max_seqlen=layout, min_seqlen=layout, seqstart_py=[0, blocks * layout])
        return _SeqLenInfo(
            seqstart=layout.cu_seqlens, max_seqlen=layout.max_seqlen, min_seqlen=0, seqstart_py=[0, layout.total]
        )

    return BlockDiagonalMask(q_seqinfo=info(q_layout), k_seqinfo=info(k_layout))


def _dense_starts(blocks: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(blocks + 1, dtype=torch.int32, device=device) * length


def _attention_xformers(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None, k_layout: PackedLayout | None
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    if q_layout is None and k_layout is None:
        return memory_efficient_attention(q, k, v)
    blocks = len(q_layout if q_layout is not None else k_layout)
    bias = block_diagonal_mask(blocks, q_layout or q.shape[1], k_layout or k.shape[1])
    one = [x if layout is not None else x.flatten(0, 1) for x, layout in ((q, q_layout), (k, k_layout), (v, k_layout))]
    out = memory_efficient_attention(*(x[None] for x in one), attn_bias=bias)[0]
    return out if q_layout is not None else out.view_as(q)


def _attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_layout: PackedLayout | None, k_layout: PackedLayout | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if q_layout is None and k_layout is None:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    starts, longest = zip(
        *(
            (_dense_starts(len(x), x.shape[1], x.device), x.shape[1])
            if layout is None
            else (layout.cu_seqlens, layout.max_seqlen)
            for x, layout in ((q, q_layout), (k, k_layout))
        ),
        strict=True,
    )
    one = [x if layout is not None else x.flatten(0, 1) for x, layout in ((q, q_layout), (k, k_layout), (v, k_layout))]
    out = varlen_attn(*one, *starts, *longest)
    return out if q_layout is not None else out.view_as(q)


_PACKED = {"xformers": _attention_xformers, "varlen": _attention_varlen}
_chosen: dict[torch.dtype, str] = {}


def _seconds(run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> float:
    """Time of texts that look at images of 257 rows, forward and backward; infinite where it does not run here."""
    layout = PackedLayout.of(list(range(40, 168)), device)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            q = torch.randn(layout.total, 12, 64, device=device, dtype=dtype, requires_grad=True)
            k, v = (
                torch.randn(len(layout), 257, 12, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2)
            )
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for calls in (3, 10):
                begin.record()
                for _ in range(calls):
                    run(q, k, v, layout, None).sum().backward()
                end.record()
            torch.cuda.synchronize(device)
    except (
        Exception
    ):  # not installed, not built for this PyTorch, not for this GPU or precision: each says it in its own way
        return float("inf")
    return begin.elapsed_time(end) / 1e3
