"""Layouts of packed sequences: `PackedLayout`, and `FusionBatch` for the fusion encoder.

Tokens of many sequences are packed into a single [total, ...] tensor. A layout says where each sequence begins.

Shape letters: N sequences, T rows of the source features, B images.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from syncmask_fast.kernels import packed_attention as cpu_attention

if TYPE_CHECKING:
    from syncmask_fast.data.loader import Batch


def rows_multiple(device: torch.device) -> int:
    """Return the number of which the rows of packed texts are made a multiple."""
    # In bfloat16 each new shape costs the CPU new machine code for its products, and CUDA's allocator new blocks.
    return 128 if torch.is_autocast_enabled(device.type) else 1


class PackedLayout:
    """Where each of N sequences is in a packed tensor.

    cu_seqlens: int32 [N + 1] on the tensor's device; sequence n is rows cu_seqlens[n] .. cu_seqlens[n + 1] - 1.
    max_seqlen: an upper bound on the sequences' lengths, on the host.
    total:      rows of the packed tensor, cu_seqlens[N], on the host.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, total: int) -> None:
        self.cu_seqlens, self.max_seqlen, self.total = cu_seqlens, max_seqlen, total

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> PackedLayout:
        """Return the layout of sequences whose lengths the host knows."""
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        # The copy does not make the host wait.
        return cls(cu_seqlens.to(device, non_blocking=True), max(lengths, default=0), sum(lengths))

    @classmethod
    def of_batch(cls, batch: Batch) -> PackedLayout:
        """Return the layout of a batch's texts; `max_seqlen` is that of all ranks, so padded forms have one width."""
        return cls(batch.cu_seqlens, max(batch.shard.lengths), sum(batch.lengths))

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def __add__(self, other: PackedLayout) -> PackedLayout:
        """Return the layout of this packed tensor with another one behind it."""
        cu_seqlens = torch.cat([self.cu_seqlens, other.cu_seqlens[1:] + self.total])
        return PackedLayout(cu_seqlens, max(self.max_seqlen, other.max_seqlen), self.total + other.total)

    def padded_to(self, multiple: int) -> PackedLayout:
        """Return this layout with unused sequences at its end, so that the total is a multiple of `multiple`."""
        rest = -self.total % multiple
        if rest == 0:
            return self
        # None is longer than the longest, which bounds the work that attention plans for.
        count = -(-rest // self.max_seqlen)
        ends = torch.arange(1, count + 1, dtype=torch.int32, device=self.cu_seqlens.device) * self.max_seqlen
        cu_seqlens = torch.cat([self.cu_seqlens, self.cu_seqlens[-1:] + ends.clamp(max=rest)])
        return PackedLayout(cu_seqlens, self.max_seqlen, self.total + rest)

    @cached_property
    def lengths(self) -> Tensor:
        """int32 [N]."""
        return self.cu_seqlens.diff()

    @cached_property
    def segment_ids(self) -> Tensor:
        """int64 [total]: the sequence of each row."""
        # `right`: a row at a boundary is of the sequence that begins there, and empty sequences are skipped.
        rows = torch.arange(self.total, device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:-1].contiguous(), rows, right=True)

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 [total]: each row's position within its sequence."""
        return torch.arange(self.total, device=self.cu_seqlens.device) - self.cu_seqlens[self.segment_ids]

    @cached_property
    def valid(self) -> Tensor:
        """bool [N, max_seqlen]: the places of the padded form that hold a token."""
        return torch.arange(self.max_seqlen, device=self.cu_seqlens.device) < self.lengths[:, None]

    @cached_property
    def _padded_row(self) -> Tensor:
        """int64 [total]: each row's place in the flattened padded form."""
        return self.segment_ids * self.max_seqlen + self.position_ids

    def materialize(self) -> None:
        """Compute what the CPU's padded attention needs of this layout, for compiled code to find it cached."""
        # Before Python 3.12 a `cached_property` takes a lock, which cannot be traced. Later its first use adds a graph.
        if not self.cu_seqlens.is_cuda and not cpu_attention.is_available():
            self.valid, self._padded_row  # noqa: B018

    def pad(self, packed: Tensor) -> Tensor:
        """Return packed [total, ...] as [N, max_seqlen, ...], with zeros where there is no token."""
        # By row numbers, since indexing by `valid` would read a count back from the device.
        flat = packed.new_zeros(len(self) * self.max_seqlen, *packed.shape[1:])
        return flat.index_copy_(0, self._padded_row, packed).unflatten(0, (len(self), self.max_seqlen))

    def unpad(self, padded: Tensor) -> Tensor:
        """Return padded [N, max_seqlen, ...] as [total, ...]."""
        return padded.flatten(0, 1).index_select(0, self._padded_row)


class FusionBatch(NamedTuple):
    """Sequences for the fusion encoder, ordered by the image that each attends to."""

    source_rows: Tensor
    """int64 [total]: the row of the source features in each place."""
    text_layout: PackedLayout
    """A block for each sequence."""
    image_layout: PackedLayout
    """A block for each image: all queries that attend to it."""
    cls_rows: Tensor
    """int64 [N]: the row of each sequence's [CLS], in the order in which the sequences were given."""

    def materialize(self) -> None:
        """Apply `PackedLayout.materialize` to both layouts."""
        self.text_layout.materialize()
        self.image_layout.materialize()


def one_to_one(layout: PackedLayout) -> FusionBatch:
    """Return the FusionBatch in which text n attends to image n."""
    source_rows = torch.arange(layout.total, device=layout.cu_seqlens.device)
    return FusionBatch(source_rows, layout, layout, layout.cu_seqlens[:-1].long())


def group_by_image(
    source: PackedLayout, sequences: Tensor, image_of: Tensor, num_images: int, capacity: int | None = None
) -> FusionBatch:
    """Order sequences by image: self-attention and cross-attention are then block-diagonal over the same order.

    source:    layout [T] of the packed text features that the sequences are taken from.
    sequences: int64 [N], which sequence of the source each is (any number of times).
    image_of:  int64 [N], the image that each attends to.
    capacity:  rows to reserve where the host does not know the total; None reads the total back from the device.

    The total is filled up to the capacity, and to a multiple of `rows_multiple`, by unused sequences at the last image.
    """
    device = image_of.device

    # 1. The sequences in the order of their images, and the rows of each image's block.
    order = torch.argsort(image_of, stable=True)
    lengths = source.lengths[sequences[order]]
    begins = source.cu_seqlens[sequences[order]]
    rows_of_image = torch.zeros(num_images, dtype=torch.int32, device=device)
    rows_of_image.index_add_(0, image_of, source.lengths[sequences])

    # 2. Rows in all. On CUDA reading the total back would wait for the device: there the caller reserves enough.
    on_host = capacity is None
    used = int(lengths.sum()) if on_host else lengths.sum(dtype=torch.int32)
    capacity = used if on_host else capacity
    capacity += -capacity % rows_multiple(device)

    # 3. Fill the rest by the source's first rows, in sequences no longer than the longest. On CUDA some are empty.
    rest = capacity - used
    filled = torch.arange(0, rest if on_host else capacity, max(source.max_seqlen, 1), device=device, dtype=torch.int32)
    fillers = (rest - filled).clamp(0, source.max_seqlen)
    lengths, begins = torch.cat([lengths, fillers]), torch.cat([begins, torch.zeros_like(fillers)])
    rows_of_image = torch.cat([rows_of_image[:-1], rows_of_image[-1:] + rest])

    # 4. Both layouts, the source row of each place, and each sequence's [CLS] in the order given.
    zero = lengths.new_zeros(1)
    cu_seqlens, cu_images = (torch.cat([zero, x.cumsum(0, dtype=torch.int32)]) for x in (lengths, rows_of_image))
    text_layout = PackedLayout(cu_seqlens, source.max_seqlen, capacity)
    image_layout = PackedLayout(cu_images, int(rows_of_image.max()) if on_host else capacity, capacity)
    source_rows = begins[text_layout.segment_ids] + text_layout.position_ids
    cls_rows = torch.empty_like(order).index_copy_(0, order, cu_seqlens[: len(order)].long())
    return FusionBatch(source_rows, text_layout, image_layout, cls_rows)
