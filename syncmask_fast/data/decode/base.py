"""What a decoder takes and returns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.data.augment import AugmentParams


@dataclass
class DecodeRequest:
    """The encoded images of one batch."""

    sample_ids: np.ndarray
    """int64 [B], numbers of the samples in the index."""
    epoch_positions: np.ndarray
    """int64 [B], positions in the epoch."""
    encoded: list[bytes]
    """Each a JPEG, PNG or WebP that `check_image` accepts."""
    params: AugmentParams
    """Of the B images."""
    epoch: int

    def __len__(self) -> int:
        return len(self.sample_ids)

    def without(self, sample_ids: Collection[int]) -> DecodeRequest:
        """Return the request without these samples."""
        keep = np.array([row for row, sample in enumerate(self.sample_ids) if int(sample) not in sample_ids], np.int64)
        encoded = [self.encoded[row] for row in keep]
        return DecodeRequest(
            self.sample_ids[keep], self.epoch_positions[keep], encoded, self.params.take(keep), self.epoch
        )


class Decoder(Protocol):
    """Decodes, crops, resizes, changes colors, flips and normalizes batches of images, in the order of `submit`."""

    backend: str
    """Its name: cpp, dali or torchvision."""
    batch_size: int
    """The largest number of images of a request."""
    device: torch.device
    """Of the pixels."""
    depth: int
    """Requests that may be submitted before the first result is taken."""

    def submit(self, request: DecodeRequest) -> None:
        """Start a batch, without waiting for it."""

    def result(self) -> tuple[DecodeRequest, Tensor, dict[int, str]]:
        """Wait for the oldest batch.

        returns: the request without the images that could not be decoded; pixels float32 [B, 3, size, size] on the
                 device; the sample ids of the failed images, each with the reason. A damaged image never raises.
        """

    def flush(self) -> None:
        """Forget all batches whose result was not taken."""

    def close(self) -> None:
        """Stop the threads. The decoder cannot be used afterwards."""


def check_crop(params: AugmentParams, row: int, pixels: np.ndarray) -> None:
    """Check that decoded pixels [H, W, 3] contain the crop: a header may lie. errors: ValueError."""
    height, width = pixels.shape[:2]
    if params.x[row] + params.width[row] > width or params.y[row] + params.height[row] > height:
        raise ValueError(f"the image is {width} x {height} pixels, smaller than its header says")
