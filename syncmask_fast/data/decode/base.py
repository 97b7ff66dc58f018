"""What a decoder takes and returns, and the choice of one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.data.augment import AugmentParams
from syncmask_fast.data.images import PIXEL_MEAN, PIXEL_STD
from syncmask_fast.utils.device import cpu_cores
from syncmask_fast.utils.errors import UserError

BACKENDS = ("auto", "cpp", "dali", "torchvision")
MAX_THREADS = 16


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


def make_decoder(
    backend: str,
    *,
    batch_size: int,
    size: int,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    jitter: bool = True,
    mean: tuple[float, float, float] = PIXEL_MEAN,
    std: tuple[float, float, float] = PIXEL_STD,
) -> Decoder:
    """Return the decoder of a backend; see `choose_backend`. All give the same pixels up to rounding.

    size:      width and height of the pixels; crops do not keep their aspect ratio.
    threads:   None takes the cores that this process may use, at most MAX_THREADS.
    jitter:    whether colors may change; without, DALI is faster.
    mean, std: of red, green and blue on a scale of 0 to 1, for normalization.
    errors:    UserError if the backend cannot be used here.
    """
    if min(batch_size, size) < 1:
        raise ValueError(f"batch_size {batch_size} and size {size} must be at least 1")
    device = torch.device(device)
    backend = choose_backend(backend, device)
    threads = threads or min(MAX_THREADS, cpu_cores())
    if backend == "dali":
        from syncmask_fast.data.decode.dali import DaliDecoder

        return DaliDecoder(batch_size, size, device, threads, jitter, mean, std)
    from syncmask_fast.data.decode.threads import ThreadedDecoder
    from syncmask_fast.data.decode.transform import CppTransform, TorchvisionTransform

    transform = (CppTransform if backend == "cpp" else TorchvisionTransform)(mean, std)
    return ThreadedDecoder(backend, transform, batch_size, size, device, threads)


def choose_backend(backend: str, device: torch.device) -> str:
    """Return "cpp", "dali" or "torchvision"; for "auto" the first that runs here.

    errors: UserError for an unknown name, or for one that does not run here.
    """
    if backend not in BACKENDS:
        raise UserError(f"--decoder {backend} is not known. Choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}.")
    if backend == "auto":
        # On CUDA DALI decodes on the GPU; on the CPU our operator is faster.
        order = ("dali", "cpp") if device.type == "cuda" else ("cpp", "dali")
        return next((name for name in order if why_unavailable(name) is None), "torchvision")
    reason = why_unavailable(backend)
    if reason is not None:
        raise UserError(f"--decoder {backend} does not run here ({reason}). Install it, or choose torchvision.")
    return backend


def why_unavailable(backend: str) -> str | None:
    """Return why a backend cannot be used here and how to get it, or None if it can."""
    if backend == "dali":
        from syncmask_fast.data.decode.dali import why_dali_unavailable

        reason = why_dali_unavailable()
        return reason and f"{reason}; `pip install nvidia-dali-cuda130`"
    if backend == "cpp":
        from syncmask_fast.data.decode.transform import why_cpp_unavailable

        return why_cpp_unavailable()
    return None


def check_crop(params: AugmentParams, row: int, pixels: np.ndarray) -> None:
    """Check that decoded pixels [H, W, 3] contain the crop: a header may lie. errors: ValueError."""
    height, width = pixels.shape[:2]
    if params.x[row] + params.width[row] > width or params.y[row] + params.height[row] > height:
        raise ValueError(f"the image is {width} x {height} pixels, smaller than its header says")
