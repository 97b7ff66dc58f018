"""Takes back what a step has changed, if its loss or its gradients turn out not to be finite. The device decides, and the host never waits for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Rollback:
    """Remembers tensors, or rows of them, as they are before they are changed in place."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor | None, Tensor]] = []

    def snapshot(self, tensors: Iterable[Tensor]) -> None:
        """Remembers whole tensors (a copy of each)."""
        self._kept += [(tensor, None, tensor.detach().clone()) for tensor in tensors]

    def snapshot_rows(self, tensors: Iterable[Tensor], at: Tensor) -> None:
        """Remembers some rows of tensors. at: int64 [n], each row once."""
        self._kept += [(tensor, at, tensor.index_select(0, at)) for tensor in tensors]

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """Puts everything back where `good`, a bool scalar on the tensors' device, is false; the last that was remembered first."""
        while self._kept:
            tensor, at, before = self._kept.pop()
            if at is None:
                tensor.copy_(torch.where(good, tensor, before))
            else:
                tensor.index_copy_(0, at, torch.where(good, tensor.index_select(0, at), before))
