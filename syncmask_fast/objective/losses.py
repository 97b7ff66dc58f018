"""The losses of ALBEF (Li et al. 2021) with a MIM loss: ITC, ITM, MLM, MIM. Pure functions of tensors.

Each returns the sum over this rank's terms and their number. `means` divides by the number over all ranks, in one
place: the results of the ranks then add up to the loss of one process with the whole batch.

Shape letters: B pairs of the global batch, b of this rank, Q places of the queue, E width of the ITC space.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.objective.memory import Features, Queue


class LossSum(NamedTuple):
    """A loss before it is averaged."""

    sum: Tensor
    """float32 scalar with gradient: the sum over this rank's terms."""
    count: Tensor | int
    """How many terms there are, or the sum of their weights."""


def means(sums: dict[str, LossSum], shard: BatchShard) -> dict[str, Tensor]:
    """Return this rank's share of each mean over all ranks; the shares add up to the mean."""
    # Counts known to the host become device scalars without a copy.
    counts = torch.stack([s.sum.new_full((), s.count) if isinstance(s.count, int) else s.count for s in sums.values()])
    counts = shard.group.all_reduce(counts).clamp(min=1)  # one collective for all losses
    return {name: s.sum / n for (name, s), n in zip(sums.items(), counts, strict=True)}


def itc_loss(
    student: Features,
    teacher: Features,
    product_ids: Tensor,
    queue: Queue,
    temperature: Tensor,
    alpha: float,
    rows: slice,
) -> LossSum:
    """Image-text contrast with a queue and soft targets (ALBEF, equations 1, 2 and 6); positives by product
    (FashionSAP).

    student, teacher: unit vectors [B, E] of the global batch; product_ids: int64 [B].
    temperature:      float32 scalar. alpha: weight of the teacher's soft targets.
    rows:             the b anchors that this rank counts.
    returns:          sum over b anchors of the mean of both directions.
    """
    # 1. Candidates: the batch, then the queue. Images of one product are all positives, each with an equal share.
    candidate_ids = torch.cat([product_ids, queue.product_ids])
    empty = candidate_ids < 0
    positive = (product_ids[rows, None] == candidate_ids).float()
    positive = positive / positive.sum(1, keepdim=True)

    # 2. Both directions, each a softmax over all candidates.
    total = student.images.new_zeros(())
    image_to_text = student.images, student.texts, teacher.images, teacher.texts, queue.texts
    text_to_image = student.texts, student.images, teacher.texts, teacher.images, queue.images
    for anchors, others, teacher_anchors, teacher_others, queued in (image_to_text, text_to_image):
        # The batch's candidates are the student's, with gradient (our choice). With the teacher's, as in ALBEF, a model
        # that starts from random weights stays where all features are alike.
        logits = (anchors[rows] @ torch.cat([others, queued]).T / temperature).masked_fill(empty, -torch.inf)
        with torch.no_grad():
            similarity = teacher_anchors[rows] @ torch.cat([teacher_others, queued]).T / temperature
            soft = similarity.masked_fill(empty, -torch.inf).softmax(1)
            targets = alpha * soft + (1 - alpha) * positive
        # 0 * -inf is NaN: empty places must not reach the product.
        total = total - (targets * logits.log_softmax(1).masked_fill(empty, 0)).sum()
    return LossSum(total / 2, len(positive))


def itm_loss(logits: Tensor, matched: Tensor, weight: Tensor) -> LossSum:
    """Image-text matching: binary cross-entropy of logits [N, 2] with matched bool [N].

    weight: float32 [N]; 0 for pairs that have no negative.
    """
    # In float32: under autocast, bfloat16 logits would round small losses away.
    loss = F.cross_entropy(logits.float(), matched.long(), reduction="none")
    return LossSum((loss * weight).sum(), weight.sum())


def mlm_loss(logits: Tensor, token_ids: Tensor) -> LossSum:
    """Masked language modeling: cross-entropy of logits [n, vocab_size] at the masked tokens, token_ids int64 [n]."""
    if not len(token_ids):  # cross_entropy of nothing is NaN
        return LossSum(logits.float().sum(), 0)
    return LossSum(F.cross_entropy(logits.float(), token_ids, reduction="sum"), len(token_ids))


def mim_loss(predicted: Tensor, target: Tensor) -> LossSum:
    """Masked image modeling: mean squared error of each image at its masked patches, both [b, n, size of a target]."""
    return LossSum(F.mse_loss(predicted.float(), target.float()) * len(target), len(target))


def normalized_patches(pixels: Tensor, patch: int, masked_index: Tensor) -> Tensor:
    """Return patches with mean 0 and variance 1 each (He et al. 2022, "normalized pixels"): [b, n, 3 patch²].

    pixels: [b, 3, size, size]; masked_index: int64 [b, n], patch numbers row by row.
    """
    patches = F.unfold(pixels.float(), patch, stride=patch).transpose(1, 2)
    values = patches.gather(1, masked_index[..., None].expand(-1, -1, patches.shape[2]))
    return (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + 1e-6).sqrt()
