"""Composed (text-guided) retrieval: a reference image and a change in words find a target image (FashionIQ's protocol).

Q triplets, N images that any of them or any gallery names, E embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.splits import Split
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.triplets import Triplets, open_triplets
from syncmask_fast.distributed.group import SINGLE_PROCESS
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import itc_loss, means
from syncmask_fast.objective.memory import Features, Queue
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.tasks.base import (
    BATCH_SIZE,
    FineTuneTask,
    evaluation_batches,
    open_tokens,
    rank_of_best,
    recall_at,
    text_features,
)
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.epochs import plan_epoch
from syncmask_fast.utils.errors import UserError

RECALLS = (10, 50)
METRIC = "composed/val-union/mean/R@10"  # selects the best fine-tuned model. FashionSAP: the sum over the classes


# Metrics -----------------------------------------------------------------------------------------------------------


class ClassQueries(NamedTuple):
    """The queries of one class and one gallery of it. Numbers are rows of the image features."""

    queries: Tensor
    """float32 [Q, E], unit vectors."""
    target: Tensor
    """int64 [Q]: the image that each query must find."""
    gallery: Tensor
    """int64 [G]: the images that are searched, the references among them."""


def composed_recall(
    classes: Mapping[str, ClassQueries], images: Tensor, product: Tensor, tile: int = 1024
) -> dict[str, float]:
    """Return R@10 and R@50 in percent of each class and their mean over the classes, each with its chance level.

    images: float32 [N, E], unit vectors; product: int64 [N], the product of each. Every image of the target's product
    is right, and the best-ranked one counts; in FashionIQ each image is its own product. The reference stays in the
    gallery, as is usual there. Ties are misses (`base.rank_of_best`).
    """
    results: dict[str, float] = {}
    for name, (queries, target, gallery) in classes.items():
        ranks, num_right = [], []
        for begin in range(0, len(queries), tile):
            right = product[gallery] == product[target[begin : begin + tile], None]
            ranks.append(rank_of_best(queries[begin : begin + tile] @ images[gallery].T, right))
            num_right += right.sum(1).tolist()
        for k in RECALLS:
            chance = [_random_recall(len(gallery), n, k) for n in num_right]
            results[f"{name}/R@{k}"] = recall_at(k, torch.cat(ranks))
            results[f"{name}/R@{k}/chance"] = 100 * sum(chance) / len(chance)
        results[f"{name}/images"], results[f"{name}/queries"] = float(len(gallery)), float(len(queries))
    for k in RECALLS:
        for ending in ("", "/chance"):
            results[f"mean/R@{k}{ending}"] = sum(results[f"{name}/R@{k}{ending}"] for name in classes) / len(classes)
    return results


def _random_recall(size: int, right: int, k: int) -> float:
    """Return the chance that a random order of `size` images has one of `right` among its first k."""
    return 1 - comb(size - right, k) / comb(size, k) if k <= size else float(right > 0)


# Evaluation --------------------------------------------------------------------------------------------------------


def evaluate_composed(model: SyncMaskModel, split: Split, tokens: TokenCache, triplets: Triplets) -> dict[str, float]:
    """Return composed retrieval in percent, in both galleries: "original", and "val-union" of candidates and targets.

    A model that was not fine-tuned for it queries with the sum of its image and text features.
    errors: UserError if an image of a triplet or gallery cannot be read.
    """
    names = sorted(set(triplets.classes))
    rows = {name: np.flatnonzero(np.array(triplets.classes) == name) for name in names}
    galleries = {"original": triplets.galleries} if triplets.galleries else {}
    galleries["val-union"] = {
        name: np.union1d(triplets.candidate[rows[name]], triplets.target[rows[name]]) for name in names
    }
    # Every image is encoded once, whatever galleries and queries it is in.
    sample_ids = np.unique(np.concatenate([triplets.candidate, triplets.target, *triplets.galleries.values()]))
    images, queries = _encode(model, split, tokens, triplets, sample_ids)

    def rows_of(wanted: np.ndarray) -> Tensor:
        return torch.from_numpy(np.searchsorted(sample_ids, wanted)).to(model.device)

    product = torch.from_numpy(split.index.product_ids[sample_ids]).to(model.device)
    results = {}
    for protocol, gallery in galleries.items():
        classes = {
            name: ClassQueries(queries[rows[name]], rows_of(triplets.target[rows[name]]), rows_of(gallery[name]))
            for name in names
        }
        found = composed_recall(classes, images, product)
        results |= {f"composed/{protocol}/{name}": value for name, value in found.items()}
    return results


@torch.inference_mode()
def _encode(
    model: SyncMaskModel, split: Split, tokens: TokenCache, triplets: Triplets, sample_ids: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Return unit vectors of the images [N, E] and of the triplets' queries [Q, E]. sample_ids: int64 [N], sorted."""
    captions = TokenCache.open(split.index.folder, model.tokenizer, triplets.captions, model.config.text.max_length)
    images = torch.empty(len(sample_ids), model.config.embed_dim, device=model.device)
    queries = torch.empty(len(triplets), model.config.embed_dim, device=model.device)
    by_candidate = np.argsort(triplets.candidate, kind="stable")
    count = 0
    for batch in evaluation_batches(model, split, tokens, sample_ids):
        features = model.image(batch.pixels)
        images[np.searchsorted(sample_ids, batch.sample_ids_host)] = model.project_images(features)
        count += len(batch)
        # A reference's patches are needed by its queries only, so they are encoded while the batch is here.
        rows = by_candidate[np.isin(triplets.candidate[by_candidate], batch.sample_ids_host)]
        for begin in range(0, len(rows), BATCH_SIZE):
            some = rows[begin : begin + BATCH_SIZE]
            [(texts, layout)] = text_features(model, captions, some)
            references = features[np.searchsorted(batch.sample_ids_host, triplets.candidate[some])]
            queries[some] = model.project_queries(references, texts, layout)
    if count < len(sample_ids):
        raise UserError(
            f"{split.index.folder} has unreadable images in its triplets or galleries. Repair or remove them."
        )
    return images, queries


# Fine-tuning -------------------------------------------------------------------------------------------------------


@dataclass
class TripletBatch(Batch):
    """B triplets: `pixels` of the references, texts of the changes, products of the targets."""

    target_pixels: Tensor
    """float32 [B, 3, S, S]."""


def finetune_composed(config: TrainConfig, split: Split, validation: Split) -> tuple[FineTuneTask, TrainConfig]:
    """Return the fine-tuning of composed retrieval.

    Triplets whose target is a validation product validate. Of the rest, those whose reference is one are left out.
    errors: UserError without triplets to validate on.
    """
    whole = Split(split.index, np.union1d(split.samples, validation.samples))
    triplets = open_triplets(whole)
    held_reference, held_target = (np.isin(x, validation.samples) for x in (triplets.candidate, triplets.target))
    train_triplets, val_triplets = triplets.subset(~held_reference & ~held_target), triplets.subset(held_target)
    if not len(val_triplets):
        raise UserError(f"--validation {config.task.validation} leaves no triplet to validate on. Give a larger share.")

    def batches(config: TrainConfig, state: TrainState, loader: Loader) -> Iterator[TripletBatch]:
        return epoch_triplets(config, state, loader, train_triplets)

    def validate(model: SyncMaskModel) -> dict[str, float]:
        return evaluate_composed(model, whole, open_tokens(model, whole), val_triplets)

    product_ids = split.index.product_ids[train_triplets.target]
    return FineTuneTask(product_ids, 2, batches, composed_losses, validate, METRIC), config


def composed_losses(
    model: SyncMaskModel,
    teacher: SyncMaskModel,
    batch: TripletBatch,
    queue: Queue,
    config: TrainConfig,
    schedule: Schedule,
) -> tuple[dict[str, Tensor], Features]:
    """Return the contrastive loss of queries and targets in the batch; images of one product are no negatives."""
    layout = PackedLayout.of_batch(batch)
    # Both images of a triplet in one pass.
    references, targets = model.image(torch.cat([batch.pixels, batch.target_pixels])).chunk(2)
    queries = model.project_queries(references, model.text(batch.token_ids, layout), layout)
    student = Features(model.project_images(targets), queries)
    features = Features(*(x.detach() for x in student))
    shard = batch.shard
    # No queue and no soft targets: the candidates are the batch, and alpha is 0.
    loss = itc_loss(student, features, shard.product_ids, queue, model.temperature, 0.0, shard.rows)
    return {"total": means({"itc": loss}, shard)["itc"]}, features


def epoch_triplets(
    config: TrainConfig, state: TrainState, loader: Loader, triplets: Triplets
) -> Iterator[TripletBatch]:
    """Yield batches without end, as `epoch_batches` does; triplets with a damaged image are left out."""
    product_ids = np.unique(loader.index.product_ids[triplets.target], return_inverse=True)[1]
    captions = TokenCache.open(loader.index.folder, state.model.tokenizer, triplets.captions, config.text.max_length)
    while True:
        # 1. Images in pairs: reference and target of each triplet, in the epoch's order.
        order = state.order.numpy()
        pairs = np.stack([triplets.candidate[order], triplets.target[order]], axis=1).ravel()
        for batch in loader.epoch(pairs, state.epoch, start=2 * state.samples_done):
            positions = batch.epoch_positions.cpu().numpy()
            state.samples_done = (int(positions[-1]) // (2 * config.batch_size) + 1) * config.batch_size
            # 2. Triplets with both images: that of a damaged image has one position.
            found, count = np.unique(positions // 2, return_counts=True)
            complete = found[count == 2]
            if len(complete) < 2:
                continue
            keep = torch.from_numpy(np.isin(positions // 2, complete)).to(batch.pixels.device)
            references, targets = batch.pixels[keep].view(len(complete), 2, *batch.pixels.shape[1:]).unbind(1)
            # 3. Their captions, products and numbers.
            rows = order[complete]
            token_ids, cu_seqlens = captions.pack(rows)
            lengths, sample_ids_host = np.diff(cu_seqlens).tolist(), triplets.candidate[rows]
            arrays = token_ids, cu_seqlens, sample_ids_host, complete, rows, product_ids[rows]
            ids, cu, sample_ids, at, *items = (torch.from_numpy(x).to(batch.pixels.device) for x in arrays)
            shard = BatchShard.whole(lengths, *items)
            yield TripletBatch(references, ids, cu, lengths, sample_ids, sample_ids_host, at, shard, targets)
        state.epoch, state.samples_done = state.epoch + 1, 0
        state.order = plan_epoch(config, state, product_ids, SINGLE_PROCESS)
