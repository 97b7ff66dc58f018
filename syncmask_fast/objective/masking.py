"""What to mask: the teacher's cross-attention turned into word and patch masks, ramped in from random ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_fast import ops
from syncmask_fast.config import MaskConfig
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel


class Masks(NamedTuple):
    """Masks of a batch, with the scores that they come from."""

    token_mask: Tensor
    """bool [B, longest text]."""
    patch_mask: Tensor
    """bool [B, P]."""
    token_score: Tensor
    """float32 [B, longest text], -inf where not maskable."""
    patch_score: Tensor
    """float32 [B, P]."""


def count(ratio: float, of: int) -> int:
    """How many of `of` words or patches are masked, as contracted for `ops.sync_mask`."""
    return 0 if ratio == 0 or of == 0 else min(of, max(1, int(ratio * of + 0.5)))


def maskable(layout: PackedLayout) -> Tensor:
    """bool [N, longest]: real words, that is neither [CLS] (the first token) nor [SEP] (the last) nor padding."""
    place = torch.arange(layout.max_seqlen, device=layout.cu_seqlens.device)
    return (place > 0) & (place < layout.lengths[:, None] - 1)


def uniform(rows: int, width: int, generator: torch.Generator, part: BatchShard | None) -> Tensor:
    """[rows, width] uniform numbers; those of a part are its rows of the whole batch's, so that ranks draw what one process would."""
    drawn = torch.rand(part.total if part else rows, width, device=generator.device, generator=generator)
    return drawn[part.rows] if part else drawn


def random_masks(
    layout: PackedLayout, patches: int, config: MaskConfig, generator: torch.Generator, part: BatchShard | None = None
) -> Masks:
    """Uniformly random masks with the counts of the sync ones. part: of a batch that is cut, whose longest text is then the layout's longest."""
    allowed = maskable(layout)
    token_score = uniform(*allowed.shape, generator, part).masked_fill(~allowed, -torch.inf)
    patch_score = uniform(len(layout), patches, generator, part)
    m = allowed.sum(1)
    words = (config.token_ratio * m.double() + 0.5).floor().clamp(min=1).minimum(m) if config.token_ratio else m * 0
    return Masks(
        _highest(token_score, words),
        _highest(patch_score, m * 0 + count(config.patch_ratio, patches)),
        token_score,
        patch_score,
    )


def _highest(score: Tensor, n: Tensor) -> Tensor:
    """bool [B, L]: the n[b] highest of each row, the lowest index first among equals."""
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < n[:, None]


def sync_masks(teacher: SyncMaskModel, images: Tensor, text: Tensor, layout: PackedLayout, config: MaskConfig) -> Masks:
    """Masks from the teacher's cross-attention at `config.layer`; later fusion layers are not computed.

    images: [B, S, C] image features and text [T, C] packed text features, both the teacher's; pair n is image n and text n.
    """
    q, k, v = teacher.fusion.cross_attention_qkv(text, one_to_one(layout), images, config.layer)
    result = ops.sync_mask(
        layout.pad(q).transpose(1, 2),
        k.transpose(1, 2),
        maskable(layout),
        v=v.transpose(1, 2) if config.token_score == "output" else None,
        token_ratio=config.token_ratio,
        patch_ratio=config.patch_ratio,
        token_score=config.token_score,
        patch_score=config.patch_score,
    )
    return Masks(*result)


def random_rectangles(n: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """bool [n, P]: the patches of a random rectangle, each side of which is a third to two thirds of the grid's, wherever it fits."""
    inside = torch.ones(n, *grid, dtype=torch.bool, device=generator.device)
    for axis, side in ((1, grid[0]), (2, grid[1])):
        low, high = -(-side // 3), max(-(-side // 3), 2 * side // 3)
        draw = torch.rand(2, n, 1, device=generator.device, generator=generator)
        length = low + (draw[0] * (high - low + 1)).floor()
        begin = (draw[1] * (side - length + 1)).floor()
        place = torch.arange(side, device=generator.device)
        within = (place >= begin) & (place < begin + length)
        inside &= within[:, :, None] if axis == 1 else within[:, None, :]
    return inside.flatten(1)


def blend(
    sync: Masks, random: Masks, chance: float, generator: torch.Generator, part: BatchShard | None = None
) -> Masks:
    """For each sample the sync masks with the given chance, else the random ones."""
    use = uniform(len(sync.token_mask), 1, generator, part) < chance
    pairs = zip(sync[:2], random[:2], strict=True)
    return Masks(*(torch.where(use, a, b) for a, b in pairs), sync.token_score, sync.patch_score)


def sync_share(progress: float, ramp: tuple[float, float]) -> float:
    """A sample's chance of a sync mask at `progress` (0 to 1) of the training: 0 before the ramp, 1 after it, linear between."""
    low, high = ramp
    return float(progress >= high) if low == high else min(1.0, max(0.0, (progress - low) / (high - low)))
