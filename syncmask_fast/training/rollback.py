"""Undo a step whose loss or gradients are not finite, without a host sync."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Rollback:
    """Copies of tensors, or of some of their rows, from before they are changed in place."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def snapshot(self, tensors: Iterable[Tensor]) -> None:
        """Copy whole tensors."""
        self._copies += [(tensor, None, tensor.detach().clone()) for tensor in tensors]

    def snapshot_rows(self, tensors: Iterable[Tensor], rows: Tensor) -> None:
        """Copy rows int64 [n] of tensors; no row twice."""
        self._copies += [(tensor, rows, tensor.index_select(0, rows)) for tensor in tensors]

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """Restore everything where `good`, a bool scalar on the tensors' device, is false, and forget the copies."""
        # Last copy first: a later one may hold what an earlier change had written.
        while self._copies:
            tensor, rows, before = self._copies.pop()
            if rows is None:
                tensor.copy_(torch.where(good, tensor, before))
            else:
                tensor.index_copy_(0, rows, torch.where(good, tensor.index_select(0, rows), before))
