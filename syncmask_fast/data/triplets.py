"""Triplets for composed retrieval: a reference picture, what is to change, and the target. They lie beside the shards of a split.

triplets.json:  [{"class": name, "candidate": key, "target": key, "captions": [text, ...]}, ...], keys being those of the shards' samples.
galleries.json: {class: [key, ...]}, the pictures of each class's original gallery.
This is FashionIQ's content in the layout that `pack fashioniq` writes; the lookbook has the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncmask_fast.data.splits import Split
from syncmask_fast.utils.errors import UserError

TRIPLETS, GALLERIES = "triplets.json", "galleries.json"


@dataclass(frozen=True)
class Triplets:
    """Q triplets of one split; pictures are sample numbers of its index."""

    classes: list[str]
    """[Q]."""
    candidate: np.ndarray
    """int64 [Q]: the reference picture."""
    target: np.ndarray
    """int64 [Q]."""
    captions: list[str]
    """[Q]: both captions, joined by "and" (FashionSAP, which puts a prompt before them)."""
    galleries: dict[str, np.ndarray]
    """The original gallery of each class, int64 [G]; empty where the folder has none."""

    def __len__(self) -> int:
        return len(self.classes)

    def subset(self, rows: np.ndarray) -> Triplets:
        """Some of the triplets (row numbers, or bool [Q]), without the original galleries, which belong to all of them."""
        rows = np.arange(len(self))[rows]
        return Triplets(
            [self.classes[i] for i in rows],
            self.candidate[rows],
            self.target[rows],
            [self.captions[i] for i in rows],
            {},
        )


def open_triplets(split: Split) -> Triplets:
    """The triplets beside the shards of a split, as far as both pictures are in it; the galleries where the split is the whole folder.

    errors: UserError where there are none, or they do not fit the shards.
    """
    index, path = split.index, split.index.folder / TRIPLETS
    if not path.is_file():
        raise UserError(
            f"{path} is missing: composed retrieval needs the triplets that `pack fashioniq` and `pack lookbook` write."
        )
    number = {index.key(i): i for i in range(len(index))}
    try:
        found = _load(path)
        classes = [str(item["class"]) for item in found]
        captions = [" and ".join(item["captions"]) for item in found]
        "".join(classes + captions).encode()
        pictures = [[number[item[end]] for item in found] for end in ("candidate", "target")]
        listed = _load(index.folder / GALLERIES) if (index.folder / GALLERIES).is_file() else {}
        galleries = {name: np.array([number[key] for key in keys], np.int64) for name, keys in listed.items()}
    except KeyError as error:
        raise UserError(
            f"{path} does not fit the shards beside it ({error} is missing): pack the data again."
        ) from None
    except UnicodeEncodeError:
        raise UserError(f"{path} has a text that is not valid Unicode: pack the data again.") from None
    except (TypeError, AttributeError):
        raise UserError(
            f"{path} is not a list of class, candidate, target and captions: pack the data again."
        ) from None
    triplets = Triplets(classes, *(np.array(x, np.int64) for x in pictures), captions, galleries)
    if len(split) < len(index):
        triplets = triplets.subset(np.isin(triplets.candidate, split.samples) & np.isin(triplets.target, split.samples))
    if not len(triplets):
        raise UserError(f"{path} has no triplets of pictures that are in use: choose other data.")
    return triplets


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): pack the data again.") from None
