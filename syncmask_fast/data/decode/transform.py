"""From one encoded image to its pixels in a batch, in two ways that agree to within a level of 255.

torchvision: Pillow decodes, torchvision resizes, numpy does the rest. Runs everywhere; all other ways must equal it. (torchvision's own readers
             are deprecated (0.29), and its PNG reader ends the process by a segmentation fault on a PNG with zeroed bytes in the middle.)
native:      simplejpeg (libjpeg-turbo) decodes into memory that is used again, and csrc/crop_resize.cpp does all the rest in one go.
             What simplejpeg refuses goes to Pillow, so that the same images are damaged; a broken header that libjpeg-turbo reads and Pillow
             does not is the one exception.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from syncmask_fast import _native
from syncmask_fast.data.augment import AugmentParams
from syncmask_fast.data.decode.base import check_crop
from syncmask_fast.data.images import MAX_PIXELS, decode_image, image_format
from syncmask_fast.kernels.crop_resize import LARGEST_SIDE, crop_resize

KEPT_BYTES = 1 << 24  # of a decoded image, for each thread; a larger image gets fresh memory
CONVERTED = ("YCbCr", "Gray", "RGB")  # what simplejpeg converts to RGB as Pillow does: CMYK it does not
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as DALI and torchvision have it


class TorchvisionTransform:
    """mean, std: of the three colours on a scale of 0 to 1; the pixels are normalised with them. See `decode_threads.Renderer`."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        std_255 = 255 * np.array(std, np.float32)
        self.scale, self.shift = 1 / std_255, -255 * np.array(mean, np.float32) / std_255

    def __call__(self, encoded: bytes, params: AugmentParams, row: int, pixels: Tensor) -> None:
        decoded = decode_image(encoded)
        check_crop(params, row, decoded)
        self.transform(decoded, params, row, pixels)

    def transform(self, decoded: np.ndarray, params: AugmentParams, row: int, pixels: Tensor) -> None:
        """decoded: uint8 [H, W, 3], which holds the crop."""
        image = torch.from_numpy(decoded).permute(2, 0, 1)  # channels last, which resize has a fast way for
        x, y, width, height = _crop(params, row)
        image = functional.resize(image[:, y : y + height, x : x + width], list(pixels.shape[1:]), antialias=True)
        if params.flip[row]:
            image = functional.horizontal_flip(image)
        out = pixels.numpy()
        np.copyto(out, image.numpy())
        factors = params.brightness[row], params.contrast[row], params.saturation[row]
        if factors != (1, 1, 1):
            change_colours(out, *factors)
        out *= self.scale[:, None, None]
        out += self.shift[:, None, None]


class CppTransform(TorchvisionTransform):
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(mean, std)
        self._scale, self._shift = torch.from_numpy(self.scale), torch.from_numpy(self.shift)
        self._decode = JpegDecoder()

    def transform(self, decoded: np.ndarray, params: AugmentParams, row: int, pixels: Tensor) -> None:
        x, y, width, height = _crop(params, row)
        if max(width, height) > LARGEST_SIDE:
            super().transform(decoded, params, row, pixels)
            return
        colours = float(params.brightness[row]), float(params.contrast[row]), float(params.saturation[row])
        image = torch.from_numpy(decoded)
        crop_resize(image, x, y, width, height, bool(params.flip[row]), *colours, self._scale, self._shift, pixels)

    def __call__(self, encoded: bytes, params: AugmentParams, row: int, pixels: Tensor) -> None:
        decoded = self._decode(encoded)
        check_crop(params, row, decoded)
        self.transform(decoded, params, row, pixels)


class JpegDecoder:
    """Decodes as `decode_image` does and with the same errors, JPEGs faster, into memory of the thread that the next call overwrites.
    The bytes are the same. errors: ImportError where simplejpeg is missing."""

    def __init__(self) -> None:
        import simplejpeg

        self._read_header, self._decode, self._thread = (
            simplejpeg.decode_jpeg_header,
            simplejpeg.decode_jpeg,
            threading.local(),
        )

    def __call__(self, encoded: bytes) -> np.ndarray:
        if image_format(encoded) == "jpg":
            try:
                height, width, colours, _ = self._read_header(encoded)
                if colours in CONVERTED and height * width <= MAX_PIXELS:
                    return self._decode(encoded, "RGB", buffer=self._memory(3 * width * height), strict=True)
            except ValueError:  # damage, of which Pillow may read some
                pass
        return decode_image(encoded)

    def _memory(self, size: int) -> np.ndarray:
        if size > KEPT_BYTES:
            return np.empty(size, np.uint8)
        memory = getattr(self._thread, "memory", None)
        if memory is None or len(memory) < size:
            memory = self._thread.memory = np.empty(size, np.uint8)
        return memory


def why_cpp_unavailable() -> str | None:
    """Why the native way cannot be used here and how to get it, or None if it can."""
    if not _native.is_loaded():
        return _native.describe()
    try:
        import simplejpeg  # noqa: F401
    except Exception as error:  # a build for another numpy raises ValueError, not ImportError
        return f"{error}; to have it, `pip install simplejpeg`"
    return None


def _crop(params: AugmentParams, row: int) -> tuple[int, int, int, int]:
    return int(params.x[row]), int(params.y[row]), int(params.width[row]), int(params.height[row])


def change_colours(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> None:
    """Changes float32 [3, H, W] of values 0 to 255 in place, as DALI's color_twist does: saturation, contrast
    around 128, brightness, then rounding and clipping to 0 to 255. (torchvision's jitter turns contrast
    around the image's mean grey instead.)"""
    grey = np.tensordot(_GREY, image, 1)
    image *= brightness * contrast * saturation
    grey *= brightness * contrast * (1 - saturation)
    grey += brightness * (1 - contrast) * 128
    image += grey
    np.rint(image, out=image)
    np.clip(image, 0, 255, out=image)
