"""Small things that several tests need: a small configuration, a tokenizer, a batch, a drawn dataset."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from syncmask_fast.config import PRESETS, TrainConfig
from syncmask_fast.data.augment import AugmentConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.data.tokenizer import train_tokenizer
from syncmask_fast.distributed.gradients import GradientReducer
from syncmask_fast.distributed.group import SINGLE_PROCESS
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.memory import Features, Queue, make_teacher
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.sources.lookbook import draw_lookbook
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.step import StepResult, train_step

WORDS = [
    "a",
    "red",
    "navy",
    "green",
    "dress",
    "coat",
    "skirt",
    "bag",
    "with",
    "star",
    "moon",
    "zip",
    "pocket",
    "and",
    "the",
    "of",
    "cotton",
    "wool",
]

PAIRS, SEED = 6, 1234  # of `small_batch` and of `losses_of`
SPEED = {
    "pairs_per_s",
    "mfu",
    "peak_gib",
    "data_wait_share",
    "plan_s",
}  # of a row of metrics.jsonl: what two runs of the same settings do not share


def small_config(**changes) -> TrainConfig:
    """A model of a few ten thousand parameters: 48 px, 4 x 4 patches."""
    base = PRESETS["tiny"][1]
    vocabulary = small_tokenizer().get_vocab_size()
    config = dataclasses.replace(
        base,
        embed_dim=16,
        batch_size=6,
        image=dataclasses.replace(base.image, size=48, patch=12, width=32, depth=2, heads=2, stem="patch"),
        text=dataclasses.replace(
            base.text, vocab_size=vocabulary, width=32, heads=2, layers=1, fusion_layers=2, max_length=24
        ),
        loss=dataclasses.replace(base.loss, queue=20, presence=0.0, collages=0.0),
        augment=AugmentConfig(),
        optim=dataclasses.replace(base.optim, muon_lr=None),
    )
    return dataclasses.replace(config, **changes)


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, 120)


def small_batch(config: TrainConfig, seed: int = 0, pairs: int = PAIRS) -> Batch:
    """A batch of random pixels and words; pairs 0 and 1 are of one product."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 15, (pairs,), generator=generator).tolist()
    size = config.image.size
    ids = torch.randint(5, config.text.vocab_size, (sum(lengths),), generator=generator)
    products = torch.arange(pairs).clamp(min=1) - 1
    places = torch.arange(pairs)
    return Batch(
        torch.randn(pairs, 3, size, size, generator=generator),
        ids,
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
        lengths,
        places,
        np.arange(pairs),
        places,
        BatchShard.whole(lengths, places, products),
    )


def small_model(config: TrainConfig, seed: int = 0) -> SyncMaskModel:
    """Return a model whose biases, norms and tokens are random too, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = SyncMaskModel(config, small_tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def small_queue(config: TrainConfig) -> Queue:
    """Return a queue with seven items; the other places are empty."""
    queue = Queue.empty(config.loss.queue, config.embed_dim, torch.device("cpu"))
    features = F.normalize(torch.randn(2, 7, config.embed_dim, generator=torch.Generator().manual_seed(9)), dim=-1)
    queue.enqueue(Features(*features), torch.tensor([0, 5, 6, 2, 7, 8, 9]), 0, 7)
    return queue


def losses_of(
    config: TrainConfig,
    model: SyncMaskModel,
    batch: Batch,
    *,
    seed: int = SEED,
    share: float = 0.5,
    fuse: bool = True,
    teacher: SyncMaskModel | None = None,
) -> tuple[dict[str, Tensor], Features]:
    """Return the losses of a batch, by default with a teacher equal to the model."""
    schedule = Schedule(with_fusion=fuse, sync_probability=share, alpha=0.3, seed=seed)
    return pretraining_losses(model, teacher or make_teacher(model), batch, small_queue(config), config, schedule)


def take_step(config: TrainConfig, state: TrainState, batches: Iterator[Batch], steps: int = 100) -> StepResult:
    """A pretraining step of one process."""
    reducer = GradientReducer(state.model.parameters(), SINGLE_PROCESS)
    return train_step(state, batches, config, pretraining_losses, reducer, steps, batches_per_epoch=1)


def small_lookbook(folders: pytest.TempPathFactory) -> Path:
    """A lookbook drawn once for all tests of the session: 5 batches of 16 to train on, 105 products to evaluate on."""
    folder = folders.getbasetemp() / "lookbook"
    draw_lookbook(folder, products=22, eval_products=105, size=96, workers=1)
    return folder
