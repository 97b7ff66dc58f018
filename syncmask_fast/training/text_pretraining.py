"""A start for text encoders that no BERT gives one: MLM on the texts alone, as BERT has done before ALBEF takes it over (our choice)."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.tokenizer import TokenCache
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import mlm_loss
from syncmask_fast.objective.masking import random_masks
from syncmask_fast.training.optimizer import lr_multiplier, make_optimizer

TOKEN_RATIO = 0.4  # learns sooner than 0.15 does (Wettig et al. 2023)
RATE = 2.0  # of the run's learning rates


def pretrain_text(
    model: SyncMaskModel, tokens: TokenCache, samples: np.ndarray, config: TrainConfig, bfloat16: bool = False
) -> None:
    """Trains text encoder, fusion encoder without its cross-attention, and MLM head for `config.text.pretrain_steps` steps; prints what came of it.

    samples:  int64 [N], the training samples, of whose texts each is read once in an epoch. The same seed and number of threads give the same bits.
    bfloat16: whether products are in bfloat16.
    """
    begin, device = time.perf_counter(), model.device
    texts = tokens.unique(samples)
    size = min(config.batch_size, len(texts))
    rng = np.random.default_rng([config.seed, len(texts)])
    generator = torch.Generator(device).manual_seed(config.seed)
    mask = dataclasses.replace(config.mask, token_ratio=TOKEN_RATIO)
    steps, left, losses = config.text.pretrain_steps, np.empty(0, np.int64), []
    counts = np.bincount(tokens.pack(texts)[0], minlength=config.text.vocab_size)
    with torch.no_grad():  # nothing is learnt sooner than how frequent words are
        model.mlm_head.bias.copy_(torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())))
    optimizer = make_optimizer(model, config.optim)
    for step in range(steps):
        if len(left) < size:
            left = np.concatenate([left, rng.permutation(texts)])
        batch, left = left[:size], left[size:]
        ids, starts = tokens.pack(batch)
        layout = PackedLayout.of(np.diff(starts).tolist(), device)
        token_ids = torch.from_numpy(ids).to(device)
        hidden = layout.unpad(random_masks(layout, 0, mask, generator).token_mask)
        at = hidden.nonzero()[:, 0]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            read = model.text(token_ids.masked_fill(hidden, model.mask_id), layout)
            read = model.fusion.forward_text_only(read, layout)
            loss = mlm_loss(model.mlm_head(read[at], model.text.word_embeddings.weight), token_ids[at])
        loss.backward()
        finite = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip).isfinite()
        optimizer.set_lr_multiplier(RATE * lr_multiplier(config.optim, step, steps))
        optimizer.step(finite)
        optimizer.zero_grad()
        losses.append(loss.detach())
    first, last = (torch.stack(part).mean().item() for part in (losses[:20], losses[-20:]))
    seconds = time.perf_counter() - begin
    print(
        f"text alone: MLM from {first:.2f} to {last:.2f} nats on {len(texts):,} texts, {steps} steps in {seconds:.0f} s",
        flush=True,
    )
