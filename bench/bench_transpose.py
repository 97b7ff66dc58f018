"""transpose against PyTorch's contiguous copy of a transposed matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncmask_fast.kernels.transpose import transpose

# Rows and columns: gradients and inputs of linear layers in `tiny` (64 pairs, 37 patches) and in `base` (8 pairs).
SHAPES = [(2368, 256), (2368, 1024), (2056, 768), (2056, 3072)]


def copy(x: Tensor) -> Tensor:
    return x.t().contiguous()


PROVIDERS = {"ours": transpose, "t().contiguous()": copy}


def draw(shape: tuple[int, int], seed: int) -> tuple[Tensor]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16(),)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transpose(shape, provider, device, benchmark, measured):
    if device.type == "cuda":
        pytest.skip("the kernel is for the CPU")
    measured.require_green("transpose")
    measured.measure(
        benchmark,
        operator="transpose",
        provider=provider,
        case=dict(R=shape[0], C=shape[1]),
        make=lambda seed: draw(shape, seed),
        function=PROVIDERS[provider],
        flops=0,
    )


def test_the_copy_is_the_same():
    (x,) = draw((37, 101), 0)
    assert transpose(x).equal(copy(x))
