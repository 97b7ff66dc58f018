"""mine_semi_hard against eager PyTorch, torch.compile of it, the bare product, and faiss where it is installed."""

from __future__ import annotations

import functools
import importlib.util
import math

import pytest
import torch
from torch import Tensor

from syncmask_fast import ops

WIDTH = 256
CASES = {"cpu": [64, 16_384], "cuda": [64, 65_536]}  # anchors, and as many candidates
FAISS_K = 32  # neighbors to search for; those that are not eligible are dropped


def eager(
    anchors: Tensor, candidates: Tensor, ids: Tensor, other_ids: Tensor, positive: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The plain way: the whole similarity matrix, a mask, top-k."""
    similarity = (anchors @ candidates.T).float()
    eligible = (ids[:, None] != other_ids) & (similarity < positive[:, None])
    score, index = similarity.masked_fill(~eligible, -math.inf).topk(k, 1)
    return index.masked_fill(score == -math.inf, -1), score


def bare_product(
    anchors: Tensor,
    candidates: Tensor,
    ids: Tensor,
    other_ids: Tensor,
    positive: Tensor,
    k: int,
    out: dict = {},  # noqa: B006 (kept)
) -> Tensor:
    shape = len(anchors), len(candidates)
    if out.get("shape") != (shape, anchors.dtype, anchors.device):
        out.update(shape=(shape, anchors.dtype, anchors.device), tensor=anchors.new_empty(shape))
    return torch.mm(anchors, candidates.T, out=out["tensor"])


def product(anchors: Tensor, candidates: Tensor, ids: Tensor, other_ids: Tensor, positive: Tensor, k: int) -> Tensor:
    """The same as a user writes it: the result goes to memory of its own."""
    return anchors @ candidates.T


def with_faiss(
    anchors: Tensor, candidates: Tensor, ids: Tensor, other_ids: Tensor, positive: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Not exact: an anchor with fewer than k eligible among its first FAISS_K neighbors gets fewer."""
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    index.add(candidates.numpy())
    score, neighbor = map(torch.from_numpy, index.search(anchors.numpy(), min(FAISS_K, len(candidates))))
    eligible = (other_ids[neighbor] != ids[:, None]) & (score < positive[:, None])
    first = eligible.int().argsort(dim=1, descending=True, stable=True)[:, :k]
    kept = eligible.gather(1, first)
    return neighbor.gather(1, first).masked_fill(~kept, -1), score.gather(1, first).masked_fill(~kept, -math.inf)


def ours(
    anchors: Tensor, candidates: Tensor, ids: Tensor, other_ids: Tensor, positive: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    return ops.mine_semi_hard(anchors, candidates, ids, other_ids, positive, k=k)


PROVIDERS = {
    "ours": ours,
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
    "gemm": bare_product,
    "product": product,
    "faiss": with_faiss,
}


def draw(n: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """n pairs of features, four of each product: those of a product are alike, and the positive is one of them."""
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.arange(n, device=device) // 4
    products = torch.randn(n // 4 + 1, WIDTH, generator=generator, device=device)
    anchors, candidates = (
        torch.nn.functional.normalize(products[ids] + torch.randn(n, WIDTH, generator=generator, device=device), dim=1)
        for _ in range(2)
    )
    return anchors.to(dtype), candidates.to(dtype), ids, ids, (anchors * candidates).sum(1)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("large", [False, True], ids=["batch", "dataset"])
def test_mine_semi_hard(large, k, provider, device, benchmark, measured):
    if provider == "faiss" and (device.type == "cuda" or importlib.util.find_spec("faiss") is None):
        pytest.skip("faiss is measured on the CPU, where it is installed")
    measured.require_green("mine_semi_hard")
    torch.compiler.reset()
    n = CASES[device.type][large]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    measured.measure(
        benchmark,
        operator="mine_semi_hard",
        provider=provider,
        case=dict(N=n, M=n, D=WIDTH, k=k),
        make=lambda seed: draw(n, dtype, device, seed),
        function=functools.partial(PROVIDERS[provider], k=k),
        flops=2 * n * n * WIDTH,
        cold=not large,
    )


def test_the_plain_way_gives_the_same_negatives():
    inputs = draw(100, torch.float32, torch.device("cpu"), 0)
    index, score = ours(*inputs, 5)
    for other_index, other_score in (
        eager(*inputs, 5),
        *([with_faiss(*inputs, 5)] if importlib.util.find_spec("faiss") else []),
    ):
        assert index.equal(other_index)
        torch.testing.assert_close(score, other_score)
