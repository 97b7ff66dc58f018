"""Retrieval metrics on features: 101 candidates and the full gallery, both directions, tile by tile (no N x N matrix).

A query's rank counts every candidate that does not score lower than the truth: a tie is a miss, so that constant features score nothing, nor do
features that are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RECALLS = (1, 5, 10)
CANDIDATES = 101


class Gallery(NamedTuple):
    """The features of an evaluation set of N images and M products."""

    images: Tensor
    """float32 [N, E], unit vectors."""
    texts: Tensor
    """float32 [M, E], unit vectors: the text of each product."""
    product: Tensor
    """int64 [N]: the product, 0 .. M - 1, that each image shows."""
    group: Tensor
    """int64 [M]: the subcategory of each product, from which the 101-candidate protocol takes its negatives."""


def full_recall(gallery: Gallery, tile: int = 1024) -> dict[str, float]:
    """R@1, 5, 10 in percent in the full gallery (FashionSAP's protocol).

    i2t: each image among the texts of all products. t2i: each product's text among all images; its best-ranked photo counts.
    """
    images, texts, product, _ = gallery
    i2t = []
    for begin in range(0, len(images), tile):
        score = images[begin : begin + tile] @ texts.T
        own = score.gather(1, product[begin : begin + tile, None])
        i2t.append((~(score < own)).sum(1))
    t2i = []
    for begin in range(0, len(texts), tile):
        score = texts[begin : begin + tile] @ images.T
        mine = product[None, :] == torch.arange(begin, begin + len(score), device=product.device)[:, None]
        own = score.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        t2i.append(1 + (~(score < own) & ~mine).sum(1))
    return {f"{way}/full/R@{k}": recall(torch.cat(rank), k) for way, rank in (("i2t", i2t), ("t2i", t2i)) for k in RECALLS}


def candidate_recall(gallery: Gallery, *, queries: int = 1000, draws: int = 5, seed: int = 0) -> dict[str, float]:
    """R@1, 5, 10 in percent among 101 candidates: mean and standard deviation over the draws (FashionViL's protocol).

    Each draw takes `queries` random queries (all, where there are fewer), and for each the truth and 100 candidates of other products of the same
    subcategory, topped up from other subcategories where there are too few (FashionSAP); "topped-up" is the share of such candidates in percent.
    i2t: an image among texts. t2i: a product's text among images, with one random photo of the product.
    Raises ValueError with fewer than 101 products.
    """
    products = len(gallery.texts)
    if products < CANDIDATES:
        raise ValueError(f"the 101-candidate protocol needs 101 products or more: got {products}")
    image_product, group = gallery.product.cpu().numpy(), gallery.group.cpu().numpy()
    image_group = group[image_product]
    recalls: dict[str, list[float]] = {}
    topped_up = []
    for draw in range(draws):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, draw], np.uint64)))
        query = rng.permutation(len(image_product))[:queries]
        chosen, extra = _candidates(rng, image_product[query], group[image_product[query]], np.arange(products), group)
        rank = _rank(gallery.images[query], gallery.texts, image_product[query], chosen)
        _add(recalls, "i2t", rank)
        topped_up.append(extra)

        photos = rng.permutation(len(image_product))
        shown, first = np.unique(image_product[photos], return_index=True)  # a random photo of each product that has one
        query = rng.permutation(len(shown))[:queries]
        chosen, extra = _candidates(rng, shown[query], group[shown[query]], image_product, image_group)
        rank = _rank(gallery.texts[shown[query]], gallery.images, photos[first[query]], chosen)
        _add(recalls, "t2i", rank)
        topped_up.append(extra)
    results = {}
    for name, values in recalls.items():
        results[name], results[f"{name}/std"] = float(np.mean(values)), float(np.std(values))
    for k in RECALLS:
        both = np.mean([recalls[f"{way}/101-candidate/R@{k}"] for way in ("i2t", "t2i")], axis=0)
        results[f"mean/101-candidate/R@{k}"], results[f"mean/101-candidate/R@{k}/std"] = float(both.mean()), float(both.std())
    results["101-candidate/topped-up"] = 100 * float(np.mean(topped_up))
    return results


def recall(rank: Tensor, k: int) -> float:
    """The share of ranks (from 1) that are k or better, in percent."""
    return 100 * (rank <= k).float().mean().item()


def _candidates(
    rng: np.random.Generator, products: np.ndarray, groups: np.ndarray, item_product: np.ndarray, item_group: np.ndarray
) -> tuple[np.ndarray, float]:
    """For each query 100 items of other products, int64 [Q, 100], of its own group first; and the share from other groups."""
    chosen = np.empty((len(products), CANDIDATES - 1), dtype=np.int64)
    extra = 0
    for row, (product, group) in enumerate(zip(products, groups, strict=True)):
        order = rng.permutation(len(item_product))
        order = order[item_product[order] != product]
        same = item_group[order] == group
        order = np.concatenate([order[same], order[~same]])[: CANDIDATES - 1]
        extra += len(order) - min(len(order), int(same.sum()))
        chosen[row] = np.resize(order, CANDIDATES - 1)
    return chosen, extra / chosen.size


def _rank(queries: Tensor, items: Tensor, truth: np.ndarray, chosen: np.ndarray) -> Tensor:
    """Ranks int64 [Q], from 1, of the items `truth` among themselves and the chosen ones."""
    at = torch.from_numpy(np.column_stack([truth, chosen])).to(items.device)
    score = torch.stack([items[row] @ query for row, query in zip(at, queries, strict=True)])
    return (~(score < score[:, :1])).sum(1)


def _add(recalls: dict[str, list[float]], way: str, rank: Tensor) -> None:
    for k in RECALLS:
        recalls.setdefault(f"{way}/101-candidate/R@{k}", []).append(recall(rank, k))
