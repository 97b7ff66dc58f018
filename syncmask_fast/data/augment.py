"""Which crop, flip and colour change each image of an epoch gets: a pure function of (seed, epoch, position).

The random numbers are counter-based (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), so the same position gets the same change for any batch size, any number of workers and after any
resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from syncmask_fast.utils.errors import UserError

ATTEMPTS = 10  # tries for a crop that fits, as torchvision's RandomResizedCrop has


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly training images are varied. No hue: texts name colours."""

    scale: tuple[float, float] = (0.6, 1.0)  # share of the image's area in the crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop, drawn evenly in its logarithm
    flip: float = 0.5  # probability of left-right mirroring
    brightness: float = 0.2  # factor drawn from 1 - x to 1 + x, and so on
    contrast: float = 0.2
    saturation: float = 0.2
    token_dropout: float = 0.0  # share of the words that is left out of each text, anew in each epoch

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UserError(f"augment.scale must be two shares with 0 < low <= high <= 1, not {self.scale}")
        low, high = self.ratio
        if not 0 < low <= high < math.inf:
            raise UserError(f"augment.ratio must be two positive numbers, low before high, not {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise UserError(f"augment.flip must lie in 0 to 1, not {self.flip}")
        for name in ("brightness", "contrast", "saturation", "token_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} must lie in 0 to 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class AugmentParams:
    """What is done to B images: a crop in pixels of the stored image; after the resize, colours and a flip.

    x, y, width, height:              int32 [B], a window of at least 1 x 1 within the image
    flip:                             bool [B]
    brightness, contrast, saturation: float32 [B], factors; 1 changes nothing
    """

    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    height: np.ndarray
    flip: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: np.ndarray) -> AugmentParams:
        """The same for some of the images. rows: int64 [n] or bool [B]."""
        return AugmentParams(**{name: values[rows] for name, values in vars(self).items()})


def sample_augmentations(
    seed: int, epoch: int, positions: np.ndarray, widths: np.ndarray, heights: np.ndarray, config: AugmentConfig
) -> AugmentParams:
    """Draws a random resized crop, a flip and colour factors for each position of an epoch.

    seed:      0 <= seed < 2**64.     epoch: 0 <= epoch < 2**32.
    positions: int64 [B], places in the epoch (over all ranks), each 0 or more.
    widths, heights: int [B], sizes of the stored images in pixels.
    source:    the crop is torchvision's RandomResizedCrop (area and log ratio even, up to 10 tries, else the
               largest centred crop of a legal ratio); the numbers differ from torchvision's.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    tries = _uniform(seed, epoch, np.asarray(positions), np.arange(ATTEMPTS))  # [10, B, 4]
    area = widths * heights * (config.scale[0] + (config.scale[1] - config.scale[0]) * tries[..., 0])
    log_low, log_high = np.log(config.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    first = fits.argmax(0)
    rows = np.arange(len(widths))
    found = fits.any(0)
    full_width = np.minimum(widths, np.maximum(1, np.rint(heights * config.ratio[1]))).astype(np.int64)
    full_height = np.minimum(heights, np.maximum(1, np.rint(widths / config.ratio[0]))).astype(np.int64)
    width = np.where(found, width[first, rows], full_width)
    height = np.where(found, height[first, rows], full_height)
    x = np.where(found, np.floor(tries[first, rows, 2] * (widths - width + 1)), (widths - width) // 2)
    y = np.where(found, np.floor(tries[first, rows, 3] * (heights - height + 1)), (heights - height) // 2)
    colour = _uniform(seed, epoch, np.asarray(positions), np.array([ATTEMPTS]))[0]  # [B, 4]
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    factors = (1 + strengths * (2 * colour[:, 1:] - 1)).astype(np.float32)
    return AugmentParams(
        *(values.astype(np.int32) for values in (x, y, width, height)),
        colour[:, 0] < config.flip,
        *np.ascontiguousarray(factors.T),
    )


def token_dropout_mask(
    seed: int, epoch: int, positions: np.ndarray, lengths: np.ndarray, token_dropout: float
) -> np.ndarray:
    """Draws which tokens of each text stay: bool [total], the texts' tokens behind each other; the first and the last always stay.

    positions: int64 [B], places in the epoch.     lengths: int [B], tokens of each text, [CLS] and [SEP] included.
    """
    longest = int(lengths.max(initial=1))
    draws = _uniform(
        seed, epoch, np.asarray(positions), ATTEMPTS + 1 + np.arange(-(-longest // 4))
    )  # [ceil(L / 4), B, 4]
    keep = draws.transpose(1, 0, 2).reshape(len(lengths), -1)[:, :longest] >= token_dropout
    place = np.arange(longest)
    keep |= (place == 0) | (place == lengths[:, None] - 1)
    return keep[place < lengths[:, None]]


def no_augmentation(widths: np.ndarray, heights: np.ndarray) -> AugmentParams:
    """The evaluation mode: the whole image, unchanged but for the resize."""
    count = len(widths)
    zero, one = np.zeros(count, np.int32), np.ones(count, np.float32)
    return AugmentParams(
        zero, zero, np.asarray(widths, np.int32), np.asarray(heights, np.int32), np.zeros(count, bool), one, one, one
    )


def _uniform(seed: int, epoch: int, positions: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Numbers in (0, 1): float64 [draws, B, 4], one block of Philox for each draw and position."""
    positions = positions.astype(np.uint64)
    shape = (len(draws), len(positions))
    counter = np.empty((4, *shape), np.uint64)
    counter[0] = positions & _LOW
    counter[1] = positions >> _SHIFT
    counter[2] = epoch
    counter[3] = draws.astype(np.uint64)[:, None]
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.moveaxis((words + 0.5) / 2.0**32, 0, -1)


_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of Random123. counter: uint64 [4, ...] holding 32-bit words. returns: the same shape,
    32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])
