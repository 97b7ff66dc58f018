"""The parents' way (ALBEF, FashionSAP) of the trainer's step: the same objectives on the same weights, written plainly.

Each way is a switch of `Ways`. With all of them off this is the trainer's step; with one on, that step with one idea taken out of it; with all
on, what someone gets who follows the papers. With the same masks and negatives the losses are the same for any switches
(`tests/test_baseline.py`), but for dropout, which is random. Left as the trainer has them: the loss of the contrastive queue, and Muon.

Shape letters: B pairs, L tokens of the longest text, T tokens of all texts, P patches, C width.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncmask_fast import ops
from syncmask_fast.config import OptimConfig, TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.kernels.sync_mask import _patch_score_of_head, _token_score_of_head
from syncmask_fast.model import encoders, linear
from syncmask_fast.model.attention import sdpa_padded
from syncmask_fast.model.encoders import CrossAttention, FeedForward, SelfAttention
from syncmask_fast.model.layout import FusionBatch, PackedLayout, group_by_image, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective import losses
from syncmask_fast.objective.masking import Masks, _highest, blend, count, maskable, random_masks
from syncmask_fast.objective.pretraining import (
    Features,
    Losses,
    _mim_target,
    _presence_loss,
    sample_hard_negatives,
    update_teacher,
)
from syncmask_fast.train import use_bfloat16
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.optimizer import Optimizer, make_optimizer

DROPOUT = 0.1  # of BERT's attention weights, and of what its attention and feed-forward give; ALBEF keeps both


@dataclass(frozen=True)
class Ways:
    """Which of the parents' ways are taken."""

    padding: bool = False
    """Texts are padded to the longest of the batch, and the padding is computed like words."""
    project_again: bool = False
    """Three passes of the fusion encoder (true pairs, both negatives, masked texts), each of which projects its images' keys and values."""
    full_head: bool = False
    """The MLM head and its loss see every token."""
    loops: bool = False
    """Negatives are drawn and put together sample by sample, with `multinomial` and `.item()`."""
    full_teacher: bool = False
    """The teacher runs all its fusion layers, whichever its masks are read from."""
    maps: bool = False
    """The teacher's attention map is made, and masks by reductions and `topk` of it."""
    ema_loop: bool = False
    """The teacher moves parameter by parameter."""
    plain_adamw: bool = False
    """AdamW as it comes, neither fused nor told to be."""
    fused_attention: bool = False
    """PyTorch's attention, for which texts are padded and all is float32, instead of our kernel on the CPU."""
    written_attention: bool = False
    """Attention written out, padded: scores, softmax, and weights times values, each a tensor."""
    dropout: bool = False
    """BERT's dropout in the student's text and fusion layers."""
    wide_residuals: bool = False
    """Autocast as it comes: residuals and norms in float32, converted for each product."""
    planar_pixels: bool = False
    """A convolutional stem on pixels whose channels lie one after the other."""
    plain_linear: bool = False
    """PyTorch's linear layers."""
    float32: bool = False
    """No autocast on CUDA, nor on a CPU where the trainer takes bfloat16."""

    @classmethod
    def all(cls) -> Ways:
        return cls(*(True for _ in dataclasses.fields(cls)))


@contextlib.contextmanager
def parents_layers(model: SyncMaskModel, ways: Ways) -> Iterator[None]:
    """The model's layers compute in these ways."""
    with contextlib.ExitStack() as changes:
        if ways.written_attention or ways.dropout:  # weights that nobody sees cannot be dropped
            changes.enter_context(
                mock.patch.object(encoders, "attention", lambda *of: written_attention(*of, dropout=ways.dropout))
            )
        elif ways.fused_attention:
            changes.enter_context(mock.patch.object(encoders, "attention", sdpa_padded))
        if ways.wide_residuals:
            changes.enter_context(mock.patch.object(encoders, "to_autocast_dtype", lambda x: x))
        if ways.plain_linear:
            changes.enter_context(mock.patch.object(linear, "linear", F.linear))
        if ways.planar_pixels:
            changes.enter_context(
                mock.patch.object(encoders.ImageEncoder, "_embed", lambda image, pixels: image.vit.patch_embed(pixels))
            )
        if ways.dropout:
            for part in (*model.text.modules(), *model.fusion.modules()):
                last = (
                    part.proj
                    if isinstance(part, SelfAttention | CrossAttention)
                    else part.fc2
                    if isinstance(part, FeedForward)
                    else None
                )
                if last is not None:
                    changes.callback(last.register_forward_hook(lambda _, given, out: F.dropout(out, DROPOUT)).remove)
            changes.callback(
                model.text.norm.register_forward_hook(lambda _, given, out: F.dropout(out, DROPOUT)).remove
            )
        yield


def written_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: PackedLayout | None = None,
    k_layout: PackedLayout | None = None,
    *,
    dropout: bool = False,
) -> Tensor:
    """`syncmask_fast.attention.attention` as papers write it. dropout: of the weights, where texts take part and gradients are wanted."""
    queries = (q if q_layout is None else q_layout.pad(q)).transpose(1, 2)
    keys, values = (x if k_layout is None else k_layout.pad(x) for x in (k, v))
    scores = queries @ keys.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    if k_layout is not None:
        scores = scores.masked_fill(~k_layout.valid[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    if dropout and torch.is_grad_enabled() and not (q_layout is None and k_layout is None):
        weights = F.dropout(weights, DROPOUT)
    out = (weights.to(v.dtype) @ values.transpose(1, 2)).transpose(1, 2)
    return out if q_layout is None else q_layout.unpad(out)


class Padded(PackedLayout):
    """Sequences in slots of one length, so that padding is computed like tokens; attention leaves padded keys out.

    lengths: int32 [N], tokens of each; longest: rows of a slot.
    """

    gaps = True

    def __init__(self, lengths: Tensor, longest: int) -> None:
        slots = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device) * longest
        super().__init__(slots, longest, len(lengths) * longest)
        self.lengths = lengths

    def __add__(self, other: PackedLayout) -> Padded:
        return Padded(torch.cat([self.lengths, other.lengths]), self.max_seqlen)

    def pad(self, packed: Tensor) -> Tensor:
        return packed.unflatten(0, (len(self), self.max_seqlen))

    def unpad(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1)


def pack_padded(source: PackedLayout, sequences: Tensor, images: Tensor, n_images: int) -> FusionBatch:
    """`group_by_image` for padded sequences."""
    longest, order = source.max_seqlen, torch.argsort(images, stable=True)
    place = torch.arange(longest, device=images.device)
    slots = torch.arange(len(order), device=images.device)
    queries = images.bincount(minlength=n_images).tolist()
    return FusionBatch(
        (sequences[order, None] * longest + place).flatten(),
        Padded(source.lengths[sequences[order]], longest),
        PackedLayout.of([n * longest for n in queries], images.device),
        torch.empty_like(order).index_copy_(0, order, slots * longest),
    )


def baseline_losses(
    model: SyncMaskModel,
    teacher: SyncMaskModel,
    batch: Batch,
    queue: losses.Queue,
    config: TrainConfig,
    ways: Ways,
    *,
    sync_share: float,
    alpha: float,
    seed: int,
    negatives: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Losses, Features]:
    """All losses of a batch, as `syncmask_fast.objective.pretraining.pretraining_losses` has them.

    negatives: what `sample_hard_negatives` gives for images, then for texts, instead of a draw of its own.
    """
    b = len(batch.lengths)
    layout, token_ids = PackedLayout.of_batch(batch), batch.token_ids
    if ways.padding:
        token_ids = layout.pad(token_ids).flatten()  # 0 is [PAD]
        layout = Padded(layout.lengths, layout.max_seqlen)
        batch = dataclasses.replace(batch, token_ids=token_ids)
    generator = torch.Generator(batch.pixels.device).manual_seed(seed)

    with torch.no_grad():
        teacher_images, teacher_texts = teacher.image(batch.pixels), teacher.text(token_ids, layout)
        momentum = Features(teacher.project_images(teacher_images), teacher.project_texts(teacher_texts, layout))
        masks = random_masks(layout, model.image.patches, config.mask, generator)
        masks = blend(
            teacher_masks(teacher, teacher_images, teacher_texts, layout, config, ways), masks, sync_share, generator
        )
    patches = count(config.mask.patch_ratio, model.image.patches)

    images, masked_images = model.image(batch.pixels, masks.patch_mask).chunk(2)
    hidden = layout.unpad(masks.token_mask)
    source = layout + layout
    texts = model.text(torch.cat([token_ids, token_ids.masked_fill(hidden, model.mask_id)]), source)
    image_feats, text_feats = model.project_images(images), model.project_texts(texts, layout)
    itc = losses.itc_loss(image_feats, text_feats, *momentum, batch.product_ids, queue, model.temperature, alpha)
    presence = itc.new_tensor(torch.nan)
    if config.loss.presence:
        presence = _presence_loss(model, config, batch, images, layout, seed)

    if negatives is None:
        negatives = drawn_negatives(image_feats.detach(), text_feats.detach(), batch.product_ids, config, ways, seed)
    negative_text, has_text, negative_image, has_image = negatives
    each = torch.arange(b, device=images.device)
    pack_up = pack_padded if ways.padding else group_by_image
    if ways.project_again:
        other = torch.stack([images[i] for i in negative_image.tolist()]) if ways.loops else images[negative_image]
        passes = [(each, images), (torch.cat([negative_text, each]), torch.cat([images, other])), (each + b, images)]
        packs = [
            (pack_up(source, of, torch.arange(len(of), device=of.device), len(of)), looked_at)
            for of, looked_at in passes
        ]
        fused = [(model.fusion(texts[pack.source_rows], pack, looked_at), pack) for pack, looked_at in packs]
        cls = torch.cat([x[pack.cls_rows] for x, pack in fused[:2]])
        masked, starts = fused[2][0], fused[2][1].cls_rows
    else:
        of, looks_at = torch.cat([each, negative_text, each, each + b]), torch.cat([each, each, negative_image, each])
        pack = pack_up(source, of, looks_at, b)
        masked = model.fusion(texts[pack.source_rows], pack, images)
        cls, starts = masked[pack.cls_rows[: 3 * b]], pack.cls_rows[3 * b :]
    itm = losses.itm_loss(
        model.itm_head(cls),
        torch.arange(3 * b, device=cls.device) < b,
        torch.cat([torch.ones_like(has_text), has_text, has_image]).float(),
    )
    mlm = mlm_loss(model, masked, starts[layout.segment_ids] + layout.position_ids, token_ids, hidden, ways)

    chosen = masks.patch_mask.nonzero()[:, 1].view(b, patches)
    rebuilt = masked_images.gather(1, 1 + chosen[..., None].expand(-1, -1, masked_images.shape[2]))
    predicted = model.mim_head(rebuilt, texts[: layout.total], layout)
    mim = losses.mim_loss(predicted, _mim_target(config, batch, teacher_images, chosen))

    weight = config.loss
    total = weight.itc * itc + weight.itm * itm + weight.mlm * mlm + weight.mim * mim
    if weight.presence:
        total = total + weight.presence * presence
    return Losses(total, itc.detach(), itm.detach(), mlm.detach(), mim.detach(), presence.detach()), momentum


def mlm_loss(
    model: SyncMaskModel, fused: Tensor, rows: Tensor, token_ids: Tensor, hidden: Tensor, ways: Ways
) -> Tensor:
    """MLM of the masked texts' fused features, whose token t stands in row rows[t]; hidden: bool [T]."""
    words = model.text.word_embeddings.weight
    if ways.full_head:
        return F.cross_entropy(
            model.mlm_head(fused[rows], words).float(), token_ids.masked_fill(~hidden, -100), ignore_index=-100
        )
    at = hidden.nonzero()[:, 0]
    return losses.mlm_loss(model.mlm_head(fused[rows[at]], words), token_ids[at])


def teacher_masks(
    teacher: SyncMaskModel, images: Tensor, texts: Tensor, layout: PackedLayout, config: TrainConfig, ways: Ways
) -> Masks:
    """`masking.sync_masks`, with or without the layers that nobody reads and the map that nobody needs."""
    pack, mask = one_to_one(layout), config.mask
    for layer in teacher.fusion.layers[: mask.layer - 1]:
        texts = layer(texts, pack, images)
    last = teacher.fusion.layers[mask.layer - 1]
    texts = last.attention(texts, pack.text_layout)
    q, k, v = last.cross.project(texts, images)
    if ways.full_teacher:
        seen = encoders.attention(q, k, v, pack.image_layout).flatten(1)
        texts = last.feed_forward(last.cross.norm(texts + last.cross.proj(seen)))
        for layer in teacher.fusion.layers[mask.layer :]:
            texts = layer(texts, pack, images)
    q, k, v, words = layout.pad(q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), maskable(layout)
    if not ways.maps:
        needed = v if mask.token_score == "output" else None
        return Masks(
            *ops.sync_mask(
                q,
                k,
                words,
                v=needed,
                token_ratio=mask.token_ratio,
                patch_ratio=mask.patch_ratio,
                token_score=mask.token_score,
                patch_score=mask.patch_score,
            )
        )
    heads = q.shape[1]
    weights = ((q @ k.mT).float() * q.shape[-1] ** -0.5).softmax(-1).flatten(0, 1)
    token_score = (
        _token_score_of_head(weights, v.float().flatten(0, 1), mask.token_score).unflatten(0, (-1, heads)).mean(1)
    )
    patch_score = (
        _patch_score_of_head(weights, words.repeat_interleave(heads, 0), mask.patch_score)
        .unflatten(0, (-1, heads))
        .mean(1)
    )
    m = words.sum(1)
    n = (mask.token_ratio * m.double() + 0.5).floor().clamp(min=1).minimum(m)
    top = patch_score.topk(count(mask.patch_ratio, patch_score.shape[1]), 1).indices
    patches = torch.zeros_like(patch_score, dtype=torch.bool).scatter_(1, top, True)
    return Masks(_highest(token_score.masked_fill(~words, -torch.inf), n), patches, token_score, patch_score)


def drawn_negatives(
    images: Tensor, texts: Tensor, ids: Tensor, config: TrainConfig, ways: Ways, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each image a text, and for each text an image: `step.sample_hard_negatives` twice, or sample by sample. images, texts: unit vectors [B, E]."""
    margin = config.batch.margin if config.batching == "semi_hard" else -torch.inf
    draw = sample_by_sample if ways.loops else sample_hard_negatives
    return (
        *draw(images, texts, ids, margin, config.loss.temperature, seed),
        *draw(texts, images, ids, margin, config.loss.temperature, seed + 1),
    )


def sample_by_sample(
    anchors: Tensor, candidates: Tensor, ids: Tensor, margin: float, temperature: float, seed: int
) -> tuple[Tensor, Tensor]:
    """`step.sample_hard_negatives` as the parents draw: a loop with `multinomial` of the softmax and 1e-4, lest nothing be left to draw."""
    index, some = [], []
    for i, similarity in enumerate(anchors @ candidates.T):
        other = ids != ids[i]
        fit = other & (similarity < similarity[i] - margin)
        weight = ((similarity / temperature).softmax(0) + 1e-4) * (fit if fit.any() else other)
        some.append(bool(other.any()))
        index.append(torch.multinomial(weight, 1).item() if some[-1] else 0)
    return torch.tensor(index, device=ids.device), torch.tensor(some, device=ids.device)


def baseline_optimizer(model: nn.Module, config: OptimConfig, ways: Ways) -> Optimizer:
    """The trainer's optimiser, with AdamW as it comes where asked."""
    optimizer = make_optimizer(model, config)
    if ways.plain_adamw:
        groups = [
            {name: group[name] for name in ("params", "weight_decay")} for group in optimizer.parts[0].param_groups
        ]
        optimizer.parts[0] = torch.optim.AdamW(groups, lr=config.lr)
    return optimizer


def baseline_step(
    config: TrainConfig, state: TrainState, batch: Batch, ways: Ways, *, sync_share: float, alpha: float, seed: int
) -> Losses:
    """One optimiser step on a batch; `state.optimizer` is of `baseline_optimizer`."""
    device = batch.pixels.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(config, device) and not ways.float32)
    with autocast, parents_layers(state.model, ways):
        found, momentum = baseline_losses(
            state.model, state.teacher, batch, state.queue, config, ways, sync_share=sync_share, alpha=alpha, seed=seed
        )
    found.total.backward()
    state.queue.enqueue(*momentum, batch.product_ids, state.batches_done, config.batch_size)
    state.bank.update(batch.sample_ids, *momentum)
    state.batches_done += 1
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if ways.ema_loop:
        for ours, theirs in zip(state.teacher.parameters(), state.model.parameters(), strict=True):
            ours.data = ours.data * config.optim.ema_decay + theirs.data * (1 - config.optim.ema_decay)
    else:
        update_teacher(state.teacher, state.model, config.optim.ema_decay, state.step)
    return Losses(*(x.detach() for x in found))
