"""MLM on the texts alone, before the training, for text encoders that no BERT initializes (our choice)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import mlm_loss
from syncmask_fast.objective.masking import random_masks
from syncmask_fast.training.optimizer import lr_multiplier, make_optimizer
from syncmask_fast.utils.device import autocast_dtype

# Learns faster than 0.15 (Wettig et al. 2023).
TOKEN_RATIO = 0.4
# Relative to the run's learning rates.
LR_MULTIPLIER = 2.0


def pretrain_text(model: SyncMaskModel, tokens: TokenCache, samples: np.ndarray, config: TrainConfig) -> None:
    """Train text encoder, fusion encoder without cross-attention, and MLM head for `--text.pretrain-steps` steps.

    samples: int64 [N], the training samples. Each distinct text is read once an epoch. The result depends only on the
    seed and the number of threads.
    """
    begin, device, steps = time.perf_counter(), model.device, config.text.pretrain_steps
    texts = tokens.unique(samples)
    batches = _batches(texts, min(config.batch_size, len(texts)), config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    mask = dataclasses.replace(config.mask, token_ratio=TOKEN_RATIO)
    dtype = autocast_dtype(config.precision, device, config.text.width)
    optimizer = make_optimizer(model, config.optim)

    # Start from token frequencies, the first thing that the head would learn.
    counts = np.bincount(tokens.pack(texts)[0], minlength=config.text.vocab_size)
    with torch.no_grad():
        model.mlm_head.bias.copy_(torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())))

    losses = []
    for step in range(steps):
        ids, starts = tokens.pack(next(batches))
        layout = PackedLayout.of(np.diff(starts).tolist(), device)
        token_ids = torch.from_numpy(ids).to(device)
        # No images: the cross-attention is left out, and its weights get no gradient.
        masked = layout.unpad(random_masks(layout, 0, mask, generator).token_mask)
        at = masked.nonzero()[:, 0]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features = model.text(token_ids.masked_fill(masked, model.mask_id), layout)
            features = model.fusion.forward_text_only(features, layout)
            total, count = mlm_loss(model.mlm_head(features[at], model.text.word_embeddings.weight), token_ids[at])
            loss = total / max(count, 1)
        loss.backward()
        finite = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip).isfinite()
        optimizer.set_lr_multiplier(LR_MULTIPLIER * lr_multiplier(config.optim, step, steps))
        optimizer.step(finite)
        optimizer.zero_grad()
        losses.append(loss.detach())
    # Means of twenty steps: single batches differ more than training improves them.
    first, last = (torch.stack(part).mean().item() for part in (losses[:20], losses[-20:]))
    print(
        f"MLM on {len(texts):,} texts: {first:.2f} to {last:.2f} nats in {steps} steps, "
        f"{time.perf_counter() - begin:.0f} s",
        flush=True,
    )


def _batches(texts: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of `size` texts without end; what an epoch leaves over starts the next one's first batch."""
    rng = np.random.default_rng([seed, len(texts)])
    left = np.empty(0, np.int64)
    while True:
        if len(left) < size:
            left = np.concatenate([left, rng.permutation(texts)])
        yield left[:size]
        left = left[size:]
