"""What the loader does to a decoded image, in one pass: crop, antialiased resize, flip, color changes, normalization.

    level = round(resize(crop of the image)), mirrored if flip
    grey  = 0.299 red + 0.587 green + 0.114 blue
    level = clamp(round(brightness * (contrast * (saturation * level + (1 - saturation) * grey - 128) + 128)), 0, 255)
    out   = scale * level + shift

The second and third line are left out where all three factors are 1. The resize is bilinear with antialiasing (a
triangle filter, half-pixel centers), as Pillow's and torchvision's. Letters: H, W size of the image, S of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.kernels import library

LARGEST_SIDE = 1 << 16  # of the crop and of S: kLargestSide of csrc/crop_resize.cpp
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def crop_resize_reference(
    image: Tensor,
    x: int,
    y: int,
    width: int,
    height: int,
    flip: bool,
    brightness: float,
    contrast: float,
    saturation: float,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
) -> None:
    """Write to `out` by the definition of `crop_resize` in plain PyTorch."""
    _check(image, x, y, width, height, scale, shift, out)
    crop = image[y : y + height, x : x + width].permute(2, 0, 1)[None].double()  # float32 rounds some levels wrongly
    level = F.interpolate(crop, size=out.shape[1:], mode="bilinear", antialias=True)[0].round().float()
    if flip:
        level = level.flip(2)
    if (brightness, contrast, saturation) != (1, 1, 1):
        grey = torch.einsum("c,chw->hw", level.new_tensor(_GREY), level)
        level = saturation * level + (1 - saturation) * grey
        level = (brightness * (contrast * (level - 128) + 128)).round().clamp(0, 255)
    torch.addcmul(shift[:, None, None], scale[:, None, None], level, out=out)


OPS = library.define(
    "crop_resize",
    "(Tensor image, int x, int y, int width, int height, bool flip, float brightness, float contrast, "
    "float saturation, Tensor scale, Tensor shift, Tensor(a!) out) -> ()",
    fake=lambda *args: None,
    reference=crop_resize_reference,
)


def crop_resize(
    image: Tensor,
    x: int,
    y: int,
    width: int,
    height: int,
    flip: bool,
    brightness: float,
    contrast: float,
    saturation: float,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write a crop of an image to `out`, resized, with colors changed and normalized (formula: module docstring).

    image:      uint8 [H, W, 3], contiguous.
    x, y, width, height: the crop in pixels, within the image; at most LARGEST_SIDE wide and high.
    flip:       whether left and right are exchanged.
    brightness, contrast, saturation: factors; 1 changes nothing. Contrast is around 128.
    scale, shift: float32 [3], contiguous, for the three colors.
    out:        float32 [3, S, S], contiguous; overwritten. S is at most LARGEST_SIDE.
    errors:     ValueError for shape, dtype, strides, a crop outside the image, a backend that is not built.
    memory:     a band of 16 rows for each thread. Other Python threads run meanwhile.
    runs:       C++ on the CPU; elsewhere the reference, with one warning.
    source:     our own; the filter is Pillow's.
    """
    op = OPS.pick(backend, image.device)
    try:
        op(image, x, y, width, height, flip, brightness, contrast, saturation, scale, shift, out)
    except RuntimeError:  # the loader calls this for every image: only refused arguments are worth a look from Python
        _check(image, x, y, width, height, scale, shift, out)
        raise


def _check(image: Tensor, x: int, y: int, width: int, height: int, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3 or not image.is_contiguous():
        raise ValueError(f"image is {_kind(image)}; expected contiguous uint8 [H, W, 3]")
    if out.dtype != torch.float32 or out.dim() != 3 or not out.is_contiguous():
        raise ValueError(f"out is {_kind(out)}; expected contiguous float32 [3, S, S]")
    colors, size, columns = out.shape
    if colors != 3 or size != columns or size == 0:
        raise ValueError(f"out is {_kind(out)}; expected contiguous float32 [3, S, S]")
    for name, value in (("scale", scale), ("shift", shift)):
        if value.dtype != torch.float32 or value.shape != (3,) or not value.is_contiguous():
            raise ValueError(f"{name} is {_kind(value)}; expected contiguous float32 [3]")
    rows, columns, _ = image.shape
    if not (0 <= x <= x + width <= columns and 0 <= y <= y + height <= rows and width >= 1 and height >= 1):
        crop = f"{width} x {height} at ({x}, {y})"
        raise ValueError(f"the crop is {crop}; expected one within the image of {columns} x {rows}")
    if max(width, height, size) > LARGEST_SIDE:
        raise ValueError(f"a side is {max(width, height, size)} pixels; expected at most {LARGEST_SIDE}")


def _kind(x: Tensor) -> str:
    """Describe a tensor for an error message."""
    layout = "contiguous" if x.is_contiguous() else f"with strides {list(x.stride())}"
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} {layout}"
