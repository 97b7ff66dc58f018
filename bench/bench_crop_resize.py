"""crop_resize against torchvision's crop, resize and flip, with color changes and normalization in PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from syncmask_fast.kernels.crop_resize import crop_resize

# Height and width of the image, crop (x, y, width, height), S: the lookbook in `tiny`, FashionGen, a shop's photo.
CASES = [(256, 256, (0, 0, 230, 230), 96), (256, 256, (10, 20, 230, 200), 224), (1200, 900, (50, 60, 800, 800), 256)]
FACTORS = 1.1, 0.9, 0.8  # brightness, contrast, saturation
SCALE, SHIFT = torch.tensor([0.02, 0.018, 0.017]), torch.tensor([-2.1, -2.0, -1.8])


def ours(image: Tensor, crop: tuple[int, int, int, int], out: Tensor) -> None:
    crop_resize(image, *crop, True, *FACTORS, SCALE, SHIFT, out)


def torchvision(image: Tensor, crop: tuple[int, int, int, int], out: Tensor) -> None:
    x, y, width, height = crop
    brightness, contrast, saturation = FACTORS
    part = image.permute(2, 0, 1)[:, y : y + height, x : x + width]
    part = functional.resize(part, list(out.shape[1:]), antialias=True)
    part = functional.horizontal_flip(part).float()
    grey = torch.einsum("c,chw->hw", torch.tensor([0.299, 0.587, 0.114]), part)
    part = part.mul_(brightness * contrast * saturation).add_(grey, alpha=brightness * contrast * (1 - saturation))
    part = part.add_(brightness * (1 - contrast) * 128).round_().clamp_(0, 255)
    torch.addcmul(SHIFT[:, None, None], SCALE[:, None, None], part, out=out)


PROVIDERS = {"ours": ours, "torchvision": torchvision}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_crop_resize(case, provider, device, benchmark, measured):
    if device.type == "cuda":
        pytest.skip("the kernel is for the CPU")
    measured.require_green("crop_resize")
    height, width, crop, size = case
    out = torch.empty(3, size, size)

    def make(seed: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator),)

    measured.measure(
        benchmark,
        operator="crop_resize",
        provider=provider,
        case=dict(H=height, W=width, crop="x".join(map(str, crop[2:])), S=size),
        make=make,
        function=lambda image: PROVIDERS[provider](image, crop, out),
        flops=0,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchvision_gives_the_same(case):
    """To within 2 levels of 255: torchvision rounds between its two directions."""
    height, width, crop, size = case
    image = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = torch.empty(2, 3, size, size)
    for run, place in zip(PROVIDERS.values(), out, strict=True):
        run(image, crop, place)
    levels = (out[0] - out[1]) / SCALE[:, None, None]
    assert levels.abs().max() < 2.01
    assert levels.abs().mean() < 0.5
