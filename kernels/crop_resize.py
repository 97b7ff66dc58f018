"""What the loader does to a decoded image, as one operator of csrc/crop_resize.cpp; it has no public face and no reference of its own
(the torchvision way, data/render.py, does the same)."""

from __future__ import annotations

import torch

from syncmask_fast import _native

# image: uint8 [H, W, 3].     out: float32 [3, S, S], which is overwritten.     scale, shift: float32 [3].
# out = scale * level + shift, where the levels (whole, 0 to 255) are those of the crop x, y, width, height after an antialiased
# bilinear resize (triangle filter, half-pixel centres), mirrored if flip, with saturation, contrast around 128, and brightness changed.
torch.library.define(
    "syncmask::crop_resize",
    "(Tensor image, int x, int y, int width, int height, bool flip, float brightness, float contrast, float saturation, "
    "Tensor scale, Tensor shift, Tensor(a!) out) -> ()",
)
_native.load()  # after the schema above, which the kernel belongs to
crop_resize = torch.ops.syncmask.crop_resize.default
LARGEST_SIDE = 1 << 16  # of the crop and of S: kLargestSide of csrc/crop_resize.cpp
