"""group_semi_hard against one product of its size, GRIT-VLP's walk, and the same walk in PyTorch calls."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast import ops

# N, D: GRIT-VLP's search space, a wider one, and FashionGen whole, which takes minutes on a CPU.
SHAPES = [(1920, 256), (4800, 256)]
WHOLE = (260_000, 256)
BATCH = 64


def ours(images: Tensor, texts: Tensor, ids: Tensor) -> Tensor:
    return ops.group_semi_hard(images, texts, ids, batch_size=BATCH)


def reference(images: Tensor, texts: Tensor, ids: Tensor) -> Tensor:
    return ops.group_semi_hard(images, texts, ids, batch_size=BATCH, backend="reference")


def bare_product(images: Tensor, texts: Tensor, ids: Tensor, out: dict = {}) -> Tensor:  # noqa: B006 (kept between calls)
    if out.get("key") != (len(ids), ids.device):
        out.update(key=(len(ids), ids.device), tensor=images.new_empty(len(ids), len(ids)))
    return torch.mm(images, texts.T, out=out["tensor"])


def grit_vlp(images: Tensor, texts: Tensor, ids: Tensor) -> list[int]:
    """GRIT-VLP's walk, without products and thresholds: whole matrices of probabilities, one step at a time."""
    similarity = images @ texts.T / 0.07
    probabilities = similarity.softmax(1), similarity.T.softmax(1)
    return grit_vlp_loop(*probabilities)


def grit_vlp_loop(of_image: Tensor, of_text: Tensor) -> list[int]:
    order = [0]
    for position in range(1, len(of_image)):
        of_image[:, order[-1]] = 0
        of_text[:, order[-1]] = 0
        order.append(int((of_image if position % 2 else of_text)[order[-1]].argmax()))
    return order


PROVIDERS = {"ours": ours, "gemm": bare_product, "grit-vlp": grit_vlp, "reference": reference}


def measure(shape, provider, device, benchmark, measured) -> None:
    measured.require_green("group_semi_hard")
    n, d = shape

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        images, texts = (F.normalize(torch.randn(n, d, generator=generator, device=device), dim=1) for _ in range(2))
        return images, texts, torch.arange(n, device=device)

    measured.measure(
        benchmark,
        operator="group_semi_hard",
        provider=provider,
        case=dict(N=n, D=d),
        make=make,
        function=PROVIDERS[provider],
        flops=2 * n * n * d,
        cold=False,  # a call reads its inputs once and works for long
        rounds=1 if shape == WHOLE else 5,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_semi_hard(shape, provider, device, benchmark, measured):
    measure(shape, provider, device, benchmark, measured)


@pytest.mark.skipif("SYNCMASK_BENCH_WHOLE" not in os.environ, reason="takes minutes: set SYNCMASK_BENCH_WHOLE=1")
def test_whole(device, benchmark, measured):
    measure(WHOLE, "ours", device, benchmark, measured)


def test_grit_vlp_gives_the_same_order():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(50, 8, generator=generator), dim=1) for _ in range(2))
    ids = torch.arange(50)
    assert grit_vlp(images, texts, ids) == ops.group_semi_hard(images, texts, ids, margin=-torch.inf).tolist()
