"""One training step: teacher, masks, student, four losses. Nothing here knows of files, epochs or the command line.

Shape letters: B pairs of the batch, P patches, T tokens of the batch's texts, E width of the ITC space.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_fast import losses, ops
from syncmask_fast.attention import Layout, takes_packed
from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.encoders import pack_by_image, pack_pairs
from syncmask_fast.masking import blend, count, maskable, random_masks, random_rectangles, sync_masks
from syncmask_fast.model import SyncMaskModel

ROWS_MULTIPLE = 128


class Losses(NamedTuple):
    """The weighted sum and its parts, float32 scalars on the device; NaN for a part that was not computed."""

    total: Tensor
    itc: Tensor
    itm: Tensor
    mlm: Tensor
    mim: Tensor
    presence: Tensor


class Momentum(NamedTuple):
    """Unit vectors [B, E] of a batch."""

    images: Tensor
    texts: Tensor


def make_teacher(model: SyncMaskModel) -> SyncMaskModel:
    """A copy of the model that takes no gradients."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: SyncMaskModel, model: SyncMaskModel, momentum: float, step: int, finite: Tensor | None = None) -> None:
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


def draw_negatives(anchors: Tensor, candidates: Tensor, ids: Tensor, margin: float, temperature: float, seed: int) -> tuple[Tensor, Tensor]:
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


def rows_multiple(device: torch.device) -> int:
    """What the rows of packed texts are filled up to a multiple of: in bfloat16 each new shape costs the CPU new machine code for its products, and
    CUDA's allocator new blocks."""
    return ROWS_MULTIPLE if torch.is_autocast_enabled(device.type) else 1


def encode_texts(model: SyncMaskModel, token_ids: Tensor, layout: Layout, multiple: int) -> Tensor:
    """[T, C] text features of packed token ids [T], computed on a multiple of rows."""
    filled = layout.filled(multiple)
    return model.text(torch.nn.functional.pad(token_ids, (0, filled.total - layout.total)), filled)[: layout.total]


def training_losses(
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
) -> tuple[Losses, Momentum]:
    """All losses of a batch, and features of it for the queue and the feature bank: the teacher's, or the model's where the teacher has no part.

    fuse:       False leaves out ITM, MLM and MIM (`config.loss.align`).
    sync_share: a sample's chance of a sync mask instead of a random one (`config.masking` "sync").
    alpha:      share of the teacher's soft targets in ITC.
    seed:       of this step: every draw (masks, negatives) follows from it.
    """
    device, b = batch.pixels.device, len(batch.lengths)
    layout = Layout(batch.cu_seqlens, max(batch.lengths), sum(batch.lengths))
    multiple = rows_multiple(device)
    generator = torch.Generator(device).manual_seed(seed)

    masks = momentum = None
    if fuse or alpha or len(queue.ids):  # otherwise nobody asks the teacher
        with torch.no_grad():
            teacher_images = teacher.image(batch.pixels)
            teacher_texts = encode_texts(teacher, batch.token_ids, layout, multiple)
            momentum = Momentum(teacher.project_images(teacher_images), teacher.project_texts(teacher_texts, layout))
    if fuse and config.masking != "none":
        masks = random_masks(layout, model.image.patches, config.mask, generator)
    if masks is not None and config.masking == "sync" and sync_share > 0:
        with torch.no_grad():
            masks = blend(sync_masks(teacher, teacher_images, teacher_texts, layout, config.mask), masks, sync_share, generator)

    words = patches = 0
    if masks is not None:
        words = sum(count(config.mask.token_ratio, n - 2) for n in batch.lengths)
        patches = count(config.mask.patch_ratio, model.image.patches)

    # Full image and masked copy in one pass; full text and masked copy in one pass.
    images = model.image(batch.pixels, masks.patches if patches else None)
    images, masked_images = images[:b], images[b:]
    token_ids, source, at = batch.token_ids, layout, None
    if words:
        hidden = layout.unpad(masks.words)
        at = torch.nonzero_static(hidden, size=words)[:, 0]
        token_ids, source = torch.cat([token_ids, token_ids.masked_fill(hidden, model.mask_id)]), layout + layout
    texts = encode_texts(model, token_ids, source, multiple)

    image_feats, text_feats = model.project_images(images), model.project_texts(texts, layout)
    momentum = momentum or Momentum(image_feats.detach(), text_feats.detach())
    itc = losses.contrastive_loss(image_feats, text_feats, *momentum, batch.product_ids, queue, model.temperature, alpha)

    weight = config.loss
    missing = itc.new_tensor(torch.nan)
    total, presence = weight.itc * itc, missing
    if weight.presence:
        presence = _presence_loss(model, config, batch, images, texts[: layout.total], layout, seed)
        total = total + weight.presence * presence
    if not fuse:
        return Losses(total, itc.detach(), missing, missing, missing, presence.detach()), momentum

    itm, mlm = _fusion_losses(model, config, batch, images, texts, source, layout, image_feats.detach(), text_feats.detach(), at, seed, multiple)

    mim = itc.new_zeros(())
    if patches:
        chosen = masks.patches.byte().argsort(dim=1, descending=True, stable=True)[:, :patches]
        hidden = masked_images.gather(1, 1 + chosen[..., None].expand(-1, -1, masked_images.shape[2]))
        predicted = model.patch_head(hidden, texts[: layout.total], layout)
        mim = losses.patch_loss(predicted, _mim_target(config, batch, teacher_images, chosen))

    total = total + weight.itm * itm + weight.mlm * mlm + weight.mim * mim
    return Losses(total, itc.detach(), itm.detach(), mlm.detach(), mim.detach(), presence.detach()), momentum


def _presence_loss(model: SyncMaskModel, config: TrainConfig, batch: Batch, images: Tensor, texts: Tensor, layout: Layout, seed: int) -> Tensor:
    """The presence loss in the first fusion layer, whose queries have not met an image yet, and that of the collages where there are any."""
    b, generator = len(images), torch.Generator().manual_seed(seed)  # of the host, which then knows the shifts
    q, k, _ = model.fusion.cross_projections(texts, pack_pairs(layout), images, 1)
    q, token_ids, words = layout.pad(q).transpose(1, 2), layout.pad(batch.token_ids), maskable(layout)
    shifts = (1 + torch.randperm(b - 1, generator=generator)[: config.loss.presence_images]).tolist()
    loss = losses.presence_loss(q, k.transpose(1, 2), token_ids, words, shifts)
    collages = round(config.loss.cuts * b)
    if not collages:
        return loss
    inside = random_rectangles(collages, model.image.grid, generator).to(images.device, non_blocking=True)

    def second(x: Tensor) -> Tensor:
        return x.roll(-shifts[0], 0)[:collages]

    pixels = torch.where(model.image.to_pixels(inside), batch.pixels[:collages], second(batch.pixels))
    _, k, _ = model.fusion.layers[0].cross.project(texts[:1], model.image(pixels))
    k = k[:, 1:].transpose(1, 2)
    first_ids, second_ids = token_ids[:collages], second(token_ids)
    here, there = losses.only_here(first_ids, words[:collages], second_ids), losses.only_here(second_ids, second(words), first_ids)
    return loss + (losses.collage_loss(q[:collages], k, inside, here) + losses.collage_loss(second(q), k, ~inside, there)) / 2


def _fusion_losses(
    model: SyncMaskModel,
    config: TrainConfig,
    batch: Batch,
    images: Tensor,
    texts: Tensor,
    source: Layout,
    layout: Layout,
    image_feats: Tensor,
    text_feats: Tensor,
    masked_at: Tensor | None,
    seed: int,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    """ITM and MLM from one pass of the fusion encoder: each image's keys and values are projected once for all texts that look at it."""
    device, b = images.device, len(batch.lengths)
    margin = config.group.margin if config.batching == "semi_hard" else -torch.inf
    draw = {"ids": batch.product_ids, "margin": margin, "temperature": config.loss.temperature}
    negative_text, has_text = draw_negatives(image_feats, text_feats, seed=seed, **draw)
    negative_image, has_image = draw_negatives(text_feats, image_feats, seed=seed + 1, **draw)

    each = torch.arange(b, device=device)
    sequences, looks_at = [each, negative_text, each], [each, each, negative_image]
    if masked_at is not None:  # the masked copies, which lie behind the full texts
        sequences, looks_at = [*sequences, each + b], [*looks_at, each]
    # On CUDA the length of the drawn texts stays unknown to the host, so the longest possible is reserved.
    capacity = (len(sequences) - 1) * layout.total + b * layout.longest if takes_packed(device) else None
    pack = pack_by_image(source, torch.cat(sequences), torch.cat(looks_at), b, capacity, multiple)
    fused = model.fusion(texts[pack.rows], pack, images)

    logits = model.match_head(fused[pack.first[: 3 * b]])
    matched = torch.arange(3 * b, device=device) < b
    itm = losses.matching_loss(logits, matched, torch.cat([torch.ones_like(has_text), has_text, has_image]).float())
    mlm = itm.new_zeros(())
    if masked_at is not None:
        rows = pack.first[3 * b :][layout.sequence[masked_at]] + layout.position[masked_at]
        mlm = losses.word_loss(model.word_head(fused[rows], model.text.words.weight), batch.token_ids[masked_at])
    return itm, mlm


def _mim_target(config: TrainConfig, batch: Batch, teacher_images: Tensor, chosen: Tensor) -> Tensor:
    if config.loss.mim_target == "pixels":
        return losses.patch_pixels(batch.pixels, config.image.patch, chosen)
    features = teacher_images.gather(1, 1 + chosen[..., None].expand(-1, -1, teacher_images.shape[2]))
    return torch.nn.functional.layer_norm(features, features.shape[-1:])
