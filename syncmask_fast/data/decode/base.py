"""What the decoders (`decode_threads`, `decode.dali`) take and give."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from syncmask_fast.data.augment import AugmentParams


@dataclass
class DecodeRequest:
    """The images of one batch on their way to pixels."""

    samples: np.ndarray  # int64 [B], sample numbers
    positions: np.ndarray  # int64 [B], places in the epoch
    encoded: list[bytes]
    params: AugmentParams
    epoch: int

    def __len__(self) -> int:
        return len(self.samples)

    def without(self, samples: Collection[int]) -> DecodeRequest:
        """The job with these samples left out."""
        keep = np.array([row for row, sample in enumerate(self.samples) if int(sample) not in samples], np.int64)
        return DecodeRequest(
            self.samples[keep],
            self.positions[keep],
            [self.encoded[row] for row in keep],
            self.params.take(keep),
            self.epoch,
        )


def check_crop(params: AugmentParams, row: int, pixels: np.ndarray) -> None:
    """Raises ValueError where decoded pixels [H, W, 3] do not hold the crop: the file's header told another size than its picture has."""
    height, width = pixels.shape[:2]
    if params.x[row] + params.width[row] > width or params.y[row] + params.height[row] > height:
        raise ValueError(f"the image is {width} x {height} pixels, and not as large as its header says")


class Decoder(Protocol):
    """Turns batches of encoded images into pixels, in the order in which they were started."""

    depth: int  # batches that may be started before the first is finished

    def submit(self, job: DecodeRequest) -> None:
        """Begins with a batch; returns at once."""

    def result(self) -> tuple[DecodeRequest, Tensor, dict[int, str]]:
        """Waits for the oldest started batch.

        returns: the job cut to the B images that could be decoded; pixels float32 [B, 3, size, size] on the
                 decoder's device; the sample numbers of the others, each with the reason. A damaged image
                 never raises.
        """

    def flush(self) -> None:
        """Forgets all batches that were started and not finished."""

    def close(self) -> None:
        """Stops the threads."""
