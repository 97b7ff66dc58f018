"""Triplets for composed retrieval, next to a split's shards: a reference image, a text that changes it, the target.

triplets.json:  [{"class": name, "candidate": key, "target": key, "captions": [text, ...]}, ...]; keys of samples.
galleries.json: {class: [key, ...]}, the images of each class's original gallery.
This is FashionIQ's content as `pack fashioniq` writes it; `pack lookbook` writes the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncmask_fast.data.splits import Split
from syncmask_fast.utils.errors import UserError, one_line

TRIPLETS, GALLERIES = "triplets.json", "galleries.json"


@dataclass(frozen=True)
class Triplets:
    """Q triplets of one split; images are sample ids of its index."""

    classes: list[str]
    """[Q] names."""
    candidate: np.ndarray
    """int64 [Q], the reference images."""
    target: np.ndarray
    """int64 [Q], the target images."""
    captions: list[str]
    """[Q], both captions joined by "and" (FashionSAP, which puts a prompt before them)."""
    galleries: dict[str, np.ndarray]
    """The original gallery of each class, int64 [G]; empty if the folder has none."""

    def __len__(self) -> int:
        return len(self.classes)

    def subset(self, rows: np.ndarray) -> Triplets:
        """Return some of the triplets (row numbers, or bool [Q]), without the galleries, which are those of all."""
        rows = np.arange(len(self))[rows]
        return Triplets(
            [self.classes[i] for i in rows],
            self.candidate[rows],
            self.target[rows],
            [self.captions[i] for i in rows],
            {},
        )


def open_triplets(split: Split) -> Triplets:
    """Read the triplets with both images in the split, and the galleries if the split is the whole folder.

    errors: UserError if there are none, or they do not match the shards.
    """
    index, path = split.index, split.index.folder / TRIPLETS
    if not path.is_file():
        raise UserError(f"{path} is missing. Composed retrieval needs data from `pack fashioniq` or `pack lookbook`.")
    sample_id = {index.key(i): i for i in range(len(index))}
    try:
        items = _load(path)
        classes = [str(item["class"]) for item in items]
        captions = [" and ".join(item["captions"]) for item in items]
        "".join(classes + captions).encode()  # fails for a lone surrogate
        candidate, target = (
            np.array([sample_id[item[end]] for item in items], np.int64) for end in ("candidate", "target")
        )
        keys_of = _load(index.folder / GALLERIES) if (index.folder / GALLERIES).is_file() else {}
        galleries = {name: np.array([sample_id[key] for key in keys], np.int64) for name, keys in keys_of.items()}
    except KeyError as error:
        raise UserError(
            f"{path} does not match the shards next to it ({error} is missing). Pack the data again."
        ) from None
    except UnicodeEncodeError:
        raise UserError(f"{path} has a text that is not valid Unicode. Pack the data again.") from None
    except (TypeError, AttributeError):
        raise UserError(
            f"{path} is not a list of class, candidate, target and captions. Pack the data again."
        ) from None
    triplets = Triplets(classes, candidate, target, captions, galleries)
    if len(split) < len(index):
        triplets = triplets.subset(np.isin(triplets.candidate, split.samples) & np.isin(triplets.target, split.samples))
    if not len(triplets):
        raise UserError(f"{path} has no triplets of images in this split. Choose other data.")
    return triplets


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)}). Pack the data again.") from None
