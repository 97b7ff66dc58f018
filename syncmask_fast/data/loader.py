"""The loader: sample ids in, batches on the device out. A pure function of (seed, epoch, position).

Augmentation depends only on the seed, the epoch and the position in it. Batches do not depend on the number of threads,
and an epoch can be resumed anywhere. Two threads read and check images ahead, the decoder works further ahead, and the
consumer's thread only collects.
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
from syncmask_fast.data.images import check_image
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.utils.errors import UserError

MAX_DAMAGED, MAX_DAMAGED_FRACTION = 32, 0.01  # the run ends when damaged images exceed both
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
    """Load epochs of one dataset. The threads and the decoder are the same in all epochs.

    tokens:   of the texts of the whole index (`Split.tokens`).
    decoder:  gives batch size, pixel size and device (`make_decoder`); the loader closes it. A damaged image makes its
              batch shorter, and a batch without any readable image is left out.
    augment:  random crop, flip, colors and token dropout; None resizes the whole image (evaluation).
    seed:     0 or more; see `sample_augmentations`.
    drop_last: leave out a last batch that is shorter than the batch size.
    prefetch: batches whose bytes are read ahead.

    wait_seconds: total time that the consumer waited for batches.
    skipped:      (sample id, reason) of each image that could not be used, once each.

    A context manager; otherwise call `close`. While loading, UserError if more than 1 % of the images are damaged.
    """

    def __init__(
        self,
        index: ShardIndex,
        tokens: TokenCache,
        decoder: Decoder,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 4,
    ) -> None:
        if len(tokens) != len(index):
            raise ValueError(f"{len(tokens)} texts were tokenized for {len(index)} samples")
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, not {prefetch}")
        self.index, self.tokens, self.decoder = index, tokens, decoder
        self.augment, self.seed, self.drop_last, self.prefetch = augment, seed, drop_last, prefetch
        self.batch_size = decoder.batch_size
        self.wait_seconds = 0.0
        self.skipped: list[tuple[int, str]] = []
        self._failed: set[int] = set()  # sample ids of `skipped`
        self._current: Iterator[Batch] | None = None
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="read")

    def num_batches(self, count: int, start: int = 0) -> int:
        """Return the number of batches of an epoch of `count` samples from `start`."""
        rest = max(0, count - start)
        return rest // self.batch_size if self.drop_last else -(-rest // self.batch_size)

    def epoch(
        self, order: np.ndarray, epoch: int, positions: np.ndarray | None = None, start: int = 0
    ) -> Iterator[Batch]:
        """Return the batches of one epoch, or of one rank's rows of it. This ends an earlier epoch.

        order:     int64 [n], sample ids in the order of loading.
        epoch:     number of the epoch, for the random numbers.
        positions: int64 [n], position of each sample in the whole epoch (of all ranks); None counts 0 .. n - 1.
        start:     number of samples of `order` to skip (a resumed run).
        """
        order = np.asarray(order, np.int64)
        positions = np.arange(len(order)) if positions is None else np.asarray(positions, np.int64)
        if order.ndim != 1 or positions.shape != order.shape:
            raise ValueError(f"order {order.shape} and positions {positions.shape} must have the same length")
        if len(order) and not (order.min() >= 0 and order.max() < len(self.index)):
            raise ValueError(f"order has sample ids outside 0 .. {len(self.index) - 1}")
        if self._current is not None:
            self._current.close()
        self._current = self._load(order, positions, epoch, start)
        return self._current

    def close(self) -> None:
        """Stop all threads. The loader cannot be used afterwards."""
        if self._current is not None:
            self._current.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self.decoder.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _load(self, order: np.ndarray, positions: np.ndarray, epoch: int, start: int) -> Iterator[Batch]:
        size = self.batch_size
        slices = [slice(at, at + size) for at in range(start, start + size * self.num_batches(len(order), start), size)]
        waiting = deque(slices)
        reading: deque[Future[DecodeRequest]] = deque()
        decoding = 0
        try:
            for _ in slices:
                begin = time.perf_counter()
                # 1. Fill both stages, as far as that needs no wait; wait for a read if nothing is being decoded.
                while True:
                    while waiting and len(reading) < self.prefetch:
                        rows = waiting.popleft()
                        reading.append(self._readers.submit(self._read, order[rows], positions[rows], epoch))
                    if not reading or decoding >= self.decoder.depth or (decoding and not reading[0].done()):
                        break
                    self.decoder.submit(reading.popleft().result())
                    decoding += 1
                # 2. Take the oldest batch.
                request, pixels, failed = self.decoder.result()
                decoding -= 1
                for sample, reason in failed.items():
                    self._skip(sample, reason)
                batch = self._batch(request, pixels) if len(request) else None
                self.wait_seconds += time.perf_counter() - begin
                if batch is not None:
                    yield batch
        finally:
            for future in reading:
                future.cancel()
            self.decoder.flush()

    def _read(self, sample_ids: np.ndarray, positions: np.ndarray, epoch: int) -> DecodeRequest:
        """Read and check the images of a batch, without damaged ones, and draw their augmentation."""
        rows, encoded, sizes = [], [], []
        for row, sample in enumerate(sample_ids.tolist()):
            if sample in self._failed:
                continue
            try:
                data = self.index.image_bytes(sample)
                sizes.append(check_image(data))
            except (ValueError, OSError) as error:
                self._skip(sample, str(error))
                continue
            rows.append(row)
            encoded.append(data)
        positions = positions[rows]
        widths, heights = np.array(sizes, np.int64).reshape(-1, 2).T
        if self.augment is None:
            params = no_augmentation(widths, heights)
        else:
            params = sample_augmentations(self.seed, epoch, positions, widths, heights, self.augment)
        return DecodeRequest(sample_ids[rows], positions, encoded, params, epoch)

    def _skip(self, sample: int, reason: str) -> None:
        if sample in self._failed:
            return
        self._failed.add(sample)
        self.skipped.append((sample, reason))
        _log.warning("%s: member %s: %s; skipped", self.index.shard_path(sample), self.index.key(sample), reason)
        if len(self.skipped) > max(MAX_DAMAGED, MAX_DAMAGED_FRACTION * len(self.index)):
            raise UserError(
                f"{self.index.folder} has {len(self.skipped)} damaged images of {len(self.index)} "
                f"(the last: member {self.index.key(sample)}, {reason}). Repair or repack the shards."
            )

    def _batch(self, request: DecodeRequest, pixels: Tensor) -> Batch:
        sample_ids, positions = request.sample_ids, request.epoch_positions
        token_ids, cu_seqlens = self.tokens.pack(sample_ids)
        if self.augment is not None and self.augment.token_dropout:
            keep = token_dropout_mask(
                self.seed, request.epoch, positions, np.diff(cu_seqlens), self.augment.token_dropout
            )
            token_ids, cu_seqlens = token_ids[keep], np.append(0, np.cumsum(keep))[cu_seqlens].astype(np.int32)
        lengths = np.diff(cu_seqlens).tolist()
        product_ids = self.index.product_ids[sample_ids]
        tokens, starts, samples, products, places = map(
            self._upload, (token_ids, cu_seqlens, sample_ids, product_ids, positions)
        )
        shard = BatchShard.whole(lengths, samples, products)
        return Batch(pixels, tokens, starts, lengths, samples, sample_ids, places, shard)

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.decoder.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.decoder.device, non_blocking=True)
        return tensor
