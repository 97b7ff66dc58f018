"""Retrieval metrics on features: 101 candidates and the full gallery, both directions, tile by tile (no N x N matrix).

A query's rank counts every candidate that does not score lower than the truth: a tie is a miss, so that constant features score nothing, nor do
features that are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    product_index: Tensor
    """int64 [N]: the product, 0 .. M - 1, that each image shows."""
    subcategory: Tensor
    """int64 [M]: the subcategory of each product, from which the 101-candidate protocol takes its negatives."""


def recall_full(gallery: Gallery, tile: int = 1024) -> dict[str, float]:
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
    return {
        f"{way}/full/R@{k}": recall(torch.cat(rank), k) for way, rank in (("i2t", i2t), ("t2i", t2i)) for k in RECALLS
    }


def recall_101(gallery: Gallery, *, queries: int = 1000, draws: int = 5, seed: int = 0) -> dict[str, float]:
    """R@1, 5, 10 in percent among 101 candidates: mean and standard deviation over the draws (FashionViL's protocol).

    Each draw takes `queries` random queries (all, where there are fewer), and for each the truth and 100 candidates of other products of the same
    subcategory, topped up from other subcategories where there are too few (FashionSAP); "topped-up" is the share of such candidates in percent.
    i2t: an image among texts. t2i: a product's text among images, with one random photo of the product.
    Raises ValueError with fewer than 101 products.
    """
    recalls: dict[str, list[float]] = {}
    topped_up = []
    for draw in _draws(gallery, queries, draws, seed):
        asked, items = (gallery.images, gallery.texts) if draw.way == "i2t" else (gallery.texts, gallery.images)
        _add(recalls, f"{draw.way}/101-candidate", _rank(asked[draw.query], items, draw.truth, draw.chosen))
        topped_up.append(draw.extra)
    return _over_draws(recalls, "101-candidate") | {"101-candidate/topped-up": 100 * float(np.mean(topped_up))}


class Shortlist(NamedTuple):
    """The K best candidates of Q queries by ITC, to be put in order anew by the ITM head."""

    name: str
    """Direction and protocol, such as "i2t/full"; the draws of a protocol share one."""
    images: Tensor
    """int64 [Q, K]: with `texts` the pairs that the ITM head is to judge, best first."""
    texts: Tensor
    """int64 [Q, K]."""
    right: Tensor
    """bool [Q, K]: which of them show the query's product."""
    rank: Tensor
    """int64 [Q]: rank of the best right answer by ITC."""


def shortlists(
    gallery: Gallery, k: int, *, queries: int = 1000, draws: int = 5, seed: int = 0, tile: int = 1024
) -> list[Shortlist]:
    """What re-ranking needs: for the full gallery in both directions and, with 101 products or more, for the draws of `recall_101`."""
    images, texts, product, _ = gallery
    lists = []
    for way, asked, items in (("i2t", images, texts), ("t2i", texts, images)):
        parts = []
        for begin in range(0, len(asked), tile):
            query = torch.arange(begin, min(begin + tile, len(asked)), device=asked.device)
            score = asked[query] @ items.T
            right = (
                product[query][:, None] == torch.arange(len(texts), device=product.device)
                if way == "i2t"
                else product == query[:, None]
            )
            parts.append(_best(query, score, right, k))
        lists.append(_shortlist(f"{way}/full", *(torch.cat(x) for x in zip(*parts, strict=True))))
    if len(texts) < CANDIDATES:
        return lists
    for draw in _draws(gallery, queries, draws, seed):
        asked, items = (images, texts) if draw.way == "i2t" else (texts, images)
        at = torch.from_numpy(np.column_stack([draw.truth, draw.chosen])).to(items.device)
        query = torch.from_numpy(draw.query).to(items.device)
        right = torch.zeros_like(at, dtype=torch.bool)
        right[:, 0] = True
        query, best, found, rank = _best(query, _scores(asked[query], items, at), right, k)
        lists.append(_shortlist(f"{draw.way}/101-candidate", query, at.gather(1, best), found, rank))
    return lists


def recall_reranked(lists: list[Shortlist], scores: list[Tensor]) -> dict[str, float]:
    """R@1, 5, 10 in percent where the ITM scores float32 [Q, K] decide the order of each shortlist; names end in /itm-rerank/R@k.

    A right answer that is not on the shortlist keeps its ITC rank, behind the whole list. Among several photos of the product the best counts.
    """
    recalls: dict[str, list[float]] = {}
    for entry, score in zip(lists, scores, strict=True):
        own = score.masked_fill(~entry.right, -torch.inf).amax(1, keepdim=True)
        rank = 1 + (~(score < own) & ~entry.right).sum(1)
        _add(
            recalls,
            f"{entry.name}/itm-rerank",
            torch.where(entry.right.any(1), rank, entry.rank.clamp(min=score.shape[1] + 1)),
        )
    full = {name: values[0] for name, values in recalls.items() if "/full/" in name}
    drawn = {name: values for name, values in recalls.items() if "/101-candidate/" in name}
    return full | (_over_draws(drawn, "101-candidate/itm-rerank") if drawn else {})


def _best(query: Tensor, score: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The queries, the places int64 [Q, K] of the k best of each, which of these are right, and the ITC rank of the best right answer."""
    own = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    rank = 1 + (~(score < own) & ~right).sum(1)
    best = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return query, best, right.gather(1, best), rank


def _shortlist(name: str, query: Tensor, items: Tensor, right: Tensor, rank: Tensor) -> Shortlist:
    asked = query[:, None].expand_as(items)
    return Shortlist(name, *((asked, items) if name.startswith("i2t") else (items, asked)), right, rank)


class _Draw(NamedTuple):
    """One draw of the 101-candidate protocol in one direction: items are texts for i2t, images for t2i."""

    way: str
    query: np.ndarray
    """int64 [Q]: images for i2t, texts for t2i."""
    truth: np.ndarray
    """int64 [Q]: the right item."""
    chosen: np.ndarray
    """int64 [Q, 100]: the other candidates."""
    extra: float
    """Share of candidates from other subcategories."""


def _draws(gallery: Gallery, queries: int, draws: int, seed: int) -> Iterator[_Draw]:
    products = len(gallery.texts)
    if products < CANDIDATES:
        raise ValueError(f"the 101-candidate protocol needs 101 products or more: got {products}")
    image_product, group = gallery.product_index.cpu().numpy(), gallery.subcategory.cpu().numpy()
    image_group = group[image_product]
    for draw in range(draws):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, draw], np.uint64)))
        query = rng.permutation(len(image_product))[:queries]
        chosen, extra = _candidates(rng, image_product[query], group[image_product[query]], np.arange(products), group)
        yield _Draw("i2t", query, image_product[query], chosen, extra)

        photos = rng.permutation(len(image_product))
        shown, first = np.unique(
            image_product[photos], return_index=True
        )  # a random photo of each product that has one
        query = rng.permutation(len(shown))[:queries]
        chosen, extra = _candidates(rng, shown[query], group[shown[query]], image_product, image_group)
        yield _Draw("t2i", shown[query], photos[first[query]], chosen, extra)


def _over_draws(recalls: dict[str, list[float]], protocol: str) -> dict[str, float]:
    """Mean and standard deviation over the draws of each recall, and of the mean of both directions."""
    results = {}
    for name, values in recalls.items():
        results[name], results[f"{name}/std"] = float(np.mean(values)), float(np.std(values))
    for k in RECALLS:
        both = np.mean([recalls[f"{way}/{protocol}/R@{k}"] for way in ("i2t", "t2i")], axis=0)
        results[f"mean/{protocol}/R@{k}"], results[f"mean/{protocol}/R@{k}/std"] = float(both.mean()), float(both.std())
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
    score = _scores(queries, items, torch.from_numpy(np.column_stack([truth, chosen])).to(items.device))
    return (~(score < score[:, :1])).sum(1)


def _scores(queries: Tensor, items: Tensor, at: Tensor) -> Tensor:
    """Products [Q, n] of each query with its own items at int64 [Q, n]."""
    return torch.stack([items[row] @ query for row, query in zip(at, queries, strict=True)])


def _add(recalls: dict[str, list[float]], name: str, rank: Tensor) -> None:
    for k in RECALLS:
        recalls.setdefault(f"{name}/R@{k}", []).append(recall(rank, k))
