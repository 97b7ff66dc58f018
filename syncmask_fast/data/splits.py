"""A `--data` folder as two sets of samples: training and evaluation, never with a product in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from syncmask_fast.data.remote import fetch_if_remote
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.utils.errors import UserError


@dataclass(frozen=True)
class Split:
    """Some samples of an index. samples: int64 [n], sample numbers."""

    index: ShardIndex
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)


def open_splits(data: str | Path, holdout: float = 0.05) -> tuple[Split, Split]:
    """The training and the evaluation samples of a dataset: a folder, or the address of one (`syncmask_fast.data.remote`).

    With folders `train` and `eval` inside, these; otherwise the folder's own shards, of which the share `holdout` of the products, the same in every
    run, is held out. Raises `UserError` where there are no shards.
    """
    folder = fetch_if_remote(data)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: --data takes a folder of .tar shards, or one with train and eval inside."
        )
    if (folder / "train").is_dir() and (folder / "eval").is_dir():
        return _whole(ShardIndex.open(folder / "train")), _whole(ShardIndex.open(folder / "eval"))
    index = ShardIndex.open(folder)
    products = np.unique(index.product_ids)
    held = np.random.Generator(np.random.Philox(key=0)).permutation(products)[: int(round(holdout * len(products)))]
    out = np.isin(index.product_ids, held)
    return Split(index, np.flatnonzero(~out)), Split(index, np.flatnonzero(out))


def open_evaluation(data: str | Path, holdout: float = 0.05) -> Split:
    """The evaluation samples alone; a folder of shards without `train` and `eval` inside is one evaluation set, whole, if `holdout` is 1."""
    folder = fetch_if_remote(data)
    if (folder / "eval").is_dir():
        return _whole(ShardIndex.open(folder / "eval"))
    return open_splits(folder, holdout)[1]


def split_validation(split: Split, share: float) -> tuple[Split, Split]:
    """A training split in two: what is left to train on, and the share `share` of its products, the same in every run, to choose a model by."""
    products = np.unique(split.index.product_ids[split.samples])
    held = np.random.Generator(np.random.Philox(key=1)).permutation(products)[: round(share * len(products))]
    out = np.isin(split.index.product_ids[split.samples], held)
    return Split(split.index, split.samples[~out]), Split(split.index, split.samples[out])


def _whole(index: ShardIndex) -> Split:
    return Split(index, np.arange(len(index)))
