"""What the tasks share: evaluation batches, text features, ranks, and the record of a fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.decode.backends import make_decoder
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.splits import Split
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.distributed.group import SINGLE_PROCESS
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.epochs import epoch_batches
from syncmask_fast.training.log import NullLog
from syncmask_fast.training.step import Objective

BATCH_SIZE = 128


@dataclass(frozen=True)
class FineTuneTask:
    """What a fine-tuning changes in the training loop. An item is an image with its text, or a triplet."""

    product_ids: np.ndarray
    """int64 [N]: the product of each item."""
    images_per_item: int
    batches: Callable[[TrainConfig, TrainState, Loader], Iterator[Batch]]
    """Endless batches, as `epoch_batches` yields them."""
    losses: Objective
    """Replaces `pretraining_losses`, with the same parameters."""
    validate: Callable[[SyncMaskModel], dict[str, float]]
    """Return the metrics of a model on the validation products."""
    metric: str
    """The metric that selects the best model."""


def image_items(split: Split, losses: Objective, validate: Callable, metric: str) -> FineTuneTask:
    """Return a fine-tuning whose items are the images of a split with their texts."""
    product_ids = split.index.product_ids[split.samples]
    product_index = np.unique(product_ids, return_inverse=True)[1]

    def batches(config: TrainConfig, state: TrainState, loader: Loader) -> Iterator[Batch]:
        return epoch_batches(config, state, loader, split, product_index, NullLog(), SINGLE_PROCESS)

    return FineTuneTask(product_ids, 1, batches, losses, validate, metric)


def open_tokens(model: SyncMaskModel, split: Split) -> TokenCache:
    """Return the tokens of a split's texts by the model's tokenizer."""
    return split.tokens(model.tokenizer, model.config.text.max_length)


def evaluation_batches(
    model: SyncMaskModel, split: Split, tokens: TokenCache, sample_ids: np.ndarray
) -> Iterator[Batch]:
    """Yield batches of whole images, without augmentation, in the given order. Unreadable images are left out."""
    config = model.config
    decoder = make_decoder(
        config.decoder,
        batch_size=min(BATCH_SIZE, max(len(sample_ids), 1)),  # decoders reserve memory for a batch
        size=config.image.size,
        device=model.device,
        threads=config.decode_threads,
        jitter=False,
    )
    with Loader(split.index, tokens, decoder) as loader:
        yield from loader.epoch(sample_ids, 0)


def text_features(model: SyncMaskModel, tokens: TokenCache, rows: np.ndarray) -> Iterator[tuple[Tensor, PackedLayout]]:
    """Yield packed features [T, C] of the texts at int64 [n] of the token cache, in groups, with their layouts."""
    for begin in range(0, len(rows), BATCH_SIZE):
        token_ids, cu_seqlens = tokens.pack(rows[begin : begin + BATCH_SIZE])
        layout = PackedLayout.of(np.diff(cu_seqlens).tolist(), model.device)
        yield model.text(torch.from_numpy(token_ids).to(model.device), layout), layout


def rank_of_best(score: Tensor, right: Tensor) -> Tensor:
    """Return the rank, int64 [Q] from 1, of each query's best right candidate. score: [Q, n]; right: bool [Q, n].

    Every wrong candidate that does not score lower counts: ties are misses, and constant or NaN features score nothing.
    """
    best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + (~(score < best) & ~right).sum(1)


def recall_at(k: int, rank: Tensor) -> float:
    """Return the share of ranks (from 1) that are k or better, in percent."""
    return 100 * (rank <= k).float().mean().item()
