"""The order of an epoch: a pure function of the seed, the epoch and last epoch's features."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from syncmask_fast import ops
from syncmask_fast.distributed.group import SINGLE_PROCESS, Group, shard_bounds


def epoch_order(
    seed: int,
    epoch: int,
    product_ids: np.ndarray,
    *,
    batch_size: int,
    kind: Literal["semi_hard", "hard", "random"] = "random",
    image_feats: Tensor | None = None,
    text_feats: Tensor | None = None,
    margin: float = 0.0,
    search_space: int | None = None,
    group: Group = SINGLE_PROCESS,
) -> np.ndarray:
    """Return the items of an epoch in order, int64 [N]; batches are its consecutive runs of `batch_size`.

    product_ids: int64 [N].
    image_feats, text_feats: unit vectors float32 [N, E] of the last epoch; without them, as for kind "random", the
    order is a random permutation.
    "semi_hard" walks to similar items, never twice to one product within a batch, and less similar than the true pair
    by `margin`. "hard" walks to the most similar one (GRIT-VLP).
    group: each rank computes some of the walks, one in each search space. All ranks must call this and get the same.
    """
    n = len(product_ids)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)))
    shuffled = rng.permutation(n)
    if kind == "random" or image_feats is None or text_feats is None:
        return shuffled
    order = torch.zeros(n, dtype=torch.int64)
    run = search_space or max(1, n)
    # A walk sees its items in a random order and starts at random, so that a search space is a random subset.
    for number, begin in enumerate(range(0, n, run)):
        if number % group.world_size != group.rank:
            continue
        items = shuffled[begin : begin + run]
        rows = torch.from_numpy(items).to(image_feats.device)
        ids = product_ids[items] if kind == "semi_hard" else np.arange(len(items))
        walk = ops.group_semi_hard(
            image_feats[rows],  # a copy, of one walk at a time
            text_feats[rows],
            torch.from_numpy(ids).to(image_feats.device),
            batch_size=batch_size,
            margin=margin if kind == "semi_hard" else -torch.inf,
        )
        order[begin : begin + run] = torch.from_numpy(items)[walk.cpu()]
    order = group.all_reduce_host(order).numpy()
    # Shuffle whole batches, as in GRIT-VLP; a short last batch stays last.
    end = n // batch_size * batch_size
    batches = order[:end].reshape(-1, batch_size)
    return np.concatenate([batches[rng.permutation(len(batches))].reshape(-1), order[end:]])


def rank_share(order: np.ndarray, batch_size: int, rank: int, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one rank's items of an epoch and their positions in it, both int64 [n].

    Rank r gets the r-th run of every batch (`shard_bounds`: some ranks get one more if they do not divide the batch). A
    short last batch is left out.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be within 0 .. {world_size - 1}, not {rank}")
    begin, end = shard_bounds(batch_size, world_size)[rank : rank + 2]
    total = len(order) // batch_size * batch_size
    positions = np.arange(total).reshape(-1, batch_size)[:, begin:end].reshape(-1)
    return order[positions], positions
