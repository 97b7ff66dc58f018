"""The word presence loss (our choice): teach the masking layer's cross-attention which images show a token, and where.

Texts are mixed in pairs, token by token, so that a token can only be told by itself. In the images of the pair and in
further ones, its attention is to lie on patches where the image's text has the token, and on [CLS] where it does not.
Collages of two images add the place: a token's attention is to lie on the part that comes from its own image.

Shape letters: b pairs of this rank, B of the pool that negatives come from, L tokens of the longest text, P patches,
H heads, D channels of a head, M collages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import LossSum
from syncmask_fast.objective.masking import maskable
from syncmask_fast.objective.negatives import negative_pool


class MixedTexts(NamedTuple):
    """Texts in which about half of the tokens come from another text."""

    token_ids: Tensor
    """int64 [b, L]."""
    swapped: Tensor
    """bool [b, L]: tokens of text n + shift (modulo B) in mixed text n; the others are from text n."""
    words: Tensor
    """bool [b, L]: neither [CLS] nor [SEP] nor padding."""


def presence_losses(
    model: SyncMaskModel, batch: Batch, images: Tensor, layout: PackedLayout, config: TrainConfig, seed: int
) -> dict[str, LossSum]:
    """Return the presence loss, and with `--loss.collages` that of the collages. images: [b, 1 + P, C] features."""
    generator = torch.Generator().manual_seed(seed)  # on the host, which needs the shifts
    shard, device = batch.shard, images.device
    pool = negative_pool(shard, config)
    layer = config.mask.layer

    # 1. Compare text n with image n and with images n + shift. Shifts are distinct, so no image counts twice.
    permutation = torch.randperm(pool.global_size - 1, generator=generator)
    shifts = (1 + permutation[: config.loss.presence_negatives]).tolist() or [0]

    # 2. Swap about half of the tokens with those at the same positions of text n + shifts[0].
    words, token_ids = maskable(layout), pool.gather(layout.pad(batch.token_ids))
    other_words = roll_rows(pool.gather(words), shifts[0], pool.rows)
    drawn = torch.rand(shard.global_size, words.shape[1], generator=generator)[shard.rows]
    swapped = words & other_words & (drawn.to(device, non_blocking=True) < 0.5)
    other_ids = roll_rows(token_ids, shifts[0], pool.rows)
    mixed = MixedTexts(torch.where(swapped, other_ids, token_ids[pool.rows]), swapped, words)

    # 3. Queries of the mixed texts at the masking layer, keys of all images. Both come from one pass of this rank's
    # rows: config.check() demands layer 1, where queries have not met an image yet.
    texts = model.text(layout.unpad(mixed.token_ids), layout)
    q, k, _ = model.fusion.cross_attention_qkv(texts, one_to_one(layout), images, layer)
    q, k = layout.pad(q).transpose(1, 2), pool.gather(k.transpose(1, 2))
    sums = {"presence": presence_loss(q, k, mixed, token_ids, shifts, pool.rows)}

    # 4. Collages of some images with the image of the other text.
    collages = collage_rows(config.loss.collages, shard.global_size)
    if not collages:
        return sums
    by_rank = shard.rows_of_ranks(collages)
    mine, offset = by_rank[shard.group.rank], shard.rows.start - pool.rows.start
    sources = by_rank if pool is shard else [mine]
    partners = [[(n - offset + shifts[0]) % pool.global_size for n in rows] for rows in sources]
    numbers = [n - shard.rows.start for n in mine], partners[pool.group.rank]
    at, partner = (torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True) for rows in numbers)
    rectangles = random_rectangles(len(collages), model.image.grid, generator)
    inside = rectangles[[collages.index(n) for n in mine]].to(device, non_blocking=True)

    partner_pixels = pool.exchange(batch.pixels, partners)
    pixels = torch.where(model.image.patch_mask_to_pixels(inside), batch.pixels[at], partner_pixels)
    _, k, _ = model.fusion.layers[layer - 1].cross.project(texts[:1], model.image(pixels))
    k = k[:, 1:].transpose(1, 2)
    # A token that both texts have may be on either part.
    absent_in_own = not_in_text(mixed.token_ids[at], token_ids[pool.rows][at])
    absent_in_partner = not_in_text(mixed.token_ids[at], token_ids[partner])
    counted = words[at] & torch.where(swapped[at], absent_in_own, absent_in_partner)
    own_patches = swapped[at][:, :, None] ^ inside[:, None]
    return sums | {"collage": collage_loss(q[at], k, own_patches, counted)}


def presence_loss(
    q: Tensor, k: Tensor, mixed: MixedTexts, token_ids: Tensor, shifts: Sequence[int], rows: slice
) -> LossSum:
    """Binary cross-entropy of "the attention is on a patch" for tokens of mixed texts.

    q:         [b, H, L, D] queries of the mixed texts; k: [B, H, 1 + P, D] keys of the images, [CLS] first.
    token_ids: int64 [B, L], padded: the images' own texts.
    shifts:    mixed text n is compared with image n and image n + shift for each shift; the first is that of `mixed`.
    rows:      the b pairs of the B whose mixed texts these are.
    """
    scale = q.shape[-1] ** -0.5

    def compare(shift: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-odds [b, H, L], the loss as a negative [b, L], and whether the image's text lacks the token."""
        logits = (q @ roll_rows(k, shift, rows).transpose(-1, -2)).float() * scale
        log_odds = logits[..., 1:].logsumexp(-1) - logits[..., 0]
        absent = not_in_text(mixed.token_ids, roll_rows(token_ids, shift, rows)).float()
        return log_odds, F.softplus(log_odds).mean(1), absent

    # The token's source image is the positive, the other image of the mixture a negative where its text lacks the
    # token.
    own, own_negative, own_absent = compare(0)
    other, other_negative, other_absent = compare(shifts[0])
    source_image = torch.where(mixed.swapped[:, None], other, own)
    loss = torch.where(mixed.swapped, own_negative * own_absent, other_negative * other_absent)
    absent = torch.where(mixed.swapped, own_absent, other_absent)

    # All further images together count as much as that one.
    extra = shifts[1:]
    for shift in extra:
        _, negative, absent_there = compare(shift)
        loss = loss + negative * absent_there / len(extra)
        absent = absent + absent_there / len(extra)
    if extra:
        loss, absent = loss / 2, absent / 2

    # With a share r of the negatives lacking the token, the positive's label is (1 + r) / 2: a token that no image
    # explains then has log-odds 0, however common it is. One that every text has gets label 1/2.
    positive, negative = F.softplus(-source_image).mean(1), F.softplus(source_image).mean(1)
    loss = loss + ((1 + absent) * positive + (1 - absent) * negative) / 2
    return LossSum((loss * mixed.words).sum(), ((1 + absent) * mixed.words).sum())


def collage_loss(q: Tensor, k: Tensor, own_patches: Tensor, counted: Tensor) -> LossSum:
    """Binary cross-entropy of "of the attention on patches, the token's is on its own image's part".

    q: [M, H, L, D] queries of mixed texts; k: [M, H, P, D] keys of the collages' patches.
    own_patches: bool [M, L, P]; counted: bool [M, L].
    """
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    own = own_patches[:, None]
    log_odds = logits.masked_fill(~own, -torch.inf).logsumexp(-1) - logits.masked_fill(own, -torch.inf).logsumexp(-1)
    return LossSum((F.softplus(-log_odds).mean(1) * counted).sum(), counted.sum().float())


def collage_rows(ratio: float, pairs: int) -> list[int]:
    """Return which pairs become collages: round(ratio * pairs) of them, spread evenly so that every rank has its
    share.
    """
    return [n for n in range(pairs) if int((n + 1) * ratio + 0.5) > int(n * ratio + 0.5)]


def random_rectangles(n: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return bool [n, P]: the patches of random rectangles whose sides are a third to two thirds of the grid's."""
    inside = torch.ones(n, *grid, dtype=torch.bool, device=generator.device)
    for axis, side in ((1, grid[0]), (2, grid[1])):
        low, high = -(-side // 3), max(-(-side // 3), 2 * side // 3)
        drawn = torch.rand(2, n, 1, device=generator.device, generator=generator)
        length = low + (drawn[0] * (high - low + 1)).floor()
        begin = (drawn[1] * (side - length + 1)).floor()
        place = torch.arange(side, device=generator.device)
        within = (place >= begin) & (place < begin + length)
        inside &= within[:, :, None] if axis == 1 else within[:, None, :]
    return inside.flatten(1)


def roll_rows(x: Tensor, shift: int, rows: slice) -> Tensor:
    """Return x.roll(-shift, 0)[rows] without computing the other rows; shift is 0 or more."""
    begin, n = (rows.start + shift) % len(x), rows.stop - rows.start
    return x[begin : begin + n] if begin + n <= len(x) else torch.cat([x[begin:], x[: begin + n - len(x)]])


def not_in_text(token_ids: Tensor, other_ids: Tensor) -> Tensor:
    """Return bool [b, L]: tokens that the other text lacks. token_ids, other_ids: int64 [b, L], padded."""
    return (token_ids[:, :, None] != other_ids[:, None, :]).all(2)
