"""Model FLOPs of a step, counted from shapes, and the peak that a device can do: their ratio is the model FLOPs utilisation (MFU).

What counts is the products that the objectives need, two FLOPs for each multiply-add, the backward pass as twice the forward pass:

    student 3 x forward, teacher 1 x forward
    a linear layer          2 * rows * inputs * outputs
    attention               4 * queries * keys * width       (q k^T, and the weights times v)
    image encoder           B images, and B masked copies and the collages for the student; S = 1 + P rows each, copies of which only the visible
                            patches are encoded 1 + V. Pixels have no gradient, so that a single projection of patches costs 2 x forward, and
                            masked copies share it
    text encoder            T tokens, and for the student T of the masked copies and T of the presence loss's mixed texts
    fusion encoder          4 T tokens, as many as the true, the masked and both kinds of negative texts have on average; keys and values once
                            for each image and layer; the teacher up to the layer whose attention is read
    heads                   MLM at masked words, MIM at masked patches
    ITC                     B x (B + queue) similarities on both sides, and the teacher's

Rows of padding, what is computed twice (checkpointing), norms, softmax, the optimiser and the teacher's move are not counted: time spent on
them lowers the MFU. `tests/test_flops.py` holds the formula against PyTorch's count of a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.masking import count
from syncmask_fast.objective.pretraining import collage_rows

# Dense bfloat16 FLOP/s of tensor cores from the makers' data sheets, by a part of the device's name; SXM parts where there are several.
_BFLOAT16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def step_flops(model: SyncMaskModel, lengths: Sequence[int], *, fuse: bool) -> float:
    """Model FLOPs of one step on texts of these lengths. fuse: with ITM, MLM and MIM (`step.pretraining_losses`)."""
    config, loss, mask = model.config, model.config.loss, model.config.mask
    b, tokens, words = len(lengths), sum(lengths), sum(count(mask.token_ratio, n - 2) for n in lengths)
    squares = sum(n * n for n in lengths)
    width, s, image_width, embed = config.text.width, 1 + model.image.patches, model.image.width, config.embed_dim
    masking = fuse and config.masking != "none"
    stem, image = stem_flops(model), block_flops(model, s)
    chosen = count(mask.patch_ratio, model.image.patches)
    seen = s - chosen if loss.mim_input == "visible" else s  # rows of a masked copy
    text = config.text.layers * (24 * width**2 * tokens + 4 * squares * width)
    self_attention = 8 * width**2 * tokens + 4 * squares * width
    keys = 4 * b * s * image_width * width
    fusion_rest = (
        4 * width**2 * tokens + 4 * tokens * s * width + 16 * width**2 * tokens
    )  # q, projection, attention to patches, feed-forward
    similarities = 4 * b * (b + loss.queue) * embed

    student = b * image + text + masking * (b * block_flops(model, seen) + text) + similarities
    collages = len(collage_rows(loss.collages, b))
    if loss.presence:
        compared = 1 + min(loss.presence_negatives, b - 1)
        student += text + self_attention + 2 * width**2 * tokens + keys + compared * 2 * tokens * s * width
        student += collages * (image + 4 * s * image_width * width + 2 * tokens / b * s * width)
    stems = b + collages if not model.image.conv_stem else b * (1 + masking) + collages
    student += stems * stem * (1 if model.image.conv_stem else 2 / 3)
    if fuse:
        passes = 3 + masking
        student += config.text.fusion_layers * (passes * (self_attention + fusion_rest) + keys)
    if masking:
        student += words * (2 * width**2 + 2 * width * config.text.vocab_size)
        head = 2 * image_width * width + 4 * width**2 + 16 * width**2 + 2 * width * model.mim_head.out_proj.out_features
        student += b * chosen * (head + 4 * tokens / b * width) + 4 * width**2 * tokens
        if loss.mim_input == "visible":  # masked patches look at the others
            student += b * chosen * (4 * width**2 + 4 * seen * width) + b * seen * 4 * image_width * width
    teacher = 0.0
    if fuse or loss.alpha or loss.queue:
        teacher = b * (stem + image) + text + similarities
    if masking and config.masking == "sync":
        teacher += (
            (mask.layer - 1) * (self_attention + fusion_rest + keys) + self_attention + 2 * width**2 * tokens + keys
        )
        teacher += 2 * tokens * s * width  # the operator's q k^T
    return 3 * student + teacher


def stem_flops(model: SyncMaskModel) -> float:
    """FLOPs of the image encoder's forward pass on one image, from pixels to patches."""
    stem, side = 0.0, model.config.image.size
    for conv in model.image.vit.patch_embed.modules():
        if isinstance(conv, nn.Conv2d):
            side //= conv.stride[0]
            stem += 2 * side**2 * conv.weight.numel()
    return stem


def block_flops(model: SyncMaskModel, rows: int) -> float:
    """FLOPs of the image encoder's blocks, forward, on one image of that many rows."""
    width, blocks = model.image.width, model.image.vit.blocks
    mlps = sum(block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel() for block in blocks)
    return 2 * rows * mlps + len(blocks) * (8 * rows * width**2 + 4 * rows * rows * width)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the device can do in `dtype`: from the table of GPUs in bfloat16, otherwise the best of a few square products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [
            peak
            for part, peak in _BFLOAT16_PEAKS.items()
            if part in name.replace("-", " ").split() or f" {part}" in f" {name}"
        ]
        if known:
            return known[0]
    n = 8192 if device.type == "cuda" else 1024
    a, b, out = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(3))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best
