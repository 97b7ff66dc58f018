"""A `--data` folder as two sets of samples, for training and evaluation, without a common product."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from syncmask_fast.data.remote import fetch_if_remote
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.utils.errors import UserError


@dataclass(frozen=True)
class Split:
    """Some samples of an index."""

    index: ShardIndex
    """All samples of a folder."""
    samples: np.ndarray
    """int64 [n], the sample ids of the split."""

    def __len__(self) -> int:
        return len(self.samples)

    def tokens(self, tokenizer: Tokenizer, max_length: int) -> TokenCache:
        """Return the tokens of the whole index, so that sample ids index them. See `TokenCache.open`."""
        return TokenCache.open(self.index.folder, tokenizer, self.index.texts, max_length)


def open_splits(data: str | Path, holdout: float = 0.05) -> tuple[Split, Split]:
    """Open the training and the evaluation samples of a folder, or of an address (`syncmask_fast.data.remote`).

    With folders `train` and `eval` inside, these. Otherwise the folder's own shards, of which the fraction `holdout` of
    the products, the same in every run, is held out. errors: UserError if there are no shards.
    """
    folder = fetch_if_remote(data)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Give --data a folder of .tar shards, or one with train and eval inside."
        )
    if (folder / "train").is_dir() and (folder / "eval").is_dir():
        return _whole(ShardIndex.open(folder / "train")), _whole(ShardIndex.open(folder / "eval"))
    return _hold_out(_whole(ShardIndex.open(folder)), holdout, seed=0)


def open_evaluation(data: str | Path, holdout: float = 0.05) -> Split:
    """Open the evaluation samples only; with `holdout` 1, a folder without `train` and `eval` is one evaluation set."""
    folder = fetch_if_remote(data)
    if (folder / "eval").is_dir():
        return _whole(ShardIndex.open(folder / "eval"))
    return open_splits(folder, holdout)[1]


def split_validation(split: Split, fraction: float) -> tuple[Split, Split]:
    """Split off the fraction `fraction` of a training split's products, the same in every run, to choose a model by."""
    return _hold_out(split, fraction, seed=1)


def _whole(index: ShardIndex) -> Split:
    return Split(index, np.arange(len(index)))


def _hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Return the rest and the held-out samples: all those of a random fraction of the products."""
    product_ids = split.index.product_ids[split.samples]
    products = np.unique(product_ids)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(products)
    held_out = np.isin(product_ids, order[: round(fraction * len(products))])
    return Split(split.index, split.samples[~held_out]), Split(split.index, split.samples[held_out])
