"""From one encoded image to its pixels in a batch, by two transforms that agree to within one 8-bit level.

torchvision: Pillow decodes, torchvision resizes, numpy does the rest. Runs everywhere; the others must equal it.
cpp:         simplejpeg (libjpeg-turbo) decodes into reused memory, and csrc/crop_resize.cpp does the rest in one pass.
             Pillow decodes what simplejpeg refuses, so both fail on the same images. Exception: a broken header that
             libjpeg-turbo reads and Pillow does not.
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
from syncmask_fast.utils.errors import one_line

# torchvision's own image readers are deprecated (0.29), and its PNG reader crashes on a PNG with zeroed bytes inside.

BUFFER_BYTES = 1 << 24  # for a decoded image, in each thread; a larger image gets fresh memory
CONVERTED = ("YCbCr", "Gray", "RGB")  # simplejpeg converts these to RGB as Pillow does, but not CMYK
_GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in DALI and torchvision


class TorchvisionTransform:
    """An `ImageTransform`. mean, std: of red, green and blue on a scale of 0 to 1, for normalization."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        std_255 = 255 * np.array(std, np.float32)
        self.scale, self.shift = 1 / std_255, -255 * np.array(mean, np.float32) / std_255

    def __call__(self, encoded: bytes, params: AugmentParams, row: int, pixels: Tensor) -> None:
        decoded = self.decode(encoded)
        check_crop(params, row, decoded)
        self.transform(decoded, params, row, pixels)

    def decode(self, encoded: bytes) -> np.ndarray:
        """Return uint8 [H, W, 3]. errors: ValueError."""
        return decode_image(encoded)

    def transform(self, decoded: np.ndarray, params: AugmentParams, row: int, pixels: Tensor) -> None:
        """Fill pixels float32 [3, S, S] from decoded uint8 [H, W, 3], which contains the crop."""
        image = torch.from_numpy(decoded).permute(2, 0, 1)  # channels last, for which resize is fast
        x, y, width, height = _crop(params, row)
        image = functional.resize(image[:, y : y + height, x : x + width], list(pixels.shape[1:]), antialias=True)
        if params.flip[row]:
            image = functional.horizontal_flip(image)
        out = pixels.numpy()
        np.copyto(out, image.numpy())
        factors = params.brightness[row], params.contrast[row], params.saturation[row]
        if factors != (1, 1, 1):
            change_colors(out, *factors)
        out *= self.scale[:, None, None]
        out += self.shift[:, None, None]


class CppTransform(TorchvisionTransform):
    """The same by compiled code. errors: ImportError without simplejpeg."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(mean, std)
        self._scale, self._shift = torch.from_numpy(self.scale), torch.from_numpy(self.shift)
        self.decode = JpegDecoder()

    def transform(self, decoded: np.ndarray, params: AugmentParams, row: int, pixels: Tensor) -> None:
        x, y, width, height = _crop(params, row)
        if max(width, height) > LARGEST_SIDE:
            super().transform(decoded, params, row, pixels)
            return
        factors = float(params.brightness[row]), float(params.contrast[row]), float(params.saturation[row])
        image = torch.from_numpy(decoded)
        crop_resize(image, x, y, width, height, bool(params.flip[row]), *factors, self._scale, self._shift, pixels)


class JpegDecoder:
    """Decode like `decode_image`, but JPEGs faster, into memory of the thread that the next call overwrites.

    Bytes and errors are the same. errors: ImportError without simplejpeg.
    """

    def __init__(self) -> None:
        import simplejpeg

        self._read_header, self._decode = simplejpeg.decode_jpeg_header, simplejpeg.decode_jpeg
        self._thread = threading.local()

    def __call__(self, encoded: bytes) -> np.ndarray:
        if image_format(encoded) == "jpg":
            try:
                height, width, color_space, _ = self._read_header(encoded)
                if color_space in CONVERTED and height * width <= MAX_PIXELS:
                    return self._decode(encoded, "RGB", buffer=self._memory(3 * width * height), strict=True)
            except ValueError:  # damage, of which Pillow may read some
                pass
        return decode_image(encoded)

    def _memory(self, size: int) -> np.ndarray:
        if size > BUFFER_BYTES:
            return np.empty(size, np.uint8)
        memory = getattr(self._thread, "memory", None)
        if memory is None or len(memory) < size:
            memory = self._thread.memory = np.empty(size, np.uint8)
        return memory


def why_cpp_unavailable() -> str | None:
    """Return why the cpp transform cannot be used here and how to get it, or None if it can."""
    if not _native.is_loaded():
        return _native.describe()
    try:
        import simplejpeg  # noqa: F401
    except Exception as error:  # a build for another numpy raises ValueError, not ImportError
        return f"{one_line(error)}; `pip install simplejpeg`"
    return None


def _crop(params: AugmentParams, row: int) -> tuple[int, int, int, int]:
    return int(params.x[row]), int(params.y[row]), int(params.width[row]), int(params.height[row])


def change_colors(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> None:
    """Change float32 [3, H, W] of values 0 to 255 in place, like DALI's color_twist.

    Saturation, contrast around 128, brightness, then rounding and clipping to 0 to 255. (torchvision's jitter changes
    contrast around the image's mean gray instead.)
    """
    gray = np.tensordot(_GRAY, image, 1)
    image *= brightness * contrast * saturation
    gray *= brightness * contrast * (1 - saturation)
    gray += brightness * (1 - contrast) * 128
    image += gray
    np.rint(image, out=image)
    np.clip(image, 0, 255, out=image)
