"""A rank's rows of a batch that is cut over several ranks, and how the ranks give each other rows, with gradients.

Shape letters: B rows of the whole batch, b this rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from syncmask_fast.distributed.group import SINGLE_PROCESS, Group


@dataclass(frozen=True)
class BatchShard:
    """Where this rank's rows are in the whole batch, and what every rank knows of all of them."""

    group: Group
    bounds: Sequence[int]
    """ranks + 1 numbers: rank r has rows bounds[r] to bounds[r + 1] - 1."""
    lengths: Sequence[int]
    """Tokens of each of the B texts."""
    product_ids: Tensor
    """int64 [B], on the device."""
    samples: Tensor
    """int64 [B], on the device: places in the training split."""

    @classmethod
    def alone(cls, lengths: Sequence[int], product_ids: Tensor, samples: Tensor) -> BatchShard:
        """All rows of a batch that is not cut, or that is treated as if it were not."""
        return cls(SINGLE_PROCESS, (0, len(lengths)), lengths, product_ids, samples)

    def apart(self) -> BatchShard:
        """This rank's rows as a batch of their own."""
        return BatchShard.alone(self.lengths[self.rows], self.product_ids[self.rows], self.samples[self.rows])

    @property
    def total(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> slice:
        return slice(self.bounds[self.group.rank], self.bounds[self.group.rank + 1])

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, without gradient."""
        return self.group.all_reduce(x)

    def gather(self, x: Tensor) -> Tensor:
        """The rows [B, ...] of all ranks from this rank's [b, ...], with gradient."""
        if self.group.world_size == 1:
            return x
        counts = np.diff(self.bounds)
        most = int(counts.max())
        filled = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        everyone = _Gather.apply(filled.contiguous(), self.group.world_size)
        if (counts == most).all():
            return everyone
        return torch.cat([everyone[rank * most : rank * most + int(n)] for rank, n in enumerate(counts)])

    def fetch(self, x: Tensor, wanted: Sequence[Sequence[int]], lengths: Sequence[int] | None = None) -> Tensor:
        """The rows that this rank asks for, in the order in which it asks for them, with gradient.

        x:      [b, ...] this rank's rows; with `lengths` its packed sequences [their total, ...].
        wanted: for every rank the rows 0 .. B - 1 of the whole batch that it asks for; the same on all ranks.
        lengths: of the B sequences of the whole batch.
        """
        lengths = np.ones(self.total, np.int64) if lengths is None else np.asarray(lengths, np.int64)
        begin, end, rank = self.rows.start, self.rows.stop, self.group.rank
        mine = np.asarray(wanted[rank], np.int64)
        if self.group.world_size == 1:
            return x[_to(_places(lengths, mine), x.device)]
        asked = [np.asarray(rows, np.int64) for rows in wanted]
        given = [rows[(begin <= rows) & (rows < end)] - begin for rows in asked]
        owner = np.searchsorted(self.bounds, mine, side="right") - 1
        arrival = np.argsort(owner, kind="stable")
        sizes_in = [int(lengths[begin + rows].sum()) for rows in given]
        sizes_out = [int(lengths[mine[owner == r]].sum()) for r in range(self.group.world_size)]
        sent = x[_to(_places(lengths[begin:end], np.concatenate(given)), x.device)]
        arrived = _Exchange.apply(sent, sizes_in, sizes_out)
        return arrived[_to(_places(lengths[mine[arrival]], np.argsort(arrival, kind="stable")), x.device)]


def shard_of_batch(batch) -> BatchShard:
    """The part that a batch is; a batch without one is whole."""
    return batch.shard or BatchShard.alone(batch.lengths, batch.product_ids, batch.sample_ids)


def _places(lengths: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """The rows of these sequences among packed sequences of these lengths."""
    starts = np.cumsum(lengths) - lengths
    counts = lengths[sequences]
    return np.repeat(starts[sequences] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


def _to(places: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(places).to(device, non_blocking=True)


class _Gather(torch.autograd.Function):
    """[n, ...] of each rank to [ranks * n, ...] on all; gradients of all ranks' copies are added up."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:
        everyone = x.new_empty(ranks * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(everyone, x)
        return everyone

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        mine = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous())
        return mine, None


class _Exchange(torch.autograd.Function):
    """Rows for every rank, one rank's behind the other's, to the rows from every rank; sizes count rows."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes_in: list[int], sizes_out: list[int]) -> Tensor:
        ctx.sizes = sizes_in, sizes_out
        return _exchange(x, sizes_in, sizes_out)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        sizes_in, sizes_out = ctx.sizes
        return _exchange(gradient, sizes_out, sizes_in), None, None


def _exchange(x: Tensor, sizes_in: list[int], sizes_out: list[int]) -> Tensor:
    arrived = x.new_empty(sum(sizes_out), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), sizes_out, sizes_in)
    return arrived


class SyncBatchNorm(BatchNormAct2d):
    """timm's batch norm with activation, whose statistics in training are those of all ranks' images."""

    ranks: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values, n = x.float(), x.numel() // x.shape[1]
        mean = values.sum((0, 2, 3)) / max(n, 1)
        squares = (values - mean[:, None, None]).square().sum((0, 2, 3))
        # Means and squares of all ranks, put together as by Chan et al. 1979.
        means, squares, counts = _Gather.apply(
            torch.stack([mean, squares, torch.full_like(mean, n)])[None], self.world_size
        ).unbind(1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        squares = (squares + counts * (means - mean).square()).sum(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(squares / (total - 1), self.momentum)
        scale = self.weight * (squares / total + self.eps).rsqrt()
        out = values * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        return self.act(self.drop(out.to(x.dtype)))


def convert_sync_batchnorm(model: nn.Module, group: Group) -> None:
    """Has the batch norms of a model (those of the convolutional stem) take the statistics of all ranks; names of weights stay as they are."""
    for module in model.modules():
        if type(module) is BatchNormAct2d and group.world_size > 1:
            module.__class__ = SyncBatchNorm
            module.ranks = group.world_size
