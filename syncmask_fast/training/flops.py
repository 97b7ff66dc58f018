"""Model FLOPs of a step, computed from shapes, and the peak of a device: their ratio is the MFU.

Counted are the matrix products that the objectives need: two FLOPs for each multiply-add, the backward pass as twice
the forward pass.

    student 3 x forward, teacher 1 x forward
    a linear layer          2 * rows * inputs * outputs
    attention               4 * queries * keys * width       (q k^T, and the weights times v)
    image encoder           B images; for the student also B masked copies and the collages. S = 1 + P rows each, 1 + V
                            where only visible patches are encoded. Pixels have no gradient, so a single patch
                            projection costs 2 x forward, and masked copies share it
    text encoder            T tokens; for the student also T of the masked and T of the presence loss's mixed texts
    fusion encoder          4 T tokens: true and masked texts, and both kinds of negatives, which have T on average;
                            keys and values once for each image and layer; the teacher up to the masking layer
    heads                   MLM at masked tokens, MIM at masked patches
    ITC                     B x (B + queue) similarities on both sides, and the teacher's

Not counted: padding, recomputation (gradient checkpointing), norms, softmax, optimizer and EMA. Time spent on them
lowers the MFU. `tests/test_flops.py` compares the formula with PyTorch's count of a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.masking import num_masked
from syncmask_fast.objective.presence import collage_rows

# Dense bfloat16 FLOP/s of tensor cores from the makers' data sheets, by a part of the device's name; SXM where there
# are several versions.
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


def step_flops(model: SyncMaskModel, lengths: Sequence[int], with_fusion: bool) -> float:
    """Return the model FLOPs of one step on texts of these lengths. with_fusion: with ITM, MLM and MIM."""
    config, loss, mask = model.config, model.config.loss, model.config.mask
    b, tokens, squares = len(lengths), sum(lengths), sum(n * n for n in lengths)
    masked_tokens = sum(num_masked(mask.token_ratio, n - 2) for n in lengths)
    masked_patches = num_masked(mask.patch_ratio, model.image.patches)
    width, s, image_width = config.text.width, 1 + model.image.patches, model.image.width
    masking = with_fusion and config.masking != "none"

    # One forward pass of each piece.
    stem, image = stem_flops(model), block_flops(model, s)
    text = config.text.layers * (24 * width**2 * tokens + 4 * squares * width)
    self_attention = 8 * width**2 * tokens + 4 * squares * width
    keys = 4 * b * s * image_width * width
    # Query and output projection, attention to patches, feed-forward.
    fusion_rest = 4 * width**2 * tokens + 4 * tokens * s * width + 16 * width**2 * tokens
    similarities = 4 * b * (b + loss.queue) * config.embed_dim

    # Student: full and masked images and texts, ITC.
    encoded = s - masked_patches if loss.mim_input == "visible" else s  # rows of a masked image
    student = b * image + text + masking * (b * block_flops(model, encoded) + text) + similarities
    collages = len(collage_rows(loss.collages, b)) if loss.presence else 0
    if loss.presence:
        compared = 1 + min(loss.presence_negatives, b - 1)
        student += text + self_attention + 2 * width**2 * tokens + keys + compared * 2 * tokens * s * width
        student += collages * (image + 4 * s * image_width * width + 2 * tokens / b * s * width)
    # The convolutional stem sees masked pixels, so masked images pass it again.
    stems = b * (1 + masking) + collages if model.image.conv_stem else b + collages
    student += stems * stem * (1 if model.image.conv_stem else 2 / 3)

    # Student: fusion encoder and heads.
    if with_fusion:
        student += config.text.fusion_layers * ((3 + masking) * (self_attention + fusion_rest) + keys)
    if masking:
        student += masked_tokens * (2 * width**2 + 2 * width * config.text.vocab_size)
        target = model.mim_head.out_proj.out_features
        head = 2 * image_width * width + 4 * width**2 + 16 * width**2 + 2 * width * target
        student += b * masked_patches * (head + 4 * tokens / b * width) + 4 * width**2 * tokens
        if loss.mim_input == "visible":  # masked patches attend to the visible ones
            student += b * masked_patches * (4 * width**2 + 4 * encoded * width) + b * encoded * 4 * image_width * width

    # Teacher: features, and q k^T of the masking layer.
    teacher = 0.0
    if with_fusion or loss.alpha or loss.queue:
        teacher = b * (stem + image) + text + similarities
    if masking and config.masking == "sync":
        teacher += (mask.layer - 1) * (self_attention + fusion_rest + keys)
        teacher += self_attention + 2 * width**2 * tokens + keys + 2 * tokens * s * width
    return 3 * student + teacher


def stem_flops(model: SyncMaskModel) -> float:
    """Return the FLOPs of one image's forward pass from pixels to patches."""
    stem, side = 0.0, model.config.image.size
    for conv in model.image.vit.patch_embed.modules():
        if isinstance(conv, nn.Conv2d):
            side //= conv.stride[0]
            stem += 2 * side**2 * conv.weight.numel()
    return stem


def block_flops(model: SyncMaskModel, rows: int) -> float:
    """Return the FLOPs of the image encoder's blocks, forward, on one image of that many rows."""
    width, blocks = model.image.width, model.image.vit.blocks
    mlps = sum(block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel() for block in blocks)
    return 2 * rows * mlps + len(blocks) * (8 * rows * width**2 + 4 * rows * rows * width)


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s of a device: from the table in bfloat16 on GPUs, else measured on square products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _BFLOAT16_PEAKS.items():
            if part in name.replace("-", " ").split() or f" {part}" in f" {name}":
                return peak
    # Not in the table: time products that are large enough to reach the peak.
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
