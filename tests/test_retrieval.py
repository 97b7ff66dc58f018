"""Retrieval metrics against a plain count, one query at a time; ties, several images of a product, re-ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from syncmask_fast.tasks.retrieval import (
    RECALLS,
    Gallery,
    draws_101,
    recall_101,
    recall_full,
    recall_reranked,
    shortlists,
)

PRODUCTS = 120


def gallery(seed: int, *, products: int = PRODUCTS, groups: int = 3, whole_numbers: bool = False) -> Gallery:
    """1 to 4 images of each product, in random order. Whole numbers make ties, and sums that are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    product = torch.arange(products).repeat_interleave(torch.randint(1, 5, (products,), generator=generator))
    product = product[torch.randperm(len(product), generator=generator)]
    center = torch.randn(products, 8, generator=generator)
    images = center[product] + 1.2 * torch.randn(len(product), 8, generator=generator)
    texts = center + 1.2 * torch.randn(products, 8, generator=generator)
    if whole_numbers:
        images, texts = images.round(), texts.round()
    else:
        images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    return Gallery(images, texts, product, torch.randint(0, groups, (products,), generator=generator))


def plain_full_recall(g: Gallery) -> dict[str, float]:
    """1 + the candidates of other products that score as high or higher; a text's best image counts."""
    score = (g.images.double() @ g.texts.double().T).numpy()
    product = g.product_index.numpy()
    ranks: dict[str, list[int]] = {"i2t": [], "t2i": []}
    for i, own in enumerate(product):
        ranks["i2t"].append(1 + sum(score[i, j] >= score[i, own] for j in range(score.shape[1]) if j != own))
    for j in range(score.shape[1]):
        best = max(score[i, j] for i in range(len(product)) if product[i] == j)
        ranks["t2i"].append(1 + sum(score[i, j] >= best for i in range(len(product)) if product[i] != j))
    return {f"{way}/full/R@{k}": 100 * float(np.mean([r <= k for r in ranks[way]])) for way in ranks for k in RECALLS}


@pytest.mark.parametrize("whole_numbers", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_recall_full(seed: int, whole_numbers: bool):
    g = gallery(seed, products=40, whole_numbers=whole_numbers)
    expected = plain_full_recall(g)
    assert 0 < expected["i2t/full/R@1"] < expected["i2t/full/R@10"] < 100  # neither trivial
    for tile in (1024, 7):
        assert recall_full(g, tile) == pytest.approx(expected)


def test_ties_are_misses():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    g = Gallery(images, images.clone(), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    found = recall_full(g)
    assert found["i2t/full/R@1"] == pytest.approx(100 / 3)  # the two equal ones come second
    assert found["t2i/full/R@1"] == pytest.approx(100 / 3)
    assert found["i2t/full/R@5"] == 100


def test_several_images_of_a_product():
    """They do not compete with each other."""
    texts = torch.eye(2)
    images = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.8, 0.7], [0.0, 1.0]])
    g = Gallery(images, texts, torch.tensor([0, 0, 0, 1]), torch.zeros(2, dtype=torch.int64))
    assert recall_full(g)["t2i/full/R@1"] == 100


@pytest.mark.parametrize("score", [recall_full, recall_101])
def test_perfect_constant_and_nan_features(score):
    g = gallery(3)
    one = torch.eye(PRODUCTS)
    perfect = score(g._replace(images=one[g.product_index], texts=one))
    same = torch.full(
        (1, 37), 0.3
    )  # an odd width: sums may round differently in different rows, were they not one product
    constant = score(g._replace(images=same.expand(len(g.images), 37), texts=same.expand(PRODUCTS, 37)))
    broken = score(g._replace(images=g.images * torch.nan))
    recalls = [name for name in perfect if name.split("/")[-1].startswith("R@")]
    assert len(recalls) >= 6
    for name in recalls:
        assert perfect[name] == 100
        assert constant[name] == 0
        assert broken[name] == 0


@pytest.mark.parametrize("whole_numbers", [False, True])
def test_recall_101(whole_numbers: bool):
    """The metrics equal a plain count over the drawn candidates, which follow the protocol."""
    g = gallery(5, groups=2, whole_numbers=whole_numbers)
    results = recall_101(g, queries=50, draws=3, seed=8)
    draws = list(draws_101(g, queries=50, draws=3, seed=8))
    assert [draw.direction for draw in draws] == ["i2t", "t2i"] * 3
    recalls: dict[str, list[float]] = {}
    borrowed, places = 0, 0
    for direction, query, candidates, _ in draws:
        assert query.shape == (50,)
        assert candidates.shape == (50, 101)
        queries, items = (g.images, g.texts) if direction == "i2t" else (g.texts, g.images)
        query_product, item_product = g.product_index.numpy(), np.arange(PRODUCTS)
        if direction == "t2i":
            query_product, item_product = item_product, query_product
        ranks = []
        for i, (right, *others) in zip(query, candidates, strict=True):
            product = item_product[right]
            assert product == query_product[i]
            assert len(set(others)) == 100
            assert (item_product[others] != product).all()
            pool = (g.subcategory.numpy()[item_product] == g.subcategory[product].item()) & (item_product != product)
            same = pool[others].sum()
            assert same == min(100, pool.sum())  # its own subcategory first, others only if it has too few
            borrowed, places = borrowed + 100 - same, places + 100
            score = items.double() @ queries[i].double()
            ranks.append(1 + sum(score[j] >= score[right] for j in others))
        for k in RECALLS:
            recalls.setdefault(f"{direction}/101-candidate/R@{k}", []).append(100 * np.mean([r <= k for r in ranks]))
    for name, values in recalls.items():
        assert results[name] == pytest.approx(np.mean(values))
        assert results[f"{name}/std"] == pytest.approx(np.std(values))
    for k in RECALLS:
        both = np.add(recalls[f"i2t/101-candidate/R@{k}"], recalls[f"t2i/101-candidate/R@{k}"]) / 2
        assert results[f"mean/101-candidate/R@{k}"] == pytest.approx(both.mean())
        assert results[f"mean/101-candidate/R@{k}/std"] == pytest.approx(both.std())
    assert results["101-candidate/borrowed"] == pytest.approx(100 * borrowed / places)
    assert 0 < results["101-candidate/borrowed"] < 100
    assert 0 < results["i2t/101-candidate/R@1"] < results["i2t/101-candidate/R@10"] < 100


def test_draws():
    """All images, or each product once, if queries are plenty; another image of a product in each draw."""
    g = gallery(6)
    draws = list(draws_101(g, queries=1000, draws=2, seed=1))
    for draw in draws:
        assert len(set(draw.queries)) == len(draw.queries) == (len(g.images) if draw.direction == "i2t" else PRODUCTS)
        if draw.direction == "t2i":
            assert g.product_index[draw.candidates[:, 0]].tolist() == draw.queries.tolist()
    images = [dict(zip(draw.queries.tolist(), draw.candidates[:, 0].tolist(), strict=True)) for draw in draws[1::2]]
    assert images[0] != images[1]


def test_seed():
    g = gallery(6)
    first = recall_101(g, queries=1000, draws=2, seed=1)
    assert recall_101(g, queries=1000, draws=2, seed=1) == first
    assert recall_101(g, queries=1000, draws=2, seed=2) != first


def test_borrowed():
    """One subcategory borrows nothing; subcategories of one product borrow everything."""
    g = gallery(7)
    one, each = torch.zeros(PRODUCTS, dtype=torch.int64), torch.arange(PRODUCTS)
    assert recall_101(g._replace(subcategory=one), draws=1)["101-candidate/borrowed"] == 0
    assert recall_101(g._replace(subcategory=each), draws=1)["101-candidate/borrowed"] == 100


def test_too_few_products():
    with pytest.raises(ValueError, match="101 products"):
        recall_101(gallery(8, products=100))
    recall_101(gallery(8, products=101), queries=3, draws=1)


# Re-ranking


def plain_reranked_rank(
    g: Gallery, itm: np.ndarray, way: str, query: int, items: list[int], right: set[int], k: int
) -> int:
    """One query: ITC sorts the items, ITM sorts the first k of them again; ties are misses."""
    itc = {j: float((g.images[query] @ g.texts[j]) if way == "i2t" else (g.texts[query] @ g.images[j])) for j in items}
    place = {j: n for n, j in enumerate(items)}
    best = sorted(items, key=lambda j: (-itc[j], place[j]))[:k]
    judged = {j: itm[query, j] if way == "i2t" else itm[j, query] for j in best}
    if right & set(best):
        own = max(judged[j] for j in best if j in right)
        return 1 + sum(judged[j] >= own for j in best if j not in right)
    own = max(itc[j] for j in right)
    return max(k + 1, 1 + sum(itc[j] >= own for j in items if j not in right))


@pytest.mark.parametrize("whole_numbers", [False, True])
def test_recall_reranked(whole_numbers: bool):
    """Both protocols and directions, with ties in ITC and in ITM, equal a plain count."""
    g = gallery(9, products=101, whole_numbers=whole_numbers)
    rng = np.random.default_rng(0)
    itm = rng.integers(0, 9, (len(g.images), 101)).astype(np.float32)
    lists = shortlists(g, 7, queries=20, draws=2, seed=3, tile=33)
    found = recall_reranked(lists, [torch.from_numpy(itm)[entry.images, entry.texts] for entry in lists])
    product = g.product_index.numpy()
    ranks: dict[str, list[list[int]]] = {}
    for way, asked, items in (("i2t", len(g.images), 101), ("t2i", 101, len(g.images))):
        right = [
            {int(product[q])} if way == "i2t" else set(np.flatnonzero(product == q).tolist()) for q in range(asked)
        ]
        ranks[f"{way}/full"] = [
            [plain_reranked_rank(g, itm, way, q, list(range(items)), right[q], 7) for q in range(asked)]
        ]
    for draw in draws_101(g, 20, 2, 3):
        rank = [
            plain_reranked_rank(g, itm, draw.direction, int(q), pool.tolist(), {int(pool[0])}, 7)
            for q, pool in zip(draw.queries, draw.candidates, strict=True)
        ]
        ranks.setdefault(f"{draw.direction}/101-candidate", []).append(rank)
    for name, drawn in ranks.items():
        for k in RECALLS:
            expected = np.mean([100 * np.mean(np.array(rank) <= k) for rank in drawn])
            assert found[f"{name}/itm-rerank/R@{k}"] == pytest.approx(expected)
    assert "mean/101-candidate/itm-rerank/R@1/std" in found


def test_reranking_by_itc():
    """An ITM head that agrees with ITC changes nothing."""
    g = gallery(10, products=40)
    lists = shortlists(g, 12)
    assert len(lists) == 2  # too few products for 101 candidates
    itc = g.images @ g.texts.T
    found = recall_reranked(lists, [itc[entry.images, entry.texts] for entry in lists])
    assert found == pytest.approx(
        {name.replace("/full/", "/full/itm-rerank/"): value for name, value in recall_full(g).items()}
    )
