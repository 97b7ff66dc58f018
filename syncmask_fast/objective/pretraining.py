"""One training step: teacher, masks, student, four losses. Nothing here knows of files, epochs or the command line.

Shape letters: B pairs of the batch, P patches, T tokens of the batch's texts, E width of the ITC space.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from syncmask_fast import ops
from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.distributed.shard import BatchShard, shard_of_batch
from syncmask_fast.model.attention import uses_varlen
from syncmask_fast.model.layout import PackedLayout, group_by_image, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective import losses
from syncmask_fast.objective.masking import blend, count, maskable, random_masks, random_rectangles, sync_masks


class Losses(NamedTuple):
    """The weighted sum and its parts, float32 scalars on the device; NaN for a part that was not computed. Those of several ranks add up."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    mlm: Tensor
    mim: Tensor
    presence: Tensor


class Features(NamedTuple):
    """Unit vectors [B, E] of a batch, the whole one where it is cut over several ranks."""

    images: Tensor
    texts: Tensor


def make_teacher(model: SyncMaskModel) -> SyncMaskModel:
    """A copy of the model that takes no gradients."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(
    teacher: SyncMaskModel, model: SyncMaskModel, momentum: float, step: int, finite: Tensor | None = None
) -> None:
    """Moves the teacher towards the model: teacher = m * teacher + (1 - m) * model with m = min(momentum, (1 + step) / (10 + step)).

    Running statistics (buffers) are taken over as they are: they are averages already. Where `finite`, a bool scalar on the device, is false,
    the model has not moved, and the teacher does not either.
    """
    momentum = min(momentum, (1 + step) / (10 + step))
    ours, theirs = list(teacher.parameters()), list(model.parameters())
    if finite is None:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)
    else:
        torch._foreach_lerp_(ours, theirs, [finite * (1 - momentum)] * len(ours))
    buffers = list(teacher.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(model.buffers()))


def sample_hard_negatives(
    anchors: Tensor, candidates: Tensor, ids: Tensor, margin: float, temperature: float, seed: int
) -> tuple[Tensor, Tensor]:
    """For each pair the number of another pair to serve as its ITM negative, int64 [B], and whether there is one, bool [B].

    Drawn by Gumbel top-1 in proportion to exp(similarity / temperature) among other products less similar than the true pair by `margin`;
    where none is, among all other products. Never the same product.
    """
    own = (anchors * candidates).sum(1)
    draw = {"temperature": temperature, "seed": seed}
    index, _ = ops.mine_semi_hard(anchors, candidates, ids, ids, own, margin=margin, **draw)
    other, _ = ops.mine_semi_hard(anchors, candidates, ids, ids, torch.full_like(own, torch.inf), **draw)
    index = torch.where(index >= 0, index, other)[:, 0]
    return index.clamp(min=0), index >= 0


def pretraining_losses(
    model: SyncMaskModel,
    teacher: SyncMaskModel,
    batch: Batch,
    queue: losses.Queue,
    config: TrainConfig,
    *,
    fuse: bool = True,
    sync_share: float,
    alpha: float,
    seed: int,
) -> tuple[Losses, Features]:
    """All losses of a batch, and features of it for the queue and the feature bank: the teacher's, or the model's where the teacher has no part.

    Of a batch that is cut over several ranks (`batch.shard`) the losses are this rank's part of the sum, and the features those of all.
    fuse:       False leaves out ITM, MLM and MIM (`config.loss.itc_only`).
    sync_share: a sample's chance of a sync mask instead of a random one (`config.masking` "sync").
    alpha:      share of the teacher's soft targets in ITC.
    seed:       of this step: every draw (masks, negatives) follows from it.
    """
    device = batch.pixels.device
    part = shard_of_batch(batch)
    layout = PackedLayout.of_batch(batch)
    generator = torch.Generator(device).manual_seed(seed)

    masks = momentum = None
    if fuse or alpha or len(queue.product_ids):  # otherwise nobody asks the teacher
        with torch.no_grad():
            teacher_images = teacher.image(batch.pixels)
            teacher_texts = teacher.text(batch.token_ids, layout)
            momentum = Features(teacher.project_images(teacher_images), teacher.project_texts(teacher_texts, layout))
    if fuse and config.masking != "none":
        masks = random_masks(layout, model.image.patches, config.mask, generator, part)
    if masks is not None and config.masking == "sync" and sync_share > 0:
        with torch.no_grad():
            masks = blend(
                sync_masks(teacher, teacher_images, teacher_texts, layout, config.mask),
                masks,
                sync_share,
                generator,
                part,
            )

    words = all_words = patches = 0
    if masks is not None:
        words, all_words = (
            sum(count(config.mask.token_ratio, n - 2) for n in lengths) for lengths in (batch.lengths, part.lengths)
        )
        patches = count(config.mask.patch_ratio, model.image.patches)

    images, masked_copy = (
        _encode_with_copy(model, config, batch.pixels, masks.patch_mask, patches)
        if patches
        else (model.image(batch.pixels), None)
    )
    token_ids, source, at = batch.token_ids, layout, None
    if all_words:  # full text and masked copy in one pass
        hidden = layout.unpad(masks.token_mask)
        at = torch.nonzero_static(hidden, size=words)[:, 0]
        token_ids, source = torch.cat([token_ids, token_ids.masked_fill(hidden, model.mask_id)]), layout + layout
    texts = model.text(token_ids, source)

    feats = [model.project_images(images), model.project_texts(texts, layout), *(momentum or ())]
    image_feats, text_feats, *teacher_feats = part.gather(torch.cat(feats, 1)).split(config.embed_dim, 1)
    momentum = Features(*(x.detach() for x in teacher_feats or (image_feats, text_feats)))
    itc = losses.itc_loss(
        image_feats, text_feats, *momentum, part.product_ids, queue, model.temperature, alpha, part.rows
    )

    weight = config.loss
    missing = itc.new_tensor(torch.nan)
    total, presence = weight.itc * itc, missing
    if weight.presence:
        presence = _presence_loss(model, config, batch, images, layout, seed)
        total = total + weight.presence * presence
    if not fuse:
        return Losses(total, itc.detach(), missing, missing, missing, presence.detach()), momentum

    itm, mlm = _fusion_losses(
        model,
        config,
        batch,
        images,
        texts,
        source,
        layout,
        image_feats.detach(),
        text_feats.detach(),
        at,
        all_words,
        seed,
    )

    mim = itc.new_zeros(())
    if masked_copy is not None:
        predicted = model.mim_head(masked_copy.hidden, texts[: layout.total], layout, masked_copy.visible)
        share = len(batch.lengths) / part.total
        mim = losses.mim_loss(predicted, _mim_target(config, batch, teacher_images, masked_copy.chosen)) * share

    total = total + weight.itm * itm + weight.mlm * mlm + weight.mim * mim
    return Losses(total, itc.detach(), itm.detach(), mlm.detach(), mim.detach(), presence.detach()), momentum


class MaskedImages(NamedTuple):
    """The masked copies of a batch's images, as the MIM head wants them."""

    chosen: Tensor
    """int64 [B, n]: the masked patches."""
    hidden: Tensor
    """[B, n, C]: what the head rebuilds them from."""
    visible: Tensor | None
    """[B, 1 + P - n, C]: features of the other patches where they alone were encoded."""


def _encode_with_copy(
    model: SyncMaskModel, config: TrainConfig, pixels: Tensor, patch_mask: Tensor, n: int
) -> tuple[Tensor, MaskedImages]:
    """Features [B, S, C] of images and their masked copies; patch_mask: bool [B, P], n in each row."""
    chosen, others = patch_mask.byte().argsort(dim=1, descending=True, stable=True).tensor_split([n], dim=1)
    if config.loss.mim_input == "visible":
        images, visible = model.image.forward_visible(pixels, patch_mask, others)
        return images, MaskedImages(chosen, model.image.mask_token_queries(chosen), visible)
    images, masked = model.image(pixels, patch_mask).chunk(2)  # both in one pass
    return images, MaskedImages(chosen, masked.gather(1, 1 + chosen[..., None].expand(-1, -1, masked.shape[2])), None)


def negatives_from(part: BatchShard, config: TrainConfig) -> BatchShard:
    """The batch that negatives are drawn from: the whole one, or this rank's part of it."""
    return part.apart() if config.loss.negatives == "local" else part


def collage_rows(ratio: float, of: int) -> list[int]:
    """Which of `of` pairs are put into collages: round(ratio * of) of them, spread evenly, so that every rank has its share."""
    return [n for n in range(of) if int((n + 1) * ratio + 0.5) > int(n * ratio + 0.5)]


def _presence_loss(
    model: SyncMaskModel, config: TrainConfig, batch: Batch, images: Tensor, layout: PackedLayout, seed: int
) -> Tensor:
    """The presence loss in the first fusion layer, whose queries have not met an image yet, and that of the collages where there are any.

    Both ask with mixed texts, in each of which about half of the words are another text's, so that a word can only be told by itself.
    """
    generator = torch.Generator().manual_seed(seed)  # of the host, which then knows the shifts
    part = shard_of_batch(batch)
    near = negatives_from(part, config)
    shifts = (1 + torch.randperm(near.total - 1, generator=generator)[: config.loss.presence_negatives]).tolist() or [0]
    words, token_ids = maskable(layout), near.gather(layout.pad(batch.token_ids))
    other = losses.roll_rows(near.gather(words), shifts[0], near.rows)
    drawn = torch.rand(part.total, words.shape[1], generator=generator)[part.rows].to(images.device, non_blocking=True)
    swapped = words & other & (drawn < 0.5)
    mixed = torch.where(swapped, losses.roll_rows(token_ids, shifts[0], near.rows), token_ids[near.rows])
    texts = model.text(layout.unpad(mixed), layout)
    q, k, _ = model.fusion.cross_attention_qkv(texts, one_to_one(layout), images, 1)
    q, k = layout.pad(q).transpose(1, 2), near.gather(k.transpose(1, 2))
    loss = losses.presence_loss(q, k, mixed, swapped, token_ids, words, shifts, near.rows, part.sum)
    collages = collage_rows(config.loss.collages, part.total)
    if not collages:
        return loss

    # Rows of the whole batch that each rank makes collages of, and their partners in the batch that negatives are from.
    own = [[n for n in collages if begin <= n < end] for begin, end in zip(part.bounds, part.bounds[1:], strict=False)]
    mine, begin, offset = own[part.group.rank], part.rows.start, part.rows.start - near.rows.start
    partners = [[(n - offset + shifts[0]) % near.total for n in rows] for rows in (own if near is part else [mine])]
    numbers = [n - begin for n in mine], partners[near.group.rank]
    at, their = (torch.tensor(rows, dtype=torch.int64).to(images.device, non_blocking=True) for rows in numbers)
    inside = random_rectangles(len(collages), model.image.grid, generator)[[collages.index(n) for n in mine]].to(
        images.device, non_blocking=True
    )

    pixels = torch.where(model.image.patch_mask_to_pixels(inside), batch.pixels[at], near.fetch(batch.pixels, partners))
    _, k, _ = model.fusion.layers[0].cross.project(texts[:1], model.image(pixels))
    k = k[:, 1:].transpose(1, 2)
    lacks_first, lacks_second = (
        losses.not_in_text(mixed[at], ids) for ids in (token_ids[near.rows][at], token_ids[their])
    )
    telling = words[at] & torch.where(swapped[at], lacks_first, lacks_second)
    return loss + losses.collage_loss(q[at], k, swapped[at][:, :, None] ^ inside[:, None], telling, part.sum)


def _fusion_losses(
    model: SyncMaskModel,
    config: TrainConfig,
    batch: Batch,
    images: Tensor,
    texts: Tensor,
    source: PackedLayout,
    layout: PackedLayout,
    image_feats: Tensor,
    text_feats: Tensor,
    masked_at: Tensor | None,
    all_words: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """ITM and MLM from one pass of the fusion encoder: each image's keys and values are projected once for all texts that look at it.

    image_feats, text_feats: of the whole batch. Where negatives are from other ranks, their texts travel to the images: an image that a text drew is
    many times as large as the text.
    """
    device, b = images.device, len(batch.lengths)
    part = shard_of_batch(batch)
    near = negatives_from(part, config)
    if near is not part:
        image_feats, text_feats = image_feats[part.rows], text_feats[part.rows]
    margin = config.batch.margin if config.batching == "semi_hard" else -torch.inf
    draw = {"ids": near.product_ids, "margin": margin, "temperature": config.loss.temperature}
    negative_text, has_text = sample_hard_negatives(image_feats, text_feats, seed=seed, **draw)
    negative_image, has_image = sample_hard_negatives(text_feats, image_feats, seed=seed + 1, **draw)

    each = torch.arange(b, device=device)
    capacity = None
    if near.group.world_size == 1:
        sequences, looks_at = [each, negative_text, each], [each, each, negative_image]
    else:
        fetched, lengths, negative_image, drawn_by = _fetch_negatives(
            near, texts[: layout.total], negative_text, negative_image
        )
        there = len(source) + torch.arange(len(lengths), device=device)
        texts, source = torch.cat([texts, fetched]), source + PackedLayout.of(lengths, device)
        sequences, looks_at = [each, there], [each, each, negative_image]
        has_text, has_image, capacity = has_text[near.rows], has_image[drawn_by], source.total
    pairs = sum(map(len, sequences))
    if masked_at is not None:  # the masked copies, which lie behind the full texts
        sequences, looks_at = [*sequences, each + b], [*looks_at, each]
    if not uses_varlen(device):
        capacity = None
    elif (
        capacity is None
    ):  # the length of the drawn texts stays unknown to the host, so the longest possible is reserved
        capacity = (len(sequences) - 1) * layout.total + b * layout.max_seqlen
    pack = group_by_image(source, torch.cat(sequences), torch.cat(looks_at), b, capacity)
    fused = model.fusion(texts[pack.source_rows], pack, images)

    logits = model.itm_head(fused[pack.cls_rows[:pairs]])
    matched = torch.arange(pairs, device=device) < b
    itm = losses.itm_loss(logits, matched, torch.cat([torch.ones(b, device=device), has_text, has_image]), part.sum)
    mlm = itm.new_zeros(())
    if masked_at is not None:
        rows = pack.cls_rows[pairs:][layout.segment_ids[masked_at]] + layout.position_ids[masked_at]
        mlm = losses.mlm_loss(
            model.mlm_head(fused[rows], model.text.word_embeddings.weight), batch.token_ids[masked_at], all_words
        )
    return itm, mlm


def _fetch_negatives(
    part: BatchShard, texts: Tensor, negative_text: Tensor, negative_image: Tensor
) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """The texts [rows, C] that are this rank's images' negatives, then those that drew one of its images; their lengths; of the latter the image
    that each drew, counted from this rank's first, and the number of each in the whole batch. Reads the draws back from the device.

    texts: [T, C] this rank's; negative_text, negative_image: int64 [B], of the whole batch, the same on all ranks.
    """
    drawn = part.group.broadcast(torch.stack([negative_text, negative_image]).cpu()).numpy()
    bounds = list(zip(part.bounds, part.bounds[1:], strict=False))
    drew = [np.flatnonzero((begin <= drawn[1]) & (drawn[1] < end)) for begin, end in bounds]
    wanted = [np.concatenate([drawn[0, begin:end], rows]) for (begin, end), rows in zip(bounds, drew, strict=True)]
    mine = drew[part.group.rank]
    image = drawn[1, mine] - part.rows.start
    lengths = [part.lengths[n] for n in wanted[part.group.rank]]
    numbers = (torch.from_numpy(x).to(texts.device, non_blocking=True) for x in (image, mine))
    return part.fetch(texts, wanted, part.lengths), lengths, *numbers


def _mim_target(config: TrainConfig, batch: Batch, teacher_images: Tensor, chosen: Tensor) -> Tensor:
    if config.loss.mim_target == "pixels":
        return losses.normalized_patches(batch.pixels, config.image.patch, chosen)
    features = teacher_images.gather(1, 1 + chosen[..., None].expand(-1, -1, teacher_images.shape[2]))
    return torch.nn.functional.layer_norm(features, features.shape[-1:])
