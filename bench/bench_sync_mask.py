"""sync_mask against eager PyTorch, torch.compile of it, and the bare product q k^T."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from syncmask_fast import ops

TOKEN_RATIO, PATCH_RATIO = 0.15, 0.5
# B, H, T, P, D: ALBEF's cross-attention at 256 px for three batches, then the lookbook's (96 px, 16 px patches).
SHAPES = [(1, 12, 64, 256, 64), (64, 12, 64, 256, 64), (256, 12, 64, 256, 64), (64, 2, 64, 36, 64)]


def eager(q: Tensor, k: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way: the whole attention map, then reductions and top-k. Rules "peak" and "max"."""
    weights = torch.softmax((q @ k.mT).float() * q.shape[-1] ** -0.5, -1)[..., 1:]
    token_score = weights.amax(-1).mean(1).masked_fill(~words, -math.inf)
    patch_score = weights.masked_fill(~words[:, None, :, None], 0).amax(2).mean(1)
    m = words.sum(1)
    count = torch.clamp(torch.floor(TOKEN_RATIO * m + 0.5), min=1).minimum(m)
    rank = token_score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    best = patch_score.topk(ops.masked_patches(patch_score.shape[1], PATCH_RATIO), 1).indices
    return rank < count[:, None], torch.zeros_like(patch_score, dtype=torch.bool).scatter_(1, best, True)


def bare_product(q: Tensor, k: Tensor, words: Tensor, out: dict = {}) -> Tensor:  # noqa: B006 (kept between calls)
    shape = (q.shape[0] * q.shape[1], q.shape[2], k.shape[2])
    if out.get("shape") != (shape, q.dtype, q.device):
        out.update(shape=(shape, q.dtype, q.device), tensor=q.new_empty(shape))
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out=out["tensor"])


def ours(q: Tensor, k: Tensor, words: Tensor) -> ops.SyncMask:
    return ops.sync_mask(q, k, words, token_ratio=TOKEN_RATIO, patch_ratio=PATCH_RATIO)


PROVIDERS = {"ours": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False), "bmm": bare_product}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("words", ["all", "drawn"])  # every token maskable (our worst case), or texts of 16 to 64
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sync_mask(shape, words, provider, device, benchmark, measured):
    measured.require_green("sync_mask")
    torch.compiler.reset()  # each shape is compiled for itself; after eight, torch.compile would give up
    b, h, t, p, d = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        q, k = (torch.randn(b, h, n, d, generator=generator, device=device).to(dtype) for n in (t, p + 1))
        length = torch.randint(t // 4, t + 1, (b, 1), generator=generator, device=device)
        return q, k, torch.arange(t, device=device) < (length if words == "drawn" else torch.full_like(length, t))

    measured.measure(
        benchmark,
        operator="sync_mask",
        provider=provider,
        case=dict(B=b, H=h, T=t, P=p, D=d, words=words),
        make=make,
        function=PROVIDERS[provider],
        flops=2 * b * h * t * (p + 1) * d,
    )


def test_the_plain_way_gives_the_same_masks():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 2, 9, 8, generator=generator), torch.randn(3, 2, 12, 8, generator=generator)
    words = torch.rand(3, 9, generator=generator) < 0.7
    assert all(a.equal(b) for a, b in zip(eager(q, k, words), ours(q, k, words)[:2], strict=True))
