"""packed_attention, forward and backward, against PyTorch's attention on padded sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.kernels.packed_attention import packed_attention

# Sequences, shortest and longest, heads, head width: a ViT-B at 256 px; texts of the lookbook in `tiny` and in `base`.
CASES = [(8, 257, 257, 12, 64), (64, 12, 50, 4, 64), (64, 12, 50, 12, 64)]


def ours(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    return packed_attention(q, k, v, starts, starts)


def padded(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Rows to [N, longest], `scaled_dot_product_attention` with a mask of the padding, and back."""
    lengths = starts.diff()
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    batch = [x.new_zeros(*valid.shape, *x.shape[1:]).masked_scatter(valid[..., None, None], x) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in batch), attn_mask=valid[:, None, None])
    return out.transpose(1, 2)[valid]


PROVIDERS = {"ours": ours, "sdpa padded": padded}


def draw(case: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    count, shortest, longest, heads, width = case
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = (torch.randn(int(starts[-1]), heads, width, generator=generator).to(dtype) for _ in range(3))
    return *(x.requires_grad_() for x in (q, k, v)), starts


def forward_and_backward(provider: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    found = PROVIDERS[provider](*inputs)
    return torch.autograd.grad(found, inputs[:3], torch.ones_like(found))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_attention(case, dtype, provider, device, benchmark, measured):
    if device.type == "cuda":
        pytest.skip("the kernel is for the CPU")
    measured.require_green("packed_attention")
    count, shortest, longest, heads, width = case
    lengths = draw(case, dtype, 0)[3].diff().double()
    measured.measure(
        benchmark,
        operator="packed_attention",
        provider=provider,
        case=dict(N=count, tokens=f"{shortest}-{longest}", H=heads, D=width),
        make=lambda seed: draw(case, dtype, seed),
        function=lambda *inputs: forward_and_backward(provider, *inputs),
        flops=float(7 * 2 * heads * width * (lengths**2).sum()),  # products: 2 forward, 5 backward
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padded_gives_the_same(case):
    inputs = draw(case, torch.float32, 0)
    torch.testing.assert_close(ours(*inputs), padded(*inputs))
    for mine, theirs in zip(*(forward_and_backward(name, *inputs) for name in PROVIDERS), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
