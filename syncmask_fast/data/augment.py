"""The crop, flip and color change of each image of an epoch: a pure function of (seed, epoch, position).

The random numbers are counter-based (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
They do not depend on batch size, number of workers or resumes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from syncmask_fast.utils.errors import UserError

ATTEMPTS = 10  # tries for a crop that fits, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training samples. No hue: texts name colors."""

    scale: tuple[float, float] = (0.6, 1.0)
    """Range of the crop's area as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, uniform in its logarithm."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    brightness: float = 0.2
    """Range of the brightness factor, 1 - x to 1 + x."""
    contrast: float = 0.2
    """Range of the contrast factor, 1 - x to 1 + x."""
    saturation: float = 0.2
    """Range of the saturation factor, 1 - x to 1 + x."""
    token_dropout: float = 0.0
    """Probability of leaving out each token, drawn in each epoch."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UserError(f"--augment.scale is {self.scale}. Give two fractions with 0 < low <= high <= 1.")
        low, high = self.ratio
        if not 0 < low <= high < math.inf:
            raise UserError(f"--augment.ratio is {self.ratio}. Give two positive numbers, low before high.")
        for name in ("flip", "brightness", "contrast", "saturation", "token_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--augment.{name.replace('_', '-')} is {getattr(self, name)}. Give 0 to 1.")

    @property
    def changes_colors(self) -> bool:
        """Whether brightness, contrast or saturation vary."""
        return max(self.brightness, self.contrast, self.saturation) > 0


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation of B images: a crop of the stored image; after the resize, colors and a flip."""

    x: np.ndarray
    """int32 [B], left side of the crop."""
    y: np.ndarray
    """int32 [B], top side of the crop."""
    width: np.ndarray
    """int32 [B], of the crop."""
    height: np.ndarray
    """int32 [B], of the crop."""
    flip: np.ndarray
    """bool [B]."""
    brightness: np.ndarray
    """float32 [B], a factor; 1 changes nothing."""
    contrast: np.ndarray
    """float32 [B], a factor."""
    saturation: np.ndarray
    """float32 [B], a factor."""

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: np.ndarray) -> AugmentParams:
        """Return the parameters of some of the images. rows: int64 [n] or bool [B]."""
        return AugmentParams(**{name: values[rows] for name, values in vars(self).items()})


def sample_augmentations(
    seed: int, epoch: int, positions: np.ndarray, widths: np.ndarray, heights: np.ndarray, config: AugmentConfig
) -> AugmentParams:
    """Draw a random resized crop, a flip and color factors for each position of an epoch.

    seed, epoch:     0 <= seed < 2**64; 0 <= epoch < 2**32.
    positions:       int64 [B], positions in the epoch (of all ranks), each 0 or more.
    widths, heights: int [B], sizes of the stored images in pixels.
    source:          the crop is torchvision's RandomResizedCrop; the random numbers differ.
    """
    widths, heights, positions = np.asarray(widths, np.int64), np.asarray(heights, np.int64), np.asarray(positions)
    # 1. Ten tries: area uniform, ratio uniform in its logarithm. The first that fits is used.
    tries = _uniform(seed, epoch, positions, np.arange(ATTEMPTS))  # [10, B, 4]
    area = widths * heights * (config.scale[0] + (config.scale[1] - config.scale[0]) * tries[..., 0])
    log_low, log_high = np.log(config.ratio)
    ratio = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    first, rows, any_fits = fits.argmax(0), np.arange(len(widths)), fits.any(0)
    # 2. Otherwise the largest centered crop of a legal ratio.
    full_width = np.minimum(widths, np.maximum(1, np.rint(heights * config.ratio[1]))).astype(np.int64)
    full_height = np.minimum(heights, np.maximum(1, np.rint(widths / config.ratio[0]))).astype(np.int64)
    width = np.where(any_fits, width[first, rows], full_width)
    height = np.where(any_fits, height[first, rows], full_height)
    x = np.where(any_fits, np.floor(tries[first, rows, 2] * (widths - width + 1)), (widths - width) // 2)
    y = np.where(any_fits, np.floor(tries[first, rows, 3] * (heights - height + 1)), (heights - height) // 2)
    # 3. Flip and color factors from a block of their own.
    draws = _uniform(seed, epoch, positions, np.array([ATTEMPTS]))[0]  # [B, 4]
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    factors = (1 + strengths * (2 * draws[:, 1:] - 1)).astype(np.float32)
    crop = (values.astype(np.int32) for values in (x, y, width, height))
    return AugmentParams(*crop, draws[:, 0] < config.flip, *np.ascontiguousarray(factors.T))


def token_dropout_mask(
    seed: int, epoch: int, positions: np.ndarray, lengths: np.ndarray, token_dropout: float
) -> np.ndarray:
    """Draw which tokens stay: bool [total], of concatenated texts. The first and last token of a text always stay.

    positions: int64 [B], positions in the epoch. lengths: int [B], tokens of each text, [CLS] and [SEP] included.
    """
    longest = int(lengths.max(initial=1))
    blocks = ATTEMPTS + 1 + np.arange(-(-longest // 4))  # after those of `sample_augmentations`
    draws = _uniform(seed, epoch, np.asarray(positions), blocks)  # [ceil(L / 4), B, 4]
    keep = draws.transpose(1, 0, 2).reshape(len(lengths), -1)[:, :longest] >= token_dropout
    column = np.arange(longest)
    keep |= (column == 0) | (column == lengths[:, None] - 1)
    return keep[column < lengths[:, None]]


def no_augmentation(widths: np.ndarray, heights: np.ndarray) -> AugmentParams:
    """Return the parameters for evaluation: the whole image, only resized."""
    count = len(widths)
    zero, one = np.zeros(count, np.int32), np.ones(count, np.float32)
    return AugmentParams(
        zero, zero, np.asarray(widths, np.int32), np.asarray(heights, np.int32), np.zeros(count, bool), one, one, one
    )


def _uniform(seed: int, epoch: int, positions: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return numbers in (0, 1): float64 [draws, B, 4], one block of Philox for each draw and position."""
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
    """Return Philox4x32-10 of Random123. counter, and the result: uint64 [4, ...] of 32-bit words."""
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
