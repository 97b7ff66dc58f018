"""Decoding on a pool of threads, one image at a time; an `ImageTransform` does the work on one image."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.data.augment import AugmentParams
from syncmask_fast.data.decode.base import DecodeRequest
from syncmask_fast.utils.errors import one_line

MAX_CHUNK = 8  # images that a thread takes at a time; each time costs about 20 microseconds
POOL_BLOCKS = 4  # two batches in decoding, one at the consumer, and one that it has not yet freed

ImageTransform = Callable[[bytes, AugmentParams, int, Tensor], None]
"""transform(encoded, params, row, pixels): fill pixels float32 [3, S, S] with an image under row `row` of params.
errors: ValueError, RuntimeError or MemoryError; the image is then left out."""


class ThreadedDecoder:
    """A `Decoder` on `threads` threads."""

    depth = 2

    def __init__(
        self, backend: str, transform: ImageTransform, batch_size: int, size: int, device: torch.device, threads: int
    ) -> None:
        self.backend, self.transform = backend, transform
        self.batch_size, self.size, self.device, self.threads = batch_size, size, device, threads
        self._buffers = None if device.type == "cuda" else BufferPool((batch_size, 3, size, size), POOL_BLOCKS)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._submitted: deque[tuple[DecodeRequest, Tensor, list[Future[dict[int, str]]]]] = deque()

    def submit(self, request: DecodeRequest) -> None:
        count = len(request)
        if self._buffers is not None:
            pixels = self._buffers.take(count)
        else:
            pixels = torch.empty(count, 3, self.size, self.size, pin_memory=True)
        chunk = max(1, min(MAX_CHUNK, count // (2 * self.threads)))
        ranges = [range(begin, min(begin + chunk, count)) for begin in range(0, count, chunk)]
        futures = [self._pool.submit(self._decode_rows, request, rows, pixels) for rows in ranges]
        self._submitted.append((request, pixels, futures))

    def result(self) -> tuple[DecodeRequest, Tensor, dict[int, str]]:
        request, pixels, futures = self._submitted.popleft()
        failed = {sample: reason for future in futures for sample, reason in future.result().items()}
        if failed:
            pixels = pixels[[int(sample) not in failed for sample in request.sample_ids]]
            request = request.without(failed)
        return request, pixels.to(self.device, non_blocking=True), failed

    def flush(self) -> None:
        for _, _, futures in self._submitted:
            for future in futures:
                future.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self.flush()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _decode_rows(self, request: DecodeRequest, rows: range, pixels: Tensor) -> dict[int, str]:
        """Fill rows of `pixels`; return the sample ids of failed images with the reasons."""
        failed = {}
        for row in rows:
            try:
                self.transform(request.encoded[row], request.params, row, pixels[row])
            except (ValueError, RuntimeError, MemoryError) as error:
                failed[int(request.sample_ids[row])] = one_line(error)
        return failed


class BufferPool:
    """Float32 tensors of one shape whose memory is reused when nothing references it any more. For one thread.

    shape: the largest; `take` returns up to shape[0] rows.
    count: blocks in the pool; while all are in use, `take` returns fresh memory.
    """

    # Memory fresh from the kernel costs as much as the resize.
    # A tensor made from a numpy array references it until the last tensor of its storage is gone (views, graphs of
    # autograd, arrays). So each tensor gets its own array, and a weak reference to that shows when it is free.

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        self.shape, self.count = shape, count
        self._blocks: list[tuple[Tensor, weakref.ref[np.ndarray]]] = []

    def take(self, rows: int) -> Tensor:
        """Return an uninitialized tensor [rows, *shape[1:]]."""
        free = (i for i, (_, array) in enumerate(self._blocks) if array() is None)
        place = next(free, len(self._blocks))
        if rows == 0 or place == self.count:
            return torch.empty(rows, *self.shape[1:])
        block = self._blocks[place][0] if place < len(self._blocks) else torch.empty(self.shape)
        array = block[:rows].numpy()
        self._blocks[place : place + 1] = [(block, weakref.ref(array))]
        return torch.from_numpy(array)
