"""Composed (text-guided) retrieval metrics: a reference picture and what is to change, among the pictures of a class (FashionIQ's protocol)."""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

RECALLS = (10, 50)


class ClassQueries(NamedTuple):
    """The queries of one class and one gallery of it; numbers are rows of the pictures' features."""

    queries: Tensor
    """float32 [Q, E], unit vectors."""
    target: Tensor
    """int64 [Q]: the picture that each is to find."""
    gallery: Tensor
    """int64 [G]: the pictures that are searched, the references among them."""


def composed_recall(
    classes: Mapping[str, ClassQueries], pictures: Tensor, product: Tensor, tile: int = 1024
) -> dict[str, float]:
    """R@10 and R@50 in percent of each class and their mean over the classes; "images" is a gallery's size, "chance" what a random order gets.

    pictures: float32 [N, E], unit vectors; product: int64 [N], the product that each shows.
    Every picture of the target's product is a right answer, of which the best-ranked counts; in FashionIQ each picture is its own product. The
    reference stays in the gallery, as is usual there. A tie is a miss.
    """
    results: dict[str, float] = {}
    for name, (queries, target, gallery) in classes.items():
        ranks, chance = [], {k: [] for k in RECALLS}
        for begin in range(0, len(queries), tile):
            goal = target[begin : begin + tile]
            score = queries[begin : begin + tile] @ pictures[gallery].T
            right = product[gallery] == product[goal][:, None]
            own = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            ranks.append(1 + (~(score < own) & ~right).sum(1))
            for k in RECALLS:
                chance[k] += [_random_recall(len(gallery), n, k) for n in right.sum(1).tolist()]
        rank = torch.cat(ranks)
        for k in RECALLS:
            results[f"{name}/R@{k}"] = 100 * (rank <= k).float().mean().item()
            results[f"{name}/R@{k}/chance"] = 100 * sum(chance[k]) / len(chance[k])
        results[f"{name}/images"], results[f"{name}/queries"] = float(len(gallery)), float(len(queries))
    for k in RECALLS:
        for ending in ("", "/chance"):
            results[f"mean/R@{k}{ending}"] = sum(results[f"{name}/R@{k}{ending}"] for name in classes) / len(classes)
    return results


def _random_recall(size: int, right: int, k: int) -> float:
    """The chance that a random order of `size` pictures has one of `right` among its first k."""
    return 1 - comb(size - right, k) / comb(size, k) if k <= size else float(right > 0)
