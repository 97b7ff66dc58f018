"""The plain way from encoded images to pixels: Pillow and torchvision on a pool of threads. Runs everywhere;
DALI's way must equal it.

Pillow decodes: torchvision's own readers are deprecated (0.29), and its PNG reader ends the process by a
                segmentation fault on a PNG with
zeroed bytes in the middle. torchvision resizes: it takes half of Pillow's time.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from syncmask_fast.data.decoding import ImageJob, check_crop
from syncmask_fast.data.images import decode_image

_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as DALI and torchvision have it


class TorchDecoder:
    """Decodes, crops, resizes, changes colours and normalises on `threads` threads. See `Decoder`."""

    ahead = 2

    def __init__(
        self,
        *,
        batch_size: int,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        jitter: bool,
        device: torch.device,
        threads: int,
    ) -> None:
        self.size, self.device, self.jitter = size, device, jitter
        std_255 = 255 * np.array(std, np.float32).reshape(3, 1, 1)
        self._scale, self._shift = 1 / std_255, 255 * np.array(mean, np.float32).reshape(3, 1, 1) / std_255
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._started: deque[tuple[ImageJob, Tensor, list[Future]]] = deque()

    def start(self, job: ImageJob) -> None:
        pinned = self.device.type == "cuda"
        pixels = torch.empty(len(job), 3, self.size, self.size, pin_memory=pinned)
        out = pixels.numpy()
        self._started.append(
            (job, pixels, [self._pool.submit(self._render, job, row, out[row]) for row in range(len(job))])
        )

    def finish(self) -> tuple[ImageJob, Tensor, dict[int, str]]:
        job, pixels, images = self._started.popleft()
        refused = {}
        for sample, image in zip(job.samples, images, strict=True):
            try:
                image.result()
            except (ValueError, RuntimeError, MemoryError) as error:  # a worker that failed costs its image, not the run
                refused[int(sample)] = str(error) or type(error).__name__
        if refused:
            pixels = pixels[[int(sample) not in refused for sample in job.samples]]
            job = job.without(refused)
        return job, pixels.to(self.device, non_blocking=True), refused

    def drain(self) -> None:
        """Forgets what was started."""
        for _, _, images in self._started:
            for image in images:
                image.cancel()
        self._started.clear()

    def close(self) -> None:
        self.drain()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _render(self, job: ImageJob, row: int, out: np.ndarray) -> None:
        """Fills out float32 [3, S, S] with one image. errors: ValueError where it cannot be decoded."""
        params = job.params
        decoded = decode_image(job.encoded[row])
        check_crop(params, row, decoded)
        image = torch.from_numpy(decoded).permute(2, 0, 1)  # channels last, which resize has a fast way for
        x, y, width, height = (
            int(params.x[row]),
            int(params.y[row]),
            int(params.width[row]),
            int(params.height[row]),
        )
        image = functional.resize(
            image[:, y : y + height, x : x + width], [self.size, self.size], antialias=True
        )
        if params.flip[row]:
            image = functional.horizontal_flip(image)
        np.copyto(out, image.numpy())
        if self.jitter:
            change_colours(out, params.brightness[row], params.contrast[row], params.saturation[row])
        out *= self._scale
        out -= self._shift


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
