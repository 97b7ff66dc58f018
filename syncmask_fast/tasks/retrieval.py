"""Image-text retrieval: recall in the full gallery and among 101 candidates, re-ranking, search, and fine-tuning.

Scores are computed tile by tile: no N x N matrix. `base.rank_of_best` defines ranks and ties.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.splits import Split
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.model.layout import group_by_image
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.tasks.base import (
    FineTuneTask,
    evaluation_batches,
    image_items,
    open_tokens,
    rank_of_best,
    recall_at,
    text_features,
)
from syncmask_fast.utils.errors import UserError

RECALLS = (1, 5, 10)
CANDIDATES = 101
RERANK = 16  # candidates that the ITM head re-ranks by default
PAIRS = 512  # pairs in one pass of the fusion encoder
METRIC = "retrieval/mean-of-six/full"  # selects the best fine-tuned model


# Features ----------------------------------------------------------------------------------------------------------


class Gallery(NamedTuple):
    """The features of an evaluation set of N images and M products."""

    images: Tensor
    """float32 [N, E], unit vectors."""
    texts: Tensor
    """float32 [M, E], unit vectors: the text of each product."""
    product_index: Tensor
    """int64 [N]: the product, 0 .. M - 1, of each image."""
    subcategory: Tensor
    """int64 [M]: the subcategory of each product, from which the 101-candidate protocol takes its negatives."""


@torch.inference_mode()
def encode_images(model: SyncMaskModel, split: Split, tokens: TokenCache) -> tuple[Tensor, np.ndarray]:
    """Return unit vectors, float32 [N, E], and sample ids, int64 [N], of a split's readable images.

    errors: UserError if no image can be read.
    """
    images, sample_ids = [], []
    for batch in evaluation_batches(model, split, tokens, split.samples):
        images.append(model.encode_image(batch.pixels))
        sample_ids.append(batch.sample_ids_host)
    if not images:
        raise UserError(f"{split.index.folder} has no readable image. Repair or repack its shards.")
    return torch.cat(images), np.concatenate(sample_ids)


@torch.inference_mode()
def encode_split(model: SyncMaskModel, split: Split, tokens: TokenCache) -> tuple[Gallery, np.ndarray]:
    """Return the features of a split and the sample ids, int64 [N], of its images.

    A product's text is that of its first image, and the first text where an image has several.
    """
    images, sample_ids = encode_images(model, split, tokens)
    product_ids = split.index.product_ids[sample_ids]
    _, first, product_index = np.unique(product_ids, return_index=True, return_inverse=True)
    texts = [model.project_texts(*features) for features in text_features(model, tokens, sample_ids[first])]
    subcategory = split.index.subcategory.codes[sample_ids[first]]
    codes = (torch.from_numpy(x).to(model.device) for x in (product_index, subcategory))
    return Gallery(images, torch.cat(texts), *codes), sample_ids


# Queries with scored candidates ------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """Q queries of one direction and protocol with the scores of their n candidates."""

    name: str
    """Direction and protocol, such as "i2t/full"."""
    queries: Tensor
    """int64 [Q]: images for i2t, texts for t2i."""
    candidates: Tensor
    """int64 [Q, n]: texts for i2t, images for t2i."""
    score: Tensor
    """float32 [Q, n]."""
    right: Tensor
    """bool [Q, n]: candidates of the query's product."""

    def rank(self) -> Tensor:
        """Return the rank, int64 [Q], of each query's best right candidate."""
        return rank_of_best(self.score, self.right)


def _scored_full(gallery: Gallery, tile: int) -> Iterator[Scored]:
    """Yield all queries in tiles, each with the whole gallery of the other modality as candidates."""
    images, texts, product_index, _ = gallery
    products = torch.arange(len(texts), device=texts.device)
    sides = (("i2t", images, texts, product_index, products), ("t2i", texts, images, products, product_index))
    for direction, queries, candidates, query_product, candidate_product in sides:
        everything = torch.arange(len(candidates), device=candidates.device)
        for begin in range(0, len(queries), tile):
            rows = torch.arange(begin, min(begin + tile, len(queries)), device=queries.device)
            right = query_product[rows, None] == candidate_product
            score = queries[rows] @ candidates.T
            # `everything` is expanded, not copied: n numbers for all queries.
            yield Scored(f"{direction}/full", rows, everything.expand(len(rows), -1), score, right)


class Draw(NamedTuple):
    """One draw of the 101-candidate protocol in one direction."""

    direction: str
    queries: np.ndarray
    """int64 [Q]: images for i2t, texts for t2i."""
    candidates: np.ndarray
    """int64 [Q, 101]: texts for i2t, images for t2i; the right one first."""
    borrowed: float
    """Share of candidates from other subcategories than the query's."""


def draws_101(gallery: Gallery, queries: int, draws: int, seed: int) -> Iterator[Draw]:
    """Yield each draw of the 101-candidate protocol in both directions, i2t first.

    errors: ValueError for fewer than 101 products.
    """
    products = len(gallery.texts)
    if products < CANDIDATES:
        raise ValueError(f"The 101-candidate protocol needs 101 products or more, but there are {products}.")
    image_product, subcategory = gallery.product_index.cpu().numpy(), gallery.subcategory.cpu().numpy()
    image_subcategory = subcategory[image_product]
    for draw in range(draws):
        # One generator per draw: a draw does not depend on how many queries the draws before it took.
        rng = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, draw], np.uint64)))
        query = rng.permutation(len(image_product))[:queries]
        right = image_product[query]
        others, borrowed = _negatives(rng, right, subcategory, np.arange(products), subcategory)
        yield Draw("i2t", query, np.column_stack([right, others]), borrowed)

        # A text is searched with one random image of its product, so the images are shuffled first.
        shuffled = rng.permutation(len(image_product))
        shown, first = np.unique(image_product[shuffled], return_index=True)
        query = rng.permutation(len(shown))[:queries]
        others, borrowed = _negatives(rng, shown[query], subcategory, image_product, image_subcategory)
        yield Draw("t2i", shown[query], np.column_stack([shuffled[first[query]], others]), borrowed)


def _negatives(
    rng: np.random.Generator,
    products: np.ndarray,
    subcategory: np.ndarray,
    item_product: np.ndarray,
    item_subcategory: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Return 100 items of other products for each query's product, int64 [Q, 100], and the borrowed share.

    Items of the product's own subcategory come first. subcategory: int64 [M].
    """
    chosen = np.empty((len(products), CANDIDATES - 1), dtype=np.int64)
    borrowed = 0
    for row, product in enumerate(products):
        order = rng.permutation(len(item_product))
        order = order[item_product[order] != product]
        same = item_subcategory[order] == subcategory[product]
        order = np.concatenate([order[same], order[~same]])[: CANDIDATES - 1]
        borrowed += len(order) - min(len(order), int(same.sum()))
        chosen[row] = np.resize(order, CANDIDATES - 1)
    return chosen, borrowed / chosen.size


def _scored_101(gallery: Gallery, draw: Draw) -> Scored:
    sides = (gallery.images, gallery.texts)
    queries, items = sides if draw.direction == "i2t" else sides[::-1]
    rows, candidates = (torch.from_numpy(x).to(items.device) for x in (draw.queries, draw.candidates))
    # One product per query: a batched product could round equal candidates differently, and ties would be lost.
    score = torch.stack([items[row] @ query for row, query in zip(candidates, queries[rows], strict=True)])
    right = torch.zeros_like(candidates, dtype=torch.bool)
    right[:, 0] = True
    return Scored(f"{draw.direction}/101-candidate", rows, candidates, score, right)


# Recall ------------------------------------------------------------------------------------------------------------


def recall_full(gallery: Gallery, tile: int = 1024) -> dict[str, float]:
    """Return R@1, 5, 10 in percent in the full gallery (FashionSAP's protocol).

    i2t: each image among the texts of all products. t2i: each product's text among all images; its best image counts.
    """
    ranks: dict[str, list[Tensor]] = {}
    for scored in _scored_full(gallery, tile):
        ranks.setdefault(scored.name, []).append(scored.rank())
    return {f"{name}/R@{k}": recall_at(k, torch.cat(tiles)) for name, tiles in ranks.items() for k in RECALLS}


def recall_101(gallery: Gallery, *, queries: int = 1000, draws: int = 5, seed: int = 0) -> dict[str, float]:
    """Return R@1, 5, 10 in percent among 101 candidates: mean and deviation over draws (FashionViL's protocol).

    Each draw takes `queries` random queries (all, if there are fewer). Each query has the truth and 100 candidates of
    other products of its subcategory. If there are too few, other subcategories lend the rest (FashionSAP); "borrowed"
    is the share of such candidates in percent. i2t: an image among texts. t2i: a product's text among images, with one
    random image of the product. errors: ValueError for fewer than 101 products.
    """
    recalls: dict[str, list[float]] = {}
    borrowed = []
    for draw in draws_101(gallery, queries, draws, seed):
        scored = _scored_101(gallery, draw)
        _add_recalls(recalls, scored.name, scored.rank())
        borrowed.append(draw.borrowed)
    return _over_draws(recalls, "101-candidate") | {"101-candidate/borrowed": 100 * float(np.mean(borrowed))}


def _add_recalls(recalls: dict[str, list[float]], name: str, rank: Tensor) -> None:
    for k in RECALLS:
        recalls.setdefault(f"{name}/R@{k}", []).append(recall_at(k, rank))


def _over_draws(recalls: dict[str, list[float]], protocol: str) -> dict[str, float]:
    """Return mean and standard deviation over the draws of each recall, and of the mean of both directions."""
    results = {}
    for name, values in recalls.items():
        results[name], results[f"{name}/std"] = float(np.mean(values)), float(np.std(values))
    for k in RECALLS:
        both = np.mean([recalls[f"{direction}/{protocol}/R@{k}"] for direction in ("i2t", "t2i")], axis=0)
        results[f"mean/{protocol}/R@{k}"], results[f"mean/{protocol}/R@{k}/std"] = float(both.mean()), float(both.std())
    return results


# Re-ranking by the ITM head ----------------------------------------------------------------------------------------


class Shortlist(NamedTuple):
    """The K best candidates by ITC of Q queries. The draws of a protocol share one name."""

    name: str
    images: Tensor
    """int64 [Q, K]: with `texts` the pairs that the ITM head scores, best first."""
    texts: Tensor
    """int64 [Q, K]."""
    right: Tensor
    """bool [Q, K]: pairs of one product."""
    rank: Tensor
    """int64 [Q]: ITC rank of the best right candidate."""


def shortlists(
    gallery: Gallery, k: int, *, queries: int = 1000, draws: int = 5, seed: int = 0, tile: int = 1024
) -> list[Shortlist]:
    """Return the shortlists of both directions: full gallery and, with 101 products, the draws of `recall_101`."""
    tiles: dict[str, list[Shortlist]] = {}
    for scored in _scored_full(gallery, tile):
        tiles.setdefault(scored.name, []).append(_shortlist(scored, k))
    lists = []
    for name, parts in tiles.items():
        fields = zip(*(part[1:] for part in parts), strict=True)
        lists.append(Shortlist(name, *(torch.cat(field) for field in fields)))
    if len(gallery.texts) >= CANDIDATES:
        lists += [_shortlist(_scored_101(gallery, draw), k) for draw in draws_101(gallery, queries, draws, seed)]
    return lists


def _shortlist(scored: Scored, k: int) -> Shortlist:
    best = scored.score.argsort(dim=1, descending=True, stable=True)[:, :k]  # stable: ties go to the lowest index
    candidates = scored.candidates.gather(1, best)
    queries = scored.queries[:, None].expand_as(candidates)
    images, texts = (queries, candidates) if scored.name.startswith("i2t") else (candidates, queries)
    return Shortlist(scored.name, images, texts, scored.right.gather(1, best), scored.rank())


def recall_reranked(lists: list[Shortlist], scores: list[Tensor]) -> dict[str, float]:
    """Return R@1, 5, 10 in percent after sorting each shortlist by its ITM scores, float32 [Q, K].

    A right candidate off the shortlist keeps its ITC rank, behind the whole list. Names end in /itm-rerank/R@k.
    """
    recalls: dict[str, list[float]] = {}
    for entry, score in zip(lists, scores, strict=True):
        behind = entry.rank.clamp(min=score.shape[1] + 1)
        rank = torch.where(entry.right.any(1), rank_of_best(score, entry.right), behind)
        _add_recalls(recalls, f"{entry.name}/itm-rerank", rank)
    full = {name: values[0] for name, values in recalls.items() if "/full/" in name}
    drawn = {name: values for name, values in recalls.items() if "/101-candidate/" in name}
    return full | (_over_draws(drawn, "101-candidate/itm-rerank") if drawn else {})


@torch.inference_mode()
def itm_scores(
    model: SyncMaskModel,
    split: Split,
    tokens: TokenCache,
    gallery: Gallery,
    sample_ids: np.ndarray,
    lists: list[Shortlist],
) -> list[Tensor]:
    """Return the ITM scores (log-odds of a match), float32 [Q, K], of the pairs on each shortlist.

    A pair on several shortlists is scored once. gallery, sample_ids: from `encode_split`.
    """
    # 1. The distinct pairs, sorted by image.
    count = len(gallery.texts)
    codes = [(entry.images * count + entry.texts).cpu().numpy() for entry in lists]
    pairs, inverse = np.unique(np.concatenate([code.ravel() for code in codes]), return_inverse=True)
    image, text = pairs // count, pairs % count

    # 2. All texts, encoded once and kept in memory.
    first = np.unique(gallery.product_index.cpu().numpy(), return_index=True)[1]
    features, layouts = zip(*text_features(model, tokens, sample_ids[first]), strict=True)
    features, layout = torch.cat(features), sum(layouts[1:], layouts[0])

    # 3. Images batch by batch, so a large gallery fits in memory. Keys and values of an image serve all its texts.
    score = torch.empty(len(pairs))
    shown = np.unique(image)
    for batch in evaluation_batches(model, split, tokens, sample_ids[shown]):
        images = model.image(batch.pixels)
        numbers = shown[batch.epoch_positions.cpu().numpy()]
        begin, end = np.searchsorted(image, numbers[0]), np.searchsorted(image, numbers[-1], side="right")
        for low in range(begin, end, PAIRS):
            rows = slice(low, min(low + PAIRS, end))
            in_pass, image_of = np.unique(image[rows], return_inverse=True)
            in_batch, image_of, text_of = (
                torch.from_numpy(x).to(model.device) for x in (np.searchsorted(numbers, in_pass), image_of, text[rows])
            )
            pack = group_by_image(layout, text_of, image_of, len(in_pass))
            fused = model.fusion(features[pack.source_rows], pack, images[in_batch])
            logits = model.itm_head(fused[pack.cls_rows]).float()
            score[rows] = (logits[:, 1] - logits[:, 0]).cpu()

    # 4. Back to the shortlists.
    rows = np.split(inverse.ravel(), np.cumsum([code.size for code in codes])[:-1])
    return [
        score[torch.from_numpy(row)].view(code.shape).to(model.device) for row, code in zip(rows, codes, strict=True)
    ]


# Evaluation and fine-tuning ----------------------------------------------------------------------------------------


def evaluate_retrieval(model: SyncMaskModel, split: Split, tokens: TokenCache, rerank: int = 0) -> dict[str, float]:
    """Return every retrieval metric in percent, by name; 101-candidate ones only with 101 products or more.

    rerank: the ITM head re-ranks this many ITC candidates for the metrics named itm-rerank; 0 leaves these out.
    """
    gallery, sample_ids = encode_split(model, split, tokens)
    config = model.config.eval
    draw = {"queries": config.queries, "draws": config.draws, "seed": model.config.seed}
    results = recall_full(gallery)
    if len(gallery.texts) >= CANDIDATES:
        results |= recall_101(gallery, **draw)
    if rerank:
        lists = shortlists(gallery, rerank, **draw)
        scores = itm_scores(model, split, tokens, gallery, sample_ids, lists)
        results |= recall_reranked(lists, scores) | {"itm-rerank/K": float(rerank)}
    results |= {"images": float(len(gallery.images)), "products": float(len(gallery.texts))}
    return {f"retrieval/{name}": value for name, value in results.items()}


def finetune_retrieval(config: TrainConfig, split: Split, validation: Split) -> tuple[FineTuneTask, TrainConfig]:
    """Return the fine-tuning of retrieval: the pretraining step without masks, so ITC and ITM."""

    def validate(model: SyncMaskModel) -> dict[str, float]:
        results = evaluate_retrieval(model, validation, open_tokens(model, validation))
        six = [results[f"retrieval/{direction}/full/R@{k}"] for direction in ("i2t", "t2i") for k in RECALLS]
        return results | {METRIC: sum(six) / 6}

    return image_items(split, pretraining_losses, validate, METRIC), config


# Search ------------------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """A product found by a search."""

    sample_id: int
    """The product's best image."""
    score: float
    """Cosine by ITC, or the probability of a match by the ITM head."""


@torch.inference_mode()
def search_products(model: SyncMaskModel, split: Split, query: str, top: int, rerank: int = 0) -> list[Match]:
    """Return the best products for a query in words, each by its best image, best first.

    rerank: the ITM head re-ranks this many images; they stay ahead of all others.
    """
    tokens = open_tokens(model, split)
    text = model.encode_text([query])[0]
    images, sample_ids = encode_images(model, split, tokens)
    score = (images @ text).cpu().numpy()
    order = np.argsort(-score, kind="stable")
    sample_ids, score = sample_ids[order], score[order]
    if rerank:
        match = []
        for batch in evaluation_batches(model, split, tokens, sample_ids[:rerank]):
            match += model.match(batch.pixels, [query] * len(batch)).tolist()
        order = np.argsort(-np.array(match), kind="stable")
        sample_ids[:rerank], score[:rerank] = sample_ids[order], np.array(match)[order]
    # The first image of each product is its best one, because images are sorted.
    first = np.unique(split.index.product_ids[sample_ids], return_index=True)[1]
    return [Match(int(sample_ids[i]), float(score[i])) for i in np.sort(first)[:top]]
