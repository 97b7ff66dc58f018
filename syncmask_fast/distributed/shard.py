"""A batch that is sharded over ranks: which rows this rank holds, and how ranks exchange rows with gradients.

Shape letters: B rows of the global batch, b rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from syncmask_fast.distributed.group import SINGLE_PROCESS, Group

Item = TypeVar("Item")
END_OF_EPOCH = 2**62  # a batch number above all others


@dataclass(frozen=True)
class BatchShard:
    """This rank's rows of the global batch, and what every rank knows about all rows."""

    group: Group
    bounds: Sequence[int]
    """world_size + 1 numbers: rank r holds rows bounds[r] to bounds[r + 1] - 1."""
    lengths: Sequence[int]
    """Tokens of each of the B texts, on the host."""
    items: Tensor
    """int64 [B], on the device: numbers of the training items, which are rows of the feature bank."""
    product_ids: Tensor
    """int64 [B], on the device: 0 or more, equal for images of one product."""

    @classmethod
    def whole(cls, lengths: Sequence[int], items: Tensor, product_ids: Tensor) -> BatchShard:
        """Return the shard of a batch that is on one rank."""
        return cls(SINGLE_PROCESS, (0, len(lengths)), lengths, items, product_ids)

    def local(self) -> BatchShard:
        """Return this rank's rows as a batch of their own."""
        return BatchShard.whole(self.lengths[self.rows], self.items[self.rows], self.product_ids[self.rows])

    @property
    def global_size(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def rows(self) -> slice:
        """This rank's rows of the global batch."""
        return slice(self.bounds[self.group.rank], self.bounds[self.group.rank + 1])

    def rows_of_ranks(self, rows: Sequence[int]) -> list[list[int]]:
        """Split sorted row numbers of the global batch by the rank that holds them."""
        ranges = zip(self.bounds, self.bounds[1:], strict=False)
        return [[row for row in rows if begin <= row < end] for begin, end in ranges]

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows [B, ...] of all ranks from this rank's [b, ...], with gradients."""
        if self.group.world_size == 1:
            return x
        counts = np.diff(self.bounds)
        most = int(counts.max())
        padded = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        gathered = AllGather.apply(padded.contiguous(), self.group.world_size)
        if (counts == most).all():
            return gathered
        return torch.cat([gathered[rank * most : rank * most + int(n)] for rank, n in enumerate(counts)])

    def exchange(self, x: Tensor, wanted: Sequence[Sequence[int]], lengths: Sequence[int] | None = None) -> Tensor:
        """Return the rows that this rank wants, in the order in which it wants them, with gradients.

        x:       [b, ...] rows of this rank; with `lengths` its packed sequences [sum of their lengths, ...].
        wanted:  for each rank the row numbers of the global batch that it wants; the same on all ranks.
        lengths: of the B sequences of the global batch.
        """
        lengths = np.ones(self.global_size, np.int64) if lengths is None else np.asarray(lengths, np.int64)
        begin, end, rank = self.rows.start, self.rows.stop, self.group.rank
        mine = np.asarray(wanted[rank], np.int64)
        if self.group.world_size == 1:
            return x[_upload(_row_numbers(lengths, mine), x.device)]

        # Send each rank what it wants of ours, one rank after the other.
        requests = [np.asarray(rows, np.int64) for rows in wanted]
        sent = [rows[(begin <= rows) & (rows < end)] - begin for rows in requests]
        send_sizes = [int(lengths[begin + rows].sum()) for rows in sent]
        outgoing = x[_upload(_row_numbers(lengths[begin:end], np.concatenate(sent)), x.device)]

        # Received rows are sorted by owner: put them back into the order of `wanted`.
        owner = np.searchsorted(self.bounds, mine, side="right") - 1
        arrival = np.argsort(owner, kind="stable")
        receive_sizes = [int(lengths[mine[owner == r]].sum()) for r in range(self.group.world_size)]
        received = _AllToAll.apply(outgoing, send_sizes, receive_sizes)
        return received[_upload(_row_numbers(lengths[mine[arrival]], np.argsort(arrival, kind="stable")), x.device)]


def lockstep(
    batches: Iterator[Item], describe: Callable[[Item], tuple[int, np.ndarray]], width: int, group: Group
) -> Iterator[tuple[Item, list[np.ndarray]]]:
    """Yield this rank's share of each batch together with the description of all ranks' rows.

    describe: of a share its batch number in the epoch, and int64 [n, 2] with two numbers for each of its n rows.
    width:    the largest n of any rank.
    A batch is skipped by all ranks if one of them has no row left, because all its images are damaged.
    """
    share = next(batches, None)
    while True:
        number, rows = (END_OF_EPOCH, None) if share is None else describe(share)
        message = torch.zeros(2 + width, 2, dtype=torch.int64)
        message[0] = number
        if rows is not None:
            message[1] = len(rows)
            message[2 : 2 + len(rows)] = torch.from_numpy(rows)
        messages = group.all_gather_host(message)
        latest, aligned = int(messages[:, 0].max()), bool((messages[:, 0] == messages[0, 0]).all())
        if aligned and share is None:
            return
        if aligned:
            yield share, [theirs[2 : 2 + int(theirs[1, 0])].numpy() for theirs in messages]
        # A rank that is ahead waits, because another rank lost its rows of the batches between.
        if aligned or number < latest:
            share = next(batches, None)


def _row_numbers(lengths: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Return the row numbers of these sequences among packed sequences of these lengths."""
    starts = np.cumsum(lengths) - lengths
    counts = lengths[sequences]
    return np.repeat(starts[sequences] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _upload(rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device, non_blocking=True)


# torch.distributed.nn has both collectives, but its all_gather takes lists of tensors and its backward pass copies
# each.
class AllGather(torch.autograd.Function):
    """[n, ...] of each rank to [world_size * n, ...] on all ranks; the backward pass sums the ranks' gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, world_size: int) -> Tensor:
        gathered = x.new_empty(world_size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x)
        return gathered

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        mine = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous())
        return mine, None


class _AllToAll(torch.autograd.Function):
    """Rows for every rank, one rank's after the other's, to the rows from every rank. Sizes count rows."""

    @staticmethod
    def forward(ctx, x: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        ctx.sizes = send_sizes, receive_sizes
        return _all_to_all(x, send_sizes, receive_sizes)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        send_sizes, receive_sizes = ctx.sizes
        return _all_to_all(gradient, receive_sizes, send_sizes), None, None


def _all_to_all(x: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
    received = x.new_empty(sum(receive_sizes), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive_sizes, send_sizes)
    return received
