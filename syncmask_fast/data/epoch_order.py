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
    """The samples of an epoch in order, int64 [N]; batches are its consecutive runs of `batch_size`.

    product_ids: int64 [N]. image_feats, text_feats: unit vectors float32 [N, E] of the last epoch; without them, and for kind "random",
    the order is a random permutation.
    "semi_hard" walks from sample to similar sample, never twice to one product within a batch, and less similar than the true pair by
    `margin`; "hard" is GRIT-VLP's walk to the most similar. The walk sees the samples in a random order (so that a search space is a random
    part of them), starts at random, and its whole batches are shuffled afterwards, as in GRIT-VLP; a short last batch stays last.
    group: each walk, which is one search space, is made by one rank, and the results are the same on all; all ranks must call this.
    """
    n = len(product_ids)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)))
    shuffled = rng.permutation(n)
    if kind == "random" or image_feats is None or text_feats is None:
        return shuffled
    order = torch.zeros(n, dtype=torch.int64)
    run = search_space or max(1, n)
    for number, begin in enumerate(range(0, n, run)):
        if number % group.world_size != group.rank:
            continue
        samples = shuffled[begin : begin + run]  # the features of one walk at a time: they are a copy
        at = torch.from_numpy(samples).to(image_feats.device)
        ids = product_ids[samples] if kind == "semi_hard" else np.arange(len(samples))
        walk = ops.group_semi_hard(
            image_feats[at],
            text_feats[at],
            torch.from_numpy(ids).to(image_feats.device),
            batch_size=batch_size,
            margin=margin if kind == "semi_hard" else -torch.inf,
        )
        order[begin : begin + run] = torch.from_numpy(samples)[walk.cpu()]
    order = group.all_reduce_host(order).numpy()
    whole = n // batch_size * batch_size
    batches = order[:whole].reshape(-1, batch_size)
    return np.concatenate([batches[rng.permutation(len(batches))].reshape(-1), order[whole:]])


def rank_share(order: np.ndarray, batch_size: int, rank: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """The part of one rank: samples and their positions in the epoch, both int64 [n].

    Of every batch, that is `batch_size` consecutive samples, rank r takes the r-th run (`shard_bounds`: where the ranks do not divide the batch, some
    take one more); a short last batch is left out.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must lie within 0 and ranks - 1: got rank {rank} of {ranks}")
    begin, end = shard_bounds(batch_size, ranks)[rank : rank + 2]
    whole = len(order) // batch_size * batch_size
    positions = np.arange(whole).reshape(-1, batch_size)[:, begin:end].reshape(-1)
    return order[positions], positions
