"""From encoded images to pixels on a pool of threads. What is done to one image is a renderer's matter (data/render.py)."""

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

LARGEST_CHUNK = 8  # images that a thread takes at a time: each time costs some 20 microseconds
KEPT_BATCHES = (
    4  # that memory is kept for: two that are decoded, one that the consumer has, and one that it has not let go of
)

Renderer = Callable[[bytes, AugmentParams, int, Tensor], None]


class ThreadedDecoder:
    """Decodes, crops, resizes, changes colours and normalises on `threads` threads. See `Decoder`.

    render: fills the pixels float32 [3, S, S] of an encoded image with what row `row` of the crops makes of it: render(encoded, params, row, pixels).
            errors: ValueError, RuntimeError or MemoryError where it cannot; they cost the image, not the run.
    """

    depth = 2

    def __init__(self, render: Renderer, *, batch_size: int, size: int, device: torch.device, threads: int) -> None:
        self.render, self.size, self.device, self.threads = render, size, device, threads
        self._memory = None if device.type == "cuda" else BufferPool((batch_size, 3, size, size), KEPT_BATCHES)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._started: deque[tuple[DecodeRequest, Tensor, list[Future[dict[int, str]]]]] = deque()

    def submit(self, job: DecodeRequest) -> None:
        count = len(job)
        pixels = (
            self._memory.take(count) if self._memory else torch.empty(count, 3, self.size, self.size, pin_memory=True)
        )
        size = max(1, min(LARGEST_CHUNK, count // (2 * self.threads)))
        chunks = [range(begin, min(begin + size, count)) for begin in range(0, count, size)]
        self._started.append(
            (job, pixels, [self._pool.submit(self._render_rows, job, rows, pixels) for rows in chunks])
        )

    def result(self) -> tuple[DecodeRequest, Tensor, dict[int, str]]:
        job, pixels, chunks = self._started.popleft()
        refused = {sample: reason for chunk in chunks for sample, reason in chunk.result().items()}
        if refused:
            pixels = pixels[[int(sample) not in refused for sample in job.samples]]
            job = job.without(refused)
        return job, pixels.to(self.device, non_blocking=True), refused

    def flush(self) -> None:
        """Forgets what was started."""
        for _, _, chunks in self._started:
            for chunk in chunks:
                chunk.cancel()
        self._started.clear()

    def close(self) -> None:
        self.flush()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _render_rows(self, job: DecodeRequest, rows: range, pixels: Tensor) -> dict[int, str]:
        """The sample numbers of those that could not be rendered, with the reasons."""
        refused = {}
        for row in rows:
            try:
                self.render(job.encoded[row], job.params, row, pixels[row])
            except (ValueError, RuntimeError, MemoryError) as error:
                refused[int(job.samples[row])] = str(error) or type(error).__name__
        return refused


class BufferPool:
    """Tensors of one shape whose memory is handed out again when nobody holds it any more: memory fresh from the kernel costs as much
    as the resize.

    shape: the largest; its first dimension is what `take` gives up to.
    count: of the blocks kept. While all of them are held, `take` gives fresh memory.

    A tensor made from a numpy array holds it until the last tensor of its storage is gone (views, graphs of autograd, arrays made of it).
    So each tensor gets a numpy array of its own, and the weak reference to that tells. For one thread.
    """

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        self.shape, self.count = shape, count
        self._blocks: list[tuple[Tensor, weakref.ref[np.ndarray]]] = []

    def take(self, rows: int) -> Tensor:
        """A float32 tensor [rows, *shape[1:]] with anything in it."""
        place = next((place for place, (_, holder) in enumerate(self._blocks) if holder() is None), len(self._blocks))
        if rows == 0 or place == self.count:
            return torch.empty(rows, *self.shape[1:])
        block = self._blocks[place][0] if place < len(self._blocks) else torch.empty(self.shape)
        array = block[:rows].numpy()
        self._blocks[place : place + 1] = [(block, weakref.ref(array))]
        return torch.from_numpy(array)
