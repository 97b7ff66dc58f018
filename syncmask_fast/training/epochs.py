"""What a pretraining reads, epoch by epoch: the plan from the teacher's features, and the batches that follow it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.epoch_order import epoch_order, rank_share
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.splits import Split
from syncmask_fast.distributed.group import SINGLE_PROCESS, Group, NullLog, lockstep, shard_bounds
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.log import MetricsLog


def epoch_batches(
    config: TrainConfig,
    state: TrainState,
    loader: Loader,
    split: Split,
    product_ids: np.ndarray,
    log: MetricsLog | NullLog | None = None,
    group: Group = SINGLE_PROCESS,
) -> Iterator[Batch]:
    """Batches without end: each epoch by its plan, from where the state stands; the plan of the next epoch is made when one ends.

    `samples` and `product_ids` of the batches are places in the training split and product numbers from 0. Of each batch a rank loads its own rows.
    """
    device, size = state.model.device, config.batch_size
    place = np.zeros(len(split.index), np.int64)
    place[split.samples] = np.arange(len(split))
    position = np.zeros(len(split), np.int64)
    width = max(np.diff(shard_bounds(size, group.world_size)))

    def rows_of(batch: Batch) -> tuple[int, np.ndarray]:
        """The number of a batch in the epoch; the position and the text's length of each of its rows. On the host, which then need not wait."""
        at = position[place[batch.sample_ids_host]]
        return int(at[0]) // size, np.stack([at, np.array(batch.lengths)], 1)

    while True:
        order = state.order.numpy()
        position[order] = np.arange(len(order))
        mine, positions = rank_share(order, size, group.rank, group.world_size)
        done = int(np.searchsorted(positions, state.samples_done))
        for batch, rows in lockstep(
            loader.epoch(split.samples[mine], state.epoch, positions, done), rows_of, width, group
        ):
            positions_of_all, lengths = np.concatenate(rows).T
            state.samples_done = (int(positions_of_all[0]) // size + 1) * size
            if len(lengths) < 2:
                continue
            places = order[positions_of_all]
            samples, products = (
                torch.from_numpy(x).to(device, non_blocking=True) for x in (places, product_ids[places])
            )
            bounds = [0, *np.cumsum([len(x) for x in rows]).tolist()]
            part = BatchShard(group, bounds, lengths.tolist(), products, samples)
            yield dataclasses.replace(batch, sample_ids=samples[part.rows], product_ids=products[part.rows], shard=part)
        state.epoch, state.samples_done = state.epoch + 1, 0
        begin = time.perf_counter()
        state.order = torch.from_numpy(plan(config, state, product_ids, group))
        if log is not None:
            log.planned(state.epoch, time.perf_counter() - begin)


def plan(config: TrainConfig, state: TrainState, product_ids: np.ndarray, group: Group = SINGLE_PROCESS) -> np.ndarray:
    """The order of the state's epoch, from the features that the teacher gave in the epoch before; the same on all ranks."""
    known = bool(state.bank.filled.float().mean() > 0.5)
    return epoch_order(
        config.seed,
        state.epoch,
        product_ids,
        batch_size=config.batch_size,
        kind=config.batching,
        image_feats=state.bank.images if known else None,
        text_feats=state.bank.texts if known else None,
        margin=config.batch.margin,
        search_space=config.batch.search_space,
        group=group,
    )
