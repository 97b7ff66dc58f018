"""Hard negatives for ITM: which pair serves as the negative of which, and how ranks exchange the texts.

Shape letters: B pairs of the pool that negatives come from, b pairs of this rank, E width of the ITC space, C width of
the text encoder.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from syncmask_fast import ops
from syncmask_fast.config import TrainConfig
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.objective.memory import Features


class NegativePairs(NamedTuple):
    """This rank's ITM negatives: packed texts, and the image that each of them is compared with."""

    sequences: Tensor
    """int64 [N]: numbers of the texts in `layout`; the first b are the negatives of this rank's images."""
    image_of: Tensor
    """int64 [N]: this rank's image that each text is paired with."""
    weight: Tensor
    """float32 [N]: 0 where a pair has no negative, because all other pairs show its product."""
    texts: Tensor
    """[T, C] packed text features, those fetched from other ranks last."""
    layout: PackedLayout
    max_tokens: int
    """Upper bound of the tokens of the N sequences, known without a host sync."""


def negative_pool(shard: BatchShard, config: TrainConfig) -> BatchShard:
    """Return the batch that negatives come from: the global one, or this rank's rows (`--loss.negatives`)."""
    return shard.local() if config.loss.negatives == "local" else shard


def sample_hard_negatives(
    anchors: Tensor, candidates: Tensor, product_ids: Tensor, margin: float, temperature: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return for each pair the number of another pair as its negative, int64 [B], and whether there is one, bool [B].

    anchors, candidates: unit vectors [B, E] of which row i is a true pair; product_ids: int64 [B].

    Sampled in proportion to exp(similarity / temperature), as ALBEF does, but only among other products that are less
    similar than the true pair by `margin` (semi-hard, FaceNet); if there are none, among all other products.
    """
    true_similarity = (anchors * candidates).sum(1)
    arguments = (anchors, candidates, product_ids, product_ids)
    index, _ = ops.mine_semi_hard(*arguments, true_similarity, margin=margin, temperature=temperature, seed=seed)
    no_limit = torch.full_like(true_similarity, torch.inf)
    fallback, _ = ops.mine_semi_hard(*arguments, no_limit, temperature=temperature, seed=seed)
    # -1 marks a pair without such a negative. The caller gives it weight 0, so any valid index will do.
    index = torch.where(index >= 0, index, fallback)[:, 0]
    return index.clamp(min=0), index >= 0


def make_negative_pairs(
    feats: Features, texts: Tensor, layout: PackedLayout, shard: BatchShard, config: TrainConfig, seed: int
) -> NegativePairs:
    """Draw a text for each image and an image for each text of this rank.

    feats: of the global batch, without gradient; texts: [T, C] packed by `layout`, whose first b sequences are the full
    texts of this rank. Reads the draws back from the device if the pool is on several ranks.
    """
    pool, device = negative_pool(shard, config), texts.device
    if pool is not shard:
        feats = Features(*(x[shard.rows] for x in feats))
    # Hard batching has no upper limit on the similarity of a negative.
    margin = config.batch.margin if config.batching == "semi_hard" else -torch.inf
    draw = pool.product_ids, margin, config.loss.temperature
    negative_text, has_text = sample_hard_negatives(feats.images, feats.texts, *draw, seed)
    negative_image, has_image = sample_hard_negatives(feats.texts, feats.images, *draw, seed + 1)

    # On one rank all texts are here already.
    b = shard.rows.stop - shard.rows.start
    each = torch.arange(b, device=device)
    if pool.group.world_size == 1:
        sequences, image_of = torch.cat([negative_text, each]), torch.cat([each, negative_image])
        # The host does not know which texts were drawn: each could be the longest.
        max_tokens = b * layout.max_seqlen + sum(shard.lengths[shard.rows])
        return NegativePairs(sequences, image_of, torch.cat([has_text, has_image]).float(), texts, layout, max_tokens)

    # Over ranks the texts travel to the images, since an image's features are many times as large as a text's.
    full = texts[: sum(shard.lengths[shard.rows])]
    fetched, lengths, image, drawn_by = _exchange_negatives(pool, full, negative_text, negative_image)
    sequences = len(layout) + torch.arange(len(lengths), device=device)
    weight = torch.cat([has_text[pool.rows], has_image[drawn_by]]).float()
    both = layout + PackedLayout.of(lengths, device)
    image_of, texts = torch.cat([each, image]), torch.cat([texts, fetched])
    return NegativePairs(sequences, image_of, weight, texts, both, sum(lengths))


def _exchange_negatives(
    pool: BatchShard, texts: Tensor, negative_text: Tensor, negative_image: Tensor
) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Fetch the texts that are this rank's images' negatives, then those that drew one of its images.

    texts: [T, C] of this rank; negative_text, negative_image: int64 [B], the same on all ranks.
    returns: packed texts [rows, C]; their lengths; for the second kind the image that each drew, counted from this
             rank's first, int64 [n]; and its number in the global batch, int64 [n].
    """
    # Rank 0 decides: near-ties could be drawn differently on devices of different kinds.
    drawn = pool.group.broadcast(torch.stack([negative_text, negative_image]).cpu()).numpy()
    bounds = list(zip(pool.bounds, pool.bounds[1:], strict=False))
    drew = [np.flatnonzero((begin <= drawn[1]) & (drawn[1] < end)) for begin, end in bounds]
    wanted = [np.concatenate([drawn[0, begin:end], rows]) for (begin, end), rows in zip(bounds, drew, strict=True)]
    mine = drew[pool.group.rank]
    image = drawn[1, mine] - pool.rows.start
    lengths = [pool.lengths[n] for n in wanted[pool.group.rank]]
    numbers = (torch.from_numpy(x).to(texts.device, non_blocking=True) for x in (image, mine))
    return pool.exchange(texts, wanted, pool.lengths), lengths, *numbers
