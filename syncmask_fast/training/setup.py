"""Build what a run trains: its data, its tokenizer, its model and its state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.decode.backends import MAX_THREADS, make_decoder
from syncmask_fast.data.loader import Loader
from syncmask_fast.data.splits import Split, open_splits
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.tokenizer import load_tokenizer, train_tokenizer
from syncmask_fast.distributed.batch_norm import convert_sync_batchnorm
from syncmask_fast.distributed.group import Group, shard_bounds
from syncmask_fast.model.attention import attention_backend
from syncmask_fast.model.pretrained import load_initial_weights
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.training.checkpoint import TrainState, find_resume_path, resume, tokenizer_fingerprint
from syncmask_fast.training.text_pretraining import pretrain_text
from syncmask_fast.utils.device import autocast_dtype, cpu_cores

LOOKBOOK = Path("data/lookbook")


def open_data(config: TrainConfig, group: Group) -> tuple[TrainConfig, Split, Split]:
    """Open --data, or draw the lookbook; return the config with `data`, the training and the evaluation split."""
    # The first process draws, fetches and indexes; the others find the cached result.
    with group.main_process_first():
        data = config.data or str(draw_default_lookbook(config, group))
        train_split, eval_split = open_splits(data, config.eval.holdout_fraction)
        for warning in (*train_split.index.warnings, *eval_split.index.warnings):
            group.print(f"skipped: {warning}")
    return dataclasses.replace(config, data=data), train_split, eval_split


def draw_default_lookbook(config: TrainConfig, group: Group) -> Path:
    """Draw the lookbook at the preset's image size unless it is complete; return its folder."""
    from syncmask_fast.sources.lookbook.source import draw_in_child

    folder = LOOKBOOK.with_name(f"{LOOKBOOK.name}-{config.image.size}px")
    # Other processes of the machine wait in `main_process_first`.
    if group.local_rank == 0:
        draw_in_child(folder, size=config.image.size)
    return folder


def tokenizer_source(config: TrainConfig) -> str | None:
    """Return the name or folder that gives the tokenizer; None if one is trained on the texts."""
    # Token ids must be those that the weights were trained with.
    if config.task.model or config.text.name:
        return str(config.task.model or config.text.name)
    return config.weights if config.weights and Path(config.weights).is_dir() else None


def needs_text_pretraining(config: TrainConfig, resume_path: Path | None) -> bool:
    """Return whether the text encoder starts from random weights and `--text.pretrain-steps` asks for MLM on texts."""
    initialized = tokenizer_source(config) or config.weights or resume_path
    return bool(config.text.pretrain_steps) and not initialized


def open_texts(config: TrainConfig, split: Split, group: Group) -> tuple[TrainConfig, Tokenizer, TokenCache]:
    """Load or train the tokenizer and tokenize the training texts; return the config with the true vocabulary size."""
    # A tokenizer that is trained on the texts may find fewer tokens than asked for.
    source = tokenizer_source(config)
    tokenizer = load_tokenizer(source) if source else train_tokenizer(split.index.texts, config.text.vocab_size)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.get_vocab_size())
    with group.main_process_first():
        tokens = split.tokens(tokenizer, text.max_length)
    return dataclasses.replace(config, text=text), tokenizer, tokens


def build_state(
    config: TrainConfig,
    tokenizer: Tokenizer,
    tokens: TokenCache,
    split: Split,
    items: int,
    device: torch.device,
    group: Group,
) -> TrainState:
    """Return the state of a run: from its latest checkpoint, or of step 0 with initial weights.

    items: number of training items, which are samples or triplets.
    """
    resume_path = group.broadcast_object(find_resume_path(config, config.out))
    # Every rank draws the same weights; the broadcast below is for what rank 0 alone has trained.
    torch.manual_seed(config.seed)
    model = SyncMaskModel(config, tokenizer)
    if resume_path is None:
        for report in load_initial_weights(model):
            group.print(report)
    model.to(device)
    if needs_text_pretraining(config, resume_path) and group.is_main:
        pretrain_text(model, tokens, split.samples, config)
    group.broadcast_parameters([*model.parameters(), *model.buffers()])
    provenance = {"samples": items, "data": split.index.fingerprint(), "tokenizer": tokenizer_fingerprint(tokenizer)}
    state = TrainState.create(model, config, provenance)
    convert_sync_batchnorm(model, group)
    if resume_path is not None:
        group.print(f"resuming from {resume(resume_path, state, group)}: step {state.step}")
    return state


def configure_compute(config: TrainConfig, state: TrainState) -> torch.dtype:
    """Compile blocks, turn on gradient checkpointing, time the attention backends; return the dtype of products."""
    model, device = state.model, state.model.device
    dtype = autocast_dtype(config.precision, device, config.text.width)
    # Time the backends now, not in the first step, and keep the choice.
    attention_backend(device, dtype)
    for encoder in (model.image, model.text, model.fusion):
        encoder.grad_checkpointing = config.grad_checkpointing
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        for part in (model, state.teacher):
            # Blocks, not the whole model: they repeat, and masked batches change shapes only between them.
            for block in (*part.image.vit.blocks, *part.text.layers, *part.fusion.layers):
                block.compile(dynamic=True)
    return dtype


def make_loader(
    config: TrainConfig, split: Split, tokens: TokenCache, device: torch.device, group: Group, images: int
) -> Loader:
    """Return the loader of this rank's rows. images: images of a training item."""
    # Each rank decodes its own rows only.
    rows = np.diff(shard_bounds(config.batch_size, group.world_size))[group.rank]
    decoder = make_decoder(
        config.decoder,
        batch_size=int(rows) * images,
        size=config.image.size,
        device=device,
        threads=config.decode_threads or min(MAX_THREADS, max(1, cpu_cores() // group.local_world_size)),
        jitter=config.augment.changes_colors,
    )
    return Loader(split.index, tokens, decoder, config.augment, config.seed, drop_last=True)
