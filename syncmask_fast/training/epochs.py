"""The batches of a pretraining, epoch by epoch: plan the order from the teacher's features, then load it."""

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
from syncmask_fast.distributed.group import Group, shard_bounds
from syncmask_fast.distributed.shard import BatchShard, lockstep
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.log import MetricsLog, NullLog


def epoch_batches(
    config: TrainConfig,
    state: TrainState,
    loader: Loader,
    split: Split,
    product_ids: np.ndarray,
    log: MetricsLog | NullLog,
    group: Group,
) -> Iterator[Batch]:
    """Yield batches without end, from where the state stands; plan the next epoch when one ends.

    product_ids: int64 [N], of each sample of the training split. The items of `batch.shard` are places in the split.
    Each rank loads its own rows of a batch. Advances `state.samples_done`, `state.epoch` and `state.order`.
    """
    device, size = state.model.device, config.batch_size
    item_of_sample = np.zeros(len(split.index), np.int64)
    item_of_sample[split.samples] = np.arange(len(split))
    position_of_item = np.zeros(len(split), np.int64)
    # The largest share of a rank: messages of all ranks have one size.
    width = max(np.diff(shard_bounds(size, group.world_size)))

    def describe(batch: Batch) -> tuple[int, np.ndarray]:
        """Return the batch's number in the epoch, and position and text length of each row, from host data only."""
        positions = position_of_item[item_of_sample[batch.sample_ids_host]]
        return int(positions[0]) // size, np.stack([positions, np.array(batch.lengths)], 1)

    while True:
        order = state.order.numpy()
        position_of_item[order] = np.arange(len(order))
        mine, positions = rank_share(order, size, group.rank, group.world_size)
        # After a resume, with any number of ranks, skip what is done.
        done = int(np.searchsorted(positions, state.samples_done))
        shares = loader.epoch(split.samples[mine], state.epoch, positions, done)
        for batch, rows in lockstep(shares, describe, width, group):
            all_positions, lengths = np.concatenate(rows).T
            # Counted by position, so batches that damaged images have shortened do not shift it.
            state.samples_done = (int(all_positions[0]) // size + 1) * size
            # Damaged images left one pair, which has no negative.
            if len(lengths) < 2:
                continue
            items = order[all_positions]
            on_device = (torch.from_numpy(x).to(device, non_blocking=True) for x in (items, product_ids[items]))
            # Every rank knows all rows: negatives and draws are those of the global batch.
            bounds = [0, *np.cumsum([len(x) for x in rows]).tolist()]
            yield dataclasses.replace(batch, shard=BatchShard(group, bounds, lengths.tolist(), *on_device))
        state.epoch, state.samples_done = state.epoch + 1, 0
        begin = time.perf_counter()
        state.order = plan_epoch(config, state, product_ids, group)
        log.log_plan_time(state.epoch, time.perf_counter() - begin)


def plan_epoch(config: TrainConfig, state: TrainState, product_ids: np.ndarray, group: Group) -> torch.Tensor:
    """Return the order of the state's epoch, int64 [N], from the features of the epoch before; equal on all ranks."""
    # In the first epoch there are no features yet, so its order is random.
    known = bool(state.bank.filled.float().mean() > 0.5)
    order = epoch_order(
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
    return torch.from_numpy(order)
