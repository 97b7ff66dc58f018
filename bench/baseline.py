"""ALBEF's training step, written plainly: the baseline of the trainer's step.

It has the trainer's objectives and weights, and with the same masks and negatives the same losses
(`tests/test_baseline.py`). As in ALBEF (Li et al. 2021) and FashionSAP, texts are padded, and true pairs, negatives and
masked texts are three fusion passes, each of which projects its images' keys and values. The MLM head runs on every
token, the teacher runs all its layers, and negatives are drawn sample by sample. The trainer's own code computes what
these do not have: Muon, word presence and ITC with the queue and product positives.

Shape letters: B pairs, L tokens of the longest text, P patches, S = 1 + P, C width, E width of the ITC space, H heads,
D = C / H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncmask_fast.config import MaskConfig, OptimConfig, TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.model.encoders import CrossAttention, FeedForward, SelfAttention
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective import losses
from syncmask_fast.objective.losses import LossSum
from syncmask_fast.objective.masking import Masks, maskable, mix_masks, num_masked, random_masks, top_k_mask
from syncmask_fast.objective.memory import Features
from syncmask_fast.objective.presence import presence_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.optimizer import Optimizer, make_optimizer
from syncmask_fast.utils.device import autocast_dtype

Negatives = tuple[Tensor, Tensor]
"""The number of each pair's negative, int64 [B], and whether there is one, bool [B]."""


@dataclass(frozen=True)
class BaselineOptions:
    """Variants of the baseline."""

    bfloat16: bool = False
    """Products in the trainer's precision; otherwise float32."""
    sdpa: bool = False
    """PyTorch's fused attention; otherwise scores, softmax, and weights times values, each a tensor."""
    dropout: float = 0.1
    """BERT's dropout of attention weights (not with `sdpa`) and of each residual, in the student; ALBEF keeps it."""


BASELINES = {
    "albef": BaselineOptions(),
    "albef-bf16": BaselineOptions(bfloat16=True),
    "albef-bf16-sdpa": BaselineOptions(bfloat16=True, sdpa=True, dropout=0.0),
}


class Albef:
    """ALBEF's forward passes with the weights of a SyncMaskModel, on padded texts.

    A text's padding is masked as key, and computed like tokens otherwise. valid: bool [B, L], True for tokens.
    """

    def __init__(self, model: SyncMaskModel, options: BaselineOptions) -> None:
        self.model, self.sdpa = model, options.sdpa
        self.dropout_rate = options.dropout

    def image(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Return features [B, S, C], or [2 B, S, C] with a mask: the full images, then the masked ones."""
        encoder, vit = self.model.image, self.model.image.vit
        if patch_mask is None:
            patches = vit.patch_embed(pixels)
        else:
            copies = pixels
            if encoder.conv_stem:  # convolutions reach beyond a patch
                copies = pixels.masked_fill(encoder.patch_mask_to_pixels(patch_mask), 0)
            full, masked = vit.patch_embed(torch.cat([pixels, copies])).chunk(2)
            masked = torch.where(patch_mask[..., None], encoder.mask_token.to(masked.dtype), masked)
            patches = torch.cat([full, masked])
        x = torch.cat([vit.cls_token.expand(len(patches), -1, -1), patches], 1) + vit.pos_embed
        for block in vit.blocks:
            heads = block.attn.num_heads
            q, k, v = _linear(block.attn.qkv, block.norm1(x)).unflatten(-1, (3, heads, -1)).unbind(2)
            x = x + _linear(block.attn.proj, self.attention(q, k, v, dropout=False).flatten(2))
            x = x + _linear(block.mlp.fc2, F.gelu(_linear(block.mlp.fc1, block.norm2(x))))
        return vit.norm(x)

    def text(self, token_ids: Tensor, valid: Tensor) -> Tensor:
        """Return features [B, L, C] of token ids int64 [B, L]."""
        text = self.model.text
        positions = text.position_embeddings.weight[: token_ids.shape[1]]
        x = self.dropout(text.norm(text.word_embeddings(token_ids) + positions + text.token_type_embedding))
        for layer in text.layers:
            x = self.feed_forward(layer.feed_forward, self.self_attention(layer.attention, x, valid))
        return x

    def fuse(self, x: Tensor, valid: Tensor, images: Tensor) -> Tensor:
        """Return fused features [B, L, C] of text features [B, L, C], text n with image n of images [B, S, C]."""
        for layer in self.model.fusion.layers:
            x = self.self_attention(layer.attention, x, valid)
            x = self.feed_forward(layer.feed_forward, self.cross_attention(layer.cross, x, images))
        return x

    def masks(self, x: Tensor, valid: Tensor, images: Tensor, words: Tensor, config: MaskConfig) -> Masks:
        """Return sync masks from one fusion layer's whole attention map. All layers run, as in ALBEF."""
        for number, layer in enumerate(self.model.fusion.layers, 1):
            x = self.self_attention(layer.attention, x, valid)
            if number == config.layer:
                q, k, v = _project(layer.cross, x, images)
                scores = token_and_patch_scores(q, k, v, words, config)
            x = self.feed_forward(layer.feed_forward, self.cross_attention(layer.cross, x, images))
        token_score, patch_score = scores
        m = words.sum(1)
        tokens = (config.token_ratio * m.double() + 0.5).floor().clamp(min=1).minimum(m)
        top = patch_score.topk(num_masked(config.patch_ratio, patch_score.shape[1]), 1).indices
        patch_mask = torch.zeros_like(patch_score, dtype=torch.bool).scatter_(1, top, True)
        return Masks(top_k_mask(token_score, tokens), patch_mask, token_score, patch_score)

    def mlm_logits(self, x: Tensor) -> Tensor:
        """Return logits [..., vocabulary] of fused features [..., C]."""
        head = self.model.mlm_head
        x = head.norm(F.gelu(_linear(head.dense, x)))
        return F.linear(x, self.model.text.word_embeddings.weight, head.bias)

    def mim(self, patches: Tensor, texts: Tensor, valid: Tensor) -> Tensor:
        """Return the predicted targets of masked patches [B, n, C]."""
        head = self.model.mim_head
        x = self.cross_attention(head.text_attention, _linear(head.in_proj, patches), texts, valid)
        return _linear(head.out_proj, self.feed_forward(head.feed_forward, x))

    def project(self, images: Tensor, texts: Tensor) -> Features:
        """Return unit vectors [B, E] of image features [B, S, C] and text features [B, L, C]."""
        heads = (self.model.image_proj, images), (self.model.text_proj, texts)
        return Features(*(F.normalize(_linear(head, x[:, 0]).float(), dim=-1) for head, x in heads))

    def self_attention(self, layer: SelfAttention, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = _linear(layer.qkv, x).unflatten(-1, (3, layer.heads, -1)).unbind(2)
        return layer.norm(x + self.dropout(_linear(layer.proj, self.attention(q, k, v, valid).flatten(2))))

    def cross_attention(self, layer: CrossAttention, x: Tensor, keys: Tensor, valid: Tensor | None = None) -> Tensor:
        out = self.attention(*_project(layer, x, keys), valid).flatten(2)
        return layer.norm(x + self.dropout(_linear(layer.proj, out)))

    def feed_forward(self, layer: FeedForward, x: Tensor) -> Tensor:
        return layer.norm(x + self.dropout(_linear(layer.fc2, F.gelu(_linear(layer.fc1, x)))))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, dropout: bool = True) -> Tensor:
        """Return softmax attention [B, L, H, D] of q [B, L, H, D] to the valid ones of k, v [B, S, H, D]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        valid = None if valid is None else valid[:, None, None]
        if self.sdpa:
            dtype = q.dtype
            if not q.is_cuda:  # PyTorch's CPU attention is nine times as slow in bfloat16
                q, k, v = q.float(), k.float(), v.float()
            with torch.autocast(q.device.type, enabled=False):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=valid).transpose(1, 2).to(dtype)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        weights = scores.softmax(-1)
        weights = self.dropout(weights) if dropout else weights  # ALBEF's image encoder has none
        return (weights.to(v.dtype) @ v).transpose(1, 2)

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_rate, training=torch.is_grad_enabled())  # not in the teacher


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)  # PyTorch's, not the layer's own


def _project(layer: CrossAttention, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [B, L, H, D] and k, v [B, S, H, D]."""
    k, v = _linear(layer.kv, keys).unflatten(-1, (2, layer.heads, -1)).unbind(2)
    return _linear(layer.q, x).unflatten(-1, (layer.heads, -1)), k, v


def token_and_patch_scores(q: Tensor, k: Tensor, v: Tensor, words: Tensor, config: MaskConfig) -> tuple[Tensor, Tensor]:
    """Return scores [B, L] and [B, P] of the rules of `ops.sync_mask` from the whole map. words: bool [B, L]."""
    weights = torch.einsum("blhd,bshd->bhls", q, k).float().mul(q.shape[-1] ** -0.5).softmax(-1)
    patches, peak = weights[..., 1:], weights[..., 1:].amax(-1)
    rows, m = words[:, None, :, None], words.sum(1)[:, None, None]
    token_rules = {
        "peak": lambda: peak,
        "mass": lambda: 1 - weights[..., 0],
        "cls": lambda: weights[..., 0],
        "output": lambda: (weights @ v.float().transpose(1, 2)).norm(dim=-1),
    }
    patch_rules = {
        "mean": lambda: (patches * rows).sum(2) / m,
        "cls": lambda: patches[:, :, 0],
        "weighted": lambda: (patches * peak[..., None] * rows).sum(2) / m,
        "max": lambda: patches.masked_fill(~rows, -torch.inf).amax(2),
    }
    token_score = token_rules[config.token_score]().mean(1).masked_fill(~words, -torch.inf)
    return token_score, patch_rules[config.patch_score]().mean(1)


def sample_negatives(anchors: Tensor, candidates: Tensor, product_ids: Tensor, config: TrainConfig) -> Negatives:
    """Draw each pair's hard negative as ALBEF does, by a loop. anchors, candidates: unit vectors [B, E]."""
    margin = config.batch.margin if config.batching == "semi_hard" else -torch.inf
    index, found = [], []
    for i, similarity in enumerate(anchors @ candidates.T):
        other = product_ids != product_ids[i]
        fits = other & (similarity < similarity[i] - margin)
        # ALBEF adds 1e-4: the softmax may underflow to nothing to draw from.
        weight = ((similarity / config.loss.temperature).softmax(0) + 1e-4) * (fits if fits.any() else other)
        found.append(bool(other.any()))
        index.append(torch.multinomial(weight, 1).item() if found[-1] else 0)
    return torch.tensor(index, device=product_ids.device), torch.tensor(found, device=product_ids.device)


def baseline_losses(
    state: TrainState,
    batch: Batch,
    config: TrainConfig,
    schedule: Schedule,
    options: BaselineOptions,
    negatives: tuple[Negatives, Negatives] | None = None,
) -> tuple[dict[str, Tensor], Features]:
    """Return all losses of a batch, as `objective.pretraining.pretraining_losses` does.

    negatives: a text for each image and an image for each text; None draws them.
    """
    student, teacher = Albef(state.model, options), Albef(state.teacher, options)
    pixels, layout = batch.pixels, PackedLayout.of_batch(batch)
    token_ids, valid, words = layout.pad(batch.token_ids), layout.valid, maskable(layout)
    b, device = len(layout), pixels.device
    generator = torch.Generator(device).manual_seed(schedule.seed)

    # 1. Teacher: features, and masks from its attention map.
    with torch.no_grad():
        teacher_images, teacher_texts = teacher.image(pixels), teacher.text(token_ids, valid)
        momentum = teacher.project(teacher_images, teacher_texts)
        masks = random_masks(layout, state.model.image.patches, config.mask, generator)
        sync = teacher.masks(teacher_texts, valid, teacher_images, words, config.mask)
        masks = mix_masks(sync, masks, schedule.sync_probability, generator)

    # 2. Student: images and texts, full and masked.
    images, masked_images = student.image(pixels, masks.patch_mask).chunk(2)
    texts = student.text(token_ids, valid)
    masked_texts = student.text(token_ids.masked_fill(masks.token_mask, state.model.mask_id), valid)

    # 3. ITC, and word presence as the trainer has it.
    feats, rows = student.project(images, texts), slice(0, b)
    ids, temperature = batch.shard.product_ids, state.model.temperature
    sums = {"itc": losses.itc_loss(feats, momentum, ids, state.queue, temperature, schedule.alpha, rows)}
    if config.loss.presence:
        sums |= presence_losses(state.model, batch, images, layout, config, schedule.seed)

    # 4. ITM: true pairs in one pass, both kinds of negatives in another.
    if negatives is None:
        with torch.no_grad():
            negatives = sample_negatives(*feats, ids, config), sample_negatives(*reversed(feats), ids, config)
    (negative_text, has_text), (negative_image, has_image) = negatives
    true_pairs = student.fuse(texts, valid, images)
    text_rows = torch.cat([negative_text, torch.arange(b, device=device)])
    other_images = torch.stack([images[i] for i in negative_image.tolist()])
    wrong_pairs = student.fuse(texts[text_rows], valid[text_rows], torch.cat([images, other_images]))
    logits = _linear(state.model.itm_head, torch.cat([true_pairs, wrong_pairs])[:, 0]).float()
    matched = torch.arange(3 * b, device=device) < b
    weight = torch.cat([torch.ones_like(has_text), has_text, has_image]).float()
    itm = F.cross_entropy(logits, matched.long(), reduction="none")
    sums["itm"] = LossSum((itm * weight).sum(), weight.sum())

    # 5. MLM: a third pass, and the head on every token.
    logits = student.mlm_logits(student.fuse(masked_texts, valid, images)).float()
    labels = token_ids.masked_fill(~masks.token_mask, -100)  # ignored by cross_entropy
    sums["mlm"] = LossSum(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), 1)

    # 6. MIM: masked patches against the full text.
    masked_index = masks.patch_mask.nonzero()[:, 1].view(b, -1)
    at = 1 + masked_index[..., None].expand(-1, -1, images.shape[2])
    predicted = student.mim(masked_images.gather(1, at), texts, valid)
    if config.loss.mim_target == "pixels":
        target = losses.normalized_patches(pixels, config.image.patch, masked_index)
    else:
        target = teacher_images.gather(1, at)
        target = F.layer_norm(target, target.shape[-1:])
    sums["mim"] = LossSum(F.mse_loss(predicted.float(), target.float()), 1)

    means = losses.means(sums, batch.shard)
    total = sum(config.loss.weight(name) * loss for name, loss in means.items())
    return {"total": total} | {name: loss.detach() for name, loss in means.items()}, momentum


def baseline_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Return the trainer's optimizer with AdamW's default implementation, which is not fused."""
    optimizer = make_optimizer(model, config)
    groups = [
        {name: group[name] for name in ("params", "weight_decay")} for group in optimizer.optimizers[0].param_groups
    ]
    optimizer.optimizers[0] = torch.optim.AdamW(groups, lr=config.lr)
    return optimizer


def baseline_step(
    state: TrainState, batch: Batch, config: TrainConfig, schedule: Schedule, options: BaselineOptions
) -> dict[str, Tensor]:
    """Take one optimizer step on a batch; `state.optimizer` is from `baseline_optimizer`. Return the losses."""
    device = batch.pixels.device
    dtype = autocast_dtype(config.precision, device, config.text.width) if options.bfloat16 else torch.float32
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found, features = baseline_losses(state, batch, config, schedule, options)
    found["total"].backward()
    state.queue.enqueue(features, batch.shard.product_ids, state.batches_done, config.batch_size)
    state.bank.update(batch.shard.items, features)
    state.batches_done += 1
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    # The EMA parameter by parameter, with the decay from the start.
    decay = config.optim.ema_decay
    for ours, theirs in zip(state.teacher.parameters(), state.model.parameters(), strict=True):
        ours.data = ours.data * decay + theirs.data * (1 - decay)
    for ours, theirs in zip(state.teacher.buffers(), state.model.buffers(), strict=True):
        ours.copy_(theirs)
    return {name: loss.detach() for name, loss in found.items()}
