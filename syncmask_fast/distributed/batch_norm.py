"""Batch norm with the statistics of all ranks."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from syncmask_fast.distributed.group import Group
from syncmask_fast.distributed.shard import AllGather


class SyncBatchNorm(BatchNormAct2d):
    """timm's batch norm with activation; in training its statistics are those of all ranks' images.

    torch.nn.SyncBatchNorm runs on CUDA only, and its count must be positive on every rank.
    """

    def __init__(self, norm: BatchNormAct2d, world_size: int) -> None:
        """Take over parameters, buffers and settings of `norm`."""
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        self.world_size = world_size
        self.weight, self.bias, self.act, self.drop = norm.weight, norm.bias, norm.act, norm.drop
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and activate x, [b, C, H, W] of this rank; b may be 0."""
        if not self.training:
            return super().forward(x)
        values, n = x.float(), x.numel() // x.shape[1]
        mean = values.sum((0, 2, 3)) / max(n, 1)
        squares = (values - mean[:, None, None]).square().sum((0, 2, 3))

        # Combine means and sums of squares of all ranks by the formula of Chan et al. 1979, which does not cancel.
        local = torch.stack([mean, squares, torch.full_like(mean, n)])
        means, squares, counts = AllGather.apply(local[None], self.world_size).unbind(1)
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
    """Replace the batch norms of a model (those of the convolutional stem) by `SyncBatchNorm`. Weight names stay."""
    if group.world_size == 1:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is BatchNormAct2d:
                setattr(parent, name, SyncBatchNorm(child, group.world_size))
