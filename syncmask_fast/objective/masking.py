"""Choose what to mask: random masks, sync masks from the teacher's cross-attention, and the ramp between them.

Shape letters: b texts or images of this rank, L tokens of the longest text, P patches, T tokens of all texts, C width.
"""

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
    """Masks of a batch and the scores that they come from."""

    token_mask: Tensor
    """bool [b, L]."""
    patch_mask: Tensor
    """bool [b, P]."""
    token_score: Tensor
    """float32 [b, L], -inf where not maskable."""
    patch_score: Tensor
    """float32 [b, P]."""


def num_masked(ratio: float, total: int) -> int:
    """Return how many of `total` tokens or patches are masked, by the contract of `ops.sync_mask`."""
    return 0 if ratio == 0 or total == 0 else min(total, max(1, int(ratio * total + 0.5)))


def maskable(layout: PackedLayout) -> Tensor:
    """Return bool [b, L]: every token but [CLS] (the first), [SEP] (the last) and padding."""
    position = torch.arange(layout.max_seqlen, device=layout.cu_seqlens.device)
    return (position > 0) & (position < layout.lengths[:, None] - 1)


def top_k_mask(score: Tensor, k: Tensor) -> Tensor:
    """Return bool [b, L]: the k[i] highest scores of row i; the lowest index first among equals. k: int64 [b]."""
    # argsort of argsort is the rank; stable, so ties are resolved as in `ops.sync_mask`.
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < k[:, None]


def sharded_rand(rows: int, width: int, generator: torch.Generator, shard: BatchShard | None) -> Tensor:
    """Return uniform numbers float32 [rows, width]; with a shard its rows of the global batch's numbers."""
    if shard is None:
        return torch.rand(rows, width, device=generator.device, generator=generator)
    # Every rank draws for the global batch, so the result does not depend on the number of ranks.
    drawn = torch.rand(shard.global_size, width, device=generator.device, generator=generator)
    return drawn[shard.rows]


def random_masks(
    layout: PackedLayout, patches: int, config: MaskConfig, generator: torch.Generator, shard: BatchShard | None = None
) -> Masks:
    """Return uniformly random masks with the same counts as sync masks.

    shard: of the batch, if it is sharded; `layout.max_seqlen` is then that of the global batch.
    """
    allowed = maskable(layout)
    token_score = sharded_rand(*allowed.shape, generator, shard).masked_fill(~allowed, -torch.inf)
    patch_score = sharded_rand(len(layout), patches, generator, shard)
    m = allowed.sum(1)
    # `num_masked` on the device, for all texts at once.
    tokens = (config.token_ratio * m.double() + 0.5).floor().clamp(min=1).minimum(m) if config.token_ratio else m * 0
    # Top k of uniform scores is a uniformly random subset, and has the same code as sync masks.
    return Masks(
        top_k_mask(token_score, tokens),
        top_k_mask(patch_score, m * 0 + num_masked(config.patch_ratio, patches)),
        token_score,
        patch_score,
    )


def sync_masks(teacher: SyncMaskModel, images: Tensor, text: Tensor, layout: PackedLayout, config: MaskConfig) -> Masks:
    """Return masks from the teacher's cross-attention in fusion layer `config.layer`; later layers are not computed.

    images: [b, 1 + P, C] and text: packed [T, C], features of the teacher; text i belongs to image i.
    A new score rule is added in `ops.sync_mask` (kernels/sync_mask.py) and as a value of `MaskConfig`.
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


def sync_probability(progress: float, ramp: tuple[float, float]) -> float:
    """Return a sample's probability of a sync mask at `progress` (0 to 1) of the training.

    0 before the ramp, 1 after it, linear between (our choice: the teacher's attention is noise at first).
    """
    low, high = ramp
    return float(progress >= high) if low == high else min(1.0, max(0.0, (progress - low) / (high - low)))


def mix_masks(
    sync: Masks, random: Masks, probability: float, generator: torch.Generator, shard: BatchShard | None = None
) -> Masks:
    """Take the sync masks of a sample with the given probability, else its random ones."""
    use_sync = sharded_rand(len(sync.token_mask), 1, generator, shard) < probability
    token_mask, patch_mask = (torch.where(use_sync, a, b) for a, b in zip(sync[:2], random[:2], strict=True))
    return Masks(token_mask, patch_mask, sync.token_score, sync.patch_score)
