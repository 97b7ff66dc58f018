"""The loader: an epoch's order in, batches on the device out. A pure function of (seed, epoch, position).

Threads read the shards and check the images ahead, the decoder (compiled, DALI or torchvision) works further ahead, and
the consumer's thread only collects. What an image gets (crop, flip, colours) hangs on its position in the
epoch alone, so batches are the same for any number of threads, and an epoch can be entered at any place.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.data.augment import AugmentConfig, no_augmentation, sample_augmentations, token_dropout_mask
from syncmask_fast.data.decode.base import Decoder, DecodeRequest
from syncmask_fast.data.images import check_image, decode_image
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.utils.device import cpu_cores
from syncmask_fast.utils.errors import UserError

__all__ = ["Batch", "Loader", "decode_image"]

MAX_BAD_IMAGES = 32  # beyond this many, a share of more than 1 % ends the run
PIXEL_MEAN = (0.5, 0.5, 0.5)
BACKENDS = ("auto", "cpp", "dali", "torchvision")
_log = logging.getLogger("syncmask_fast")


@dataclass
class Batch:
    """B image-text pairs. Texts are packed: pair i has token_ids[cu_seqlens[i] : cu_seqlens[i + 1]]."""

    pixels: Tensor
    """float32 [B, 3, S, S], normalized, on the device."""
    token_ids: Tensor
    """int64 [total], [CLS] ... [SEP] of each text, on the device."""
    cu_seqlens: Tensor
    """int32 [B + 1], on the device."""
    lengths: list[int]
    """Tokens of each text, on the host."""
    sample_ids: Tensor
    """int64 [B], numbers of the samples in the index, on the device."""
    sample_ids_host: np.ndarray
    """int64 [B], the same on the host."""
    epoch_positions: Tensor
    """int64 [B], positions in the epoch, on the device."""
    shard: BatchShard
    """Which rows of the global batch these are, with the product ids of all its rows."""

    def __len__(self) -> int:
        return len(self.lengths)


class Loader:
    """Loads epochs of one dataset; keeps its threads and its DALI pipeline from one epoch to the next.

    batch_size: pairs of a batch. A damaged image makes its batch shorter (and a batch without any whole image
                is left out).
    size:       width and height of the pixels; the aspect ratio of crops is not kept.
    augment:    random crop, flip and colours; None resizes the whole image (evaluation).
    seed:       0 or more; see `sample_augmentations`.
    backend:    "cpp", "dali", "torchvision", or "auto"; see `choose_backend`. Their pixels are the same but for
                rounding.
    threads:    for decoding; None takes the cores that this process may use, at most 16.
    prefetch:   batches whose bytes are read ahead.
    drop_last:  leaves out a last batch that is shorter than batch_size.
    mean, std:  of the three colours on a scale of 0 to 1.

    wait_seconds: time that the consumer waited for batches so far.
    skipped:      (sample number, reason) of each image that could not be used, once each.

    A context manager; otherwise call `close`. errors: UserError if the backend cannot be used, or (while
    loading) if more than 1 % of the dataset's images are damaged.
    """

    def __init__(
        self,
        index: ShardIndex,
        tokens: TokenCache,
        *,
        batch_size: int,
        size: int,
        augment: AugmentConfig | None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        threads: int | None = None,
        prefetch: int = 4,
        drop_last: bool = False,
        mean: tuple[float, float, float] = PIXEL_MEAN,
        std: tuple[float, float, float] = PIXEL_MEAN,
    ) -> None:
        if len(tokens) != len(index):
            raise ValueError(f"{len(tokens)} texts were tokenised for {len(index)} samples")
        if min(batch_size, size, prefetch) < 1:
            raise ValueError(f"batch_size {batch_size}, size {size} and prefetch {prefetch} must be at least 1")
        self.index, self.tokens, self.augment, self.seed = index, tokens, augment, seed
        self.batch_size, self.prefetch, self.drop_last = batch_size, prefetch, drop_last
        self.device = torch.device(device)
        self.wait_seconds = 0.0
        self.skipped: list[tuple[int, str]] = []
        self._refused: set[int] = set()
        self._current: Iterator[Batch] | None = None
        self.backend = choose_backend(backend, self.device)
        jitter = augment is not None and max(augment.brightness, augment.contrast, augment.saturation) > 0
        threads = threads or min(16, cpu_cores())
        self._decoder = make_decoder(
            self.backend,
            batch_size=batch_size,
            size=size,
            mean=mean,
            std=std,
            jitter=jitter,
            device=self.device,
            threads=threads,
        )
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="read")

    def batches(self, count: int, start: int = 0) -> int:
        """Batches of an epoch of `count` samples entered at `start`."""
        left = max(0, count - start)
        return left // self.batch_size if self.drop_last else -(-left // self.batch_size)

    def epoch(
        self, order: np.ndarray, epoch: int, positions: np.ndarray | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """The batches of one epoch, or of one rank's share of it. An earlier epoch that is still open ends.

        order:     int64 [n], sample numbers in the order in which this process shall see them.
        epoch:     number of the epoch, which the random numbers hang on.
        positions: int64 [n], the place of each in the whole epoch (over all ranks); None counts 0 .. n-1.
        start:     how many of `order` were seen before (a resumed run).
        """
        order = np.asarray(order, np.int64)
        positions = np.arange(len(order)) if positions is None else np.asarray(positions, np.int64)
        if order.ndim != 1 or positions.shape != order.shape:
            raise ValueError(f"order {order.shape} and positions {positions.shape} must be of one length")
        if len(order) and not (order.min() >= 0 and order.max() < len(self.index)):
            raise ValueError(f"order has sample numbers outside 0 .. {len(self.index) - 1}")
        if self._current is not None:
            self._current.close()
        self._current = self._run(order, positions, epoch, start)
        return self._current

    def close(self) -> None:
        """Stops all threads. The loader cannot be used afterwards."""
        if self._current is not None:
            self._current.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _run(self, order: np.ndarray, positions: np.ndarray, epoch: int, start: int) -> Iterator[Batch]:
        parts = [
            slice(start + i * self.batch_size, start + (i + 1) * self.batch_size)
            for i in range(self.batches(len(order), start))
        ]
        waiting = deque(parts)
        reading: deque[Future[DecodeRequest]] = deque()
        started = 0
        try:
            for _ in parts:
                begin = time.perf_counter()
                while True:  # fill every stage, as far as the next needs no wait
                    while waiting and len(reading) < self.prefetch:
                        part = waiting.popleft()
                        reading.append(self._readers.submit(self._read, order[part], positions[part], epoch))
                    if not reading or started >= self._decoder.depth or (started and not reading[0].done()):
                        break
                    self._decoder.submit(reading.popleft().result())
                    started += 1
                job, pixels, refused = self._decoder.result()
                started -= 1
                for sample, reason in refused.items():
                    self._skip(sample, reason)
                batch = self._batch(job, pixels) if len(job) else None
                self.wait_seconds += time.perf_counter() - begin
                if batch is not None:
                    yield batch
        finally:
            for future in reading:
                future.cancel()
            self._decoder.flush()

    def _read(self, samples: np.ndarray, positions: np.ndarray, epoch: int) -> DecodeRequest:
        """Reads and checks the images of a batch; damaged ones are left out."""
        rows, encoded, sizes = [], [], []
        for row, sample in enumerate(samples.tolist()):
            if sample in self._refused:
                continue
            try:
                data = self.index.image_bytes(sample)
                sizes.append(check_image(data))
            except (ValueError, OSError) as error:
                self._skip(sample, str(error))
                continue
            rows.append(row)
            encoded.append(data)
        samples, positions = samples[rows], positions[rows]
        widths, heights = np.array(sizes, np.int64).reshape(-1, 2).T
        if self.augment is None:
            params = no_augmentation(widths, heights)
        else:
            params = sample_augmentations(self.seed, epoch, positions, widths, heights, self.augment)
        return DecodeRequest(samples, positions, encoded, params, epoch)

    def _skip(self, sample: int, reason: str) -> None:
        if sample in self._refused:
            return
        self._refused.add(sample)
        self.skipped.append((sample, reason))
        _log.warning("%s: member %s: %s; skipped", self.index.shard_path(sample), self.index.key(sample), reason)
        if len(self.skipped) > max(MAX_BAD_IMAGES, 0.01 * len(self.index)):
            raise UserError(
                f"{len(self.skipped)} of the {len(self.index)} images in {self.index.folder} are damaged; "
                f"repair or repack the shards (the last: member {self.index.key(sample)}, {reason})"
            )

    def _batch(self, job: DecodeRequest, pixels: Tensor) -> Batch:
        token_ids, cu_seqlens = self.tokens.pack(job.samples)
        if self.augment is not None and self.augment.token_dropout:
            keep = token_dropout_mask(
                self.seed, job.epoch, job.positions, np.diff(cu_seqlens), self.augment.token_dropout
            )
            token_ids, cu_seqlens = token_ids[keep], np.append(0, np.cumsum(keep))[cu_seqlens].astype(np.int32)
        product_ids = self.index.product_ids[job.samples]
        tokens, products, samples, positions, starts = self._upload(
            token_ids, product_ids, job.samples, job.positions, cu_seqlens
        )
        lengths = np.diff(cu_seqlens).tolist()
        shard = BatchShard.whole(lengths, samples, products)
        return Batch(pixels, tokens, starts, lengths, samples, job.samples, positions, shard)

    def _upload(self, *arrays: np.ndarray) -> list[Tensor]:
        tensors = [torch.from_numpy(array) for array in arrays]
        if self.device.type == "cuda":
            tensors = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        return tensors


def choose_backend(backend: str, device: torch.device) -> str:
    """ "cpp", "dali" or "torchvision". "auto" takes the first that runs here: DALI before the compiled way on CUDA, where it
    decodes on the GPU, and after it on the CPU.

    errors: UserError for an unknown name, or for one that does not run here.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend {backend} is not known; choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    if backend == "auto":
        order = ("dali", "cpp") if device.type == "cuda" else ("cpp", "dali")
        return next((name for name in order if why_unavailable(name) is None), "torchvision")
    problem = why_unavailable(backend)
    if problem is not None:
        raise UserError(
            f"the loader cannot use {backend} here ({problem}); or choose torchvision, which runs everywhere"
        )
    return backend


def why_unavailable(backend: str) -> str | None:
    """Why a backend cannot be used here and how to get it, or None if it can."""
    if backend == "dali":
        from syncmask_fast.data.decode.dali import why_dali_unavailable

        problem = why_dali_unavailable()
        return problem and f"{problem}; to have it, `pip install nvidia-dali-cuda130`"
    if backend == "cpp":
        from syncmask_fast.data.decode.transform import why_cpp_unavailable

        return why_cpp_unavailable()
    return None


def make_decoder(
    backend: str,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    jitter: bool,
    batch_size: int,
    size: int,
    device: torch.device,
    threads: int,
) -> Decoder:
    """The decoder of a chosen backend. jitter: whether colours change; the others as in `Loader`."""
    options = dict(batch_size=batch_size, size=size, device=device, threads=threads)
    if backend == "dali":
        from syncmask_fast.data.decode.dali import DaliDecoder

        return DaliDecoder(mean=mean, std=std, jitter=jitter, **options)
    from syncmask_fast.data.decode.threads import ThreadedDecoder
    from syncmask_fast.data.decode.transform import CppTransform, TorchvisionTransform

    return ThreadedDecoder({"cpp": CppTransform, "torchvision": TorchvisionTransform}[backend](mean, std), **options)
