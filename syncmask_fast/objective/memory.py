"""What outlives a step besides the weights: the EMA teacher, the queue of ITC candidates and the feature bank.

Shape letters: B pairs of the global batch, Q places of the queue, N training items, E width of the ITC space.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_fast.model.syncmask_model import SyncMaskModel


class Features(NamedTuple):
    """Unit vectors of a batch in the ITC space."""

    images: Tensor
    """float32 [B, E]."""
    texts: Tensor
    """float32 [B, E]."""


def make_teacher(model: SyncMaskModel) -> SyncMaskModel:
    """Return a copy of the model that takes no gradients."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(
    teacher: SyncMaskModel, model: SyncMaskModel, decay: float, step: int, finite: Tensor | None = None
) -> None:
    """Update the EMA: teacher = m * teacher + (1 - m) * model, with m = min(decay, (1 + step) / (10 + step)).

    finite: bool scalar on the device; where it is false, the teacher does not change.
    """
    # Early on, a fixed decay would keep the random initial weights for hundreds of steps.
    decay = min(decay, (1 + step) / (10 + step))
    # One fused call for all tensors; a factor of 0 leaves the teacher as it is.
    ours, theirs = list(teacher.parameters()), list(model.parameters())
    if finite is None:
        torch._foreach_lerp_(ours, theirs, 1 - decay)
    else:
        torch._foreach_lerp_(ours, theirs, [finite * (1 - decay)] * len(ours))
    # Batch norm statistics are running averages already, so they are copied.
    buffers = list(teacher.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(model.buffers()))


class Queue(NamedTuple):
    """The last features of the teacher, as further ITC candidates (ALBEF). Empty places have product id -1."""

    images: Tensor
    """float32 [Q, E]."""
    texts: Tensor
    """float32 [Q, E]."""
    product_ids: Tensor
    """int64 [Q]."""

    @classmethod
    def empty(cls, size: int, width: int, device: torch.device) -> Queue:
        """Return a queue with Q = size empty places."""
        features = torch.zeros(2, size, width, device=device)
        return cls(features[0], features[1], torch.full((size,), -1, device=device))

    def next_slots(self, pairs: int, batches_done: int, batch_size: int) -> Tensor:
        """Return int64 [min(pairs, Q)]: the places that `enqueue` overwrites with the last of so many pairs."""
        size = len(self.product_ids)
        count = min(pairs, size)
        # The position follows from the number of batches, so it needs no counter on the device.
        begin = batches_done * batch_size + pairs - count
        return (begin + torch.arange(count, device=self.product_ids.device)) % max(size, 1)

    def enqueue(self, features: Features, product_ids: Tensor, batches_done: int, batch_size: int) -> None:
        """Overwrite the oldest places by B pairs, B at most `batch_size`."""
        slots = self.next_slots(len(product_ids), batches_done, batch_size)
        for target, values in zip(self, (*features, product_ids), strict=True):
            target.index_copy_(0, slots, values[len(values) - len(slots) :])


@dataclass
class FeatureBank:
    """The last features of every training item, from which the next epoch's order is planned (GRIT-VLP)."""

    images: Tensor
    """float32 [N, E]."""
    texts: Tensor
    """float32 [N, E]."""
    filled: Tensor
    """bool [N]: whether the item has been seen."""

    @classmethod
    def empty(cls, items: int, width: int, device: torch.device) -> FeatureBank:
        """Return a bank of N = items rows."""
        features = torch.zeros(2, items, width, device=device)
        return cls(features[0], features[1], torch.zeros(items, dtype=torch.bool, device=device))

    def update(self, items: Tensor, features: Features) -> None:
        """Store the features of items int64 [B]."""
        self.images.index_copy_(0, items, features.images)
        self.texts.index_copy_(0, items, features.texts)
        self.filled.index_fill_(0, items, True)
