"""The pretraining losses of a batch: teacher, masks, student, ITC, ITM, MLM, MIM and word presence.

Nothing here knows of files, epochs or the command line. A further loss is a function of its own that returns a
`LossSum`, a weight in `LossConfig`, and a line here that puts it into `sums`.

Shape letters: B pairs of the global batch, b of this rank, P patches, T tokens of this rank's texts, C width, E width
of the ITC space.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.model.attention import uses_varlen
from syncmask_fast.model.layout import PackedLayout, group_by_image
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective import losses
from syncmask_fast.objective.losses import LossSum
from syncmask_fast.objective.masking import Masks, mix_masks, num_masked, random_masks, sync_masks
from syncmask_fast.objective.memory import Features, Queue
from syncmask_fast.objective.negatives import make_negative_pairs
from syncmask_fast.objective.presence import presence_losses
from syncmask_fast.objective.schedule import Schedule


class MaskedImages(NamedTuple):
    """The masked copies of a batch's images, as the MIM head takes them."""

    masked_index: Tensor
    """int64 [b, n]: numbers of the masked patches."""
    queries: Tensor
    """[b, n, C]: what the head predicts the masked patches from."""
    visible: Tensor | None
    """[b, 1 + P - n, C]: features of [CLS] and the other patches, if only these were encoded."""


class StudentOutput(NamedTuple):
    """What the student's image and text encoders return."""

    images: Tensor
    """[b, 1 + P, C] features of the full images."""
    masked_images: MaskedImages | None
    texts: Tensor
    """[T, C] packed features of the full texts, or [2 T, C] with those of the masked texts after them."""
    layout: PackedLayout
    """Of the b full texts."""
    text_layout: PackedLayout
    """Of all rows of `texts`."""
    masked_at: Tensor | None
    """int64 [n]: where the masked tokens are in `batch.token_ids`."""


def pretraining_losses(
    model: SyncMaskModel, teacher: SyncMaskModel, batch: Batch, queue: Queue, config: TrainConfig, schedule: Schedule
) -> tuple[dict[str, Tensor], Features]:
    """Return all losses of a batch, and its features for the queue and the feature bank.

    The losses are float32 scalars: "total", the weighted sum with gradient, and each part by its name. Over several
    ranks they are this rank's share (`losses.means`). The features are of the global batch: the teacher's, or the
    student's where the teacher is not needed.
    """
    shard, layout = batch.shard, PackedLayout.of_batch(batch)
    generator = torch.Generator(batch.pixels.device).manual_seed(schedule.seed)
    masking = schedule.with_fusion and config.masking != "none"
    sums: dict[str, LossSum] = {}

    # 1. Teacher: features for ITC, masks and the feature bank.
    teacher_feats: tuple[Tensor, ...] = ()
    if schedule.with_fusion or schedule.alpha or len(queue.product_ids):
        with torch.no_grad():
            teacher_images = teacher.image(batch.pixels)
            teacher_texts = teacher.text(batch.token_ids, layout)
            teacher_feats = teacher.project_images(teacher_images), teacher.project_texts(teacher_texts, layout)

    # 2. Masks: random, or where the teacher's cross-attention finds image and text to agree.
    masks = None
    if masking:
        masks = random_masks(layout, model.image.patches, config.mask, generator, shard)
        if config.masking == "sync" and schedule.sync_probability > 0:
            with torch.no_grad():
                sync = sync_masks(teacher, teacher_images, teacher_texts, layout, config.mask)
            masks = mix_masks(sync, masks, schedule.sync_probability, generator, shard)

    # 3. Student: full and masked images in one pass, full and masked texts in one pass.
    student = _encode(model, batch, layout, masks, config)

    # 4. ITC on the global batch and the queue; word presence in the first fusion layer.
    # One collective for the features of student and teacher.
    own = model.project_images(student.images), model.project_texts(student.texts, layout)
    gathered = shard.gather(torch.cat([*own, *teacher_feats], 1)).split(config.embed_dim, 1)
    feats = Features(*gathered[:2])
    momentum = Features(*(x.detach() for x in gathered[2:] or feats))
    sums["itc"] = losses.itc_loss(
        feats, momentum, shard.product_ids, queue, model.temperature, schedule.alpha, shard.rows
    )
    if config.loss.presence:
        sums |= presence_losses(model, batch, student.images, layout, config, schedule.seed)

    # 5. Fusion: true pairs, hard negatives and masked texts in one pass.
    if schedule.with_fusion:
        # Sampling is not differentiable.
        detached = Features(*(x.detach() for x in feats))
        sums |= _itm_and_mlm(model, student, detached, batch, config, schedule.seed)

    # 6. MIM: masked patches against the full text.
    if student.masked_images is not None:
        masked = student.masked_images
        predicted = model.mim_head(masked.queries, student.texts[: layout.total], layout, masked.visible)
        if config.loss.mim_target == "pixels":
            target = losses.normalized_patches(batch.pixels, config.image.patch, masked.masked_index)
        else:
            target = _take_patches(teacher_images, masked.masked_index)
            target = F.layer_norm(target, target.shape[-1:])
        sums["mim"] = losses.mim_loss(predicted, target)

    # 7. Averages over all ranks, and their weighted sum.
    means = losses.means(sums, shard)
    total = sum(config.loss.weight(name) * loss for name, loss in means.items())
    return {"total": total} | {name: loss.detach() for name, loss in means.items()}, momentum


def _encode(
    model: SyncMaskModel, batch: Batch, layout: PackedLayout, masks: Masks | None, config: TrainConfig
) -> StudentOutput:
    """Encode images and texts, and their masked copies where there are masks."""
    shard = batch.shard
    # Counts of masked tokens and patches follow from lengths, so the host knows the shapes without a sync.
    patches = num_masked(config.mask.patch_ratio, model.image.patches) if masks else 0
    tokens = [num_masked(config.mask.token_ratio, n - 2) if masks else 0 for n in shard.lengths]

    if patches:
        images, masked_images = _encode_images(model, config, batch.pixels, masks.patch_mask, patches)
    else:
        images, masked_images = model.image(batch.pixels), None

    token_ids, text_layout, masked_at = batch.token_ids, layout, None
    if sum(tokens):  # on any rank: all ranks must take the same path
        masked = layout.unpad(masks.token_mask)
        masked_at = torch.nonzero_static(masked, size=sum(tokens[shard.rows]))[:, 0]
        token_ids = torch.cat([token_ids, token_ids.masked_fill(masked, model.mask_id)])
        text_layout = layout + layout
    texts = model.text(token_ids, text_layout)
    return StudentOutput(images, masked_images, texts, layout, text_layout, masked_at)


def _encode_images(
    model: SyncMaskModel, config: TrainConfig, pixels: Tensor, patch_mask: Tensor, n: int
) -> tuple[Tensor, MaskedImages]:
    """Return features [b, 1 + P, C] of full images, and their masked copies. patch_mask: bool [b, P], n in each row."""
    # A stable sort of the mask lists the masked patches first, each kind in its order.
    order = patch_mask.byte().argsort(dim=1, descending=True, stable=True)
    masked_index, visible_index = order.tensor_split([n], dim=1)
    if config.loss.mim_input == "visible":
        images, visible = model.image.forward_visible(pixels, patch_mask, visible_index)
        return images, MaskedImages(masked_index, model.image.mask_token_queries(masked_index), visible)
    images, masked = model.image(pixels, patch_mask).chunk(2)
    return images, MaskedImages(masked_index, _take_patches(masked, masked_index), None)


def _take_patches(features: Tensor, index: Tensor) -> Tensor:
    """Return [b, n, C], the patches int64 [b, n] of features [b, 1 + P, C] with [CLS] first."""
    return features.gather(1, 1 + index[..., None].expand(-1, -1, features.shape[2]))


def _itm_and_mlm(
    model: SyncMaskModel, student: StudentOutput, feats: Features, batch: Batch, config: TrainConfig, seed: int
) -> dict[str, LossSum]:
    """Return ITM and MLM from one pass of the fusion encoder.

    feats: of the global batch, without gradient. Each image's keys and values are projected once for all of its texts.
    """
    layout, device = student.layout, batch.pixels.device
    b = len(layout)
    each = torch.arange(b, device=device)
    negatives = make_negative_pairs(feats, student.texts, student.text_layout, batch.shard, config, seed)

    # Sequences of the pass: true pairs, negatives, and the masked texts, which follow the full ones in `text_layout`.
    sequences, image_of = [each, negatives.sequences], [each, negatives.image_of]
    capacity = layout.total + negatives.max_tokens
    pairs = b + len(negatives.sequences)
    if student.masked_at is not None:
        sequences, image_of = [*sequences, each + b], [*image_of, each]
        capacity += layout.total
    fusion = group_by_image(
        negatives.layout, torch.cat(sequences), torch.cat(image_of), b, capacity if uses_varlen(device) else None
    )
    fused = model.fusion(negatives.texts[fusion.source_rows], fusion, student.images)

    logits = model.itm_head(fused[fusion.cls_rows[:pairs]])
    matched = torch.arange(pairs, device=device) < b
    sums = {"itm": losses.itm_loss(logits, matched, torch.cat([negatives.weight.new_ones(b), negatives.weight]))}
    if student.masked_at is not None:
        at = student.masked_at
        rows = fusion.cls_rows[pairs:][layout.segment_ids[at]] + layout.position_ids[at]
        logits = model.mlm_head(fused[rows], model.text.word_embeddings.weight)
        sums["mlm"] = losses.mlm_loss(logits, batch.token_ids[at])
    return sums
