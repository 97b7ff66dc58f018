"""The order of an epoch: complete, repeatable, and free of one product twice in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from syncmask_fast.data.epoch_order import epoch_order, rank_share

KINDS = ("semi_hard", "hard", "random")


def features(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    feats = F.normalize(torch.randn(2, n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return {"image_feats": feats[0], "text_feats": feats[1]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "batch"), [(60, 8), (64, 8), (5, 8), (1, 1)])
@pytest.mark.parametrize("search_space", [None, 17])
def test_every_sample_once(kind: str, n: int, batch: int, search_space: int | None):
    ids = np.arange(n) // 3
    for feats in ({}, features(n)):
        order = epoch_order(3, 1, ids, batch_size=batch, kind=kind, search_space=search_space, **feats)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(n))


@pytest.mark.parametrize("kind", KINDS)
def test_pure_function_of_seed_and_epoch(kind: str):
    ids, feats = np.arange(40) // 2, features(40)
    kept = {name: x.clone() for name, x in feats.items()}

    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order(seed, epoch, ids, batch_size=8, kind=kind, **feats).tolist()

    np.random.seed(1)
    torch.manual_seed(1)
    first = order(5, 2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert order(5, 2) == first
    assert order(5, 3) != first
    assert order(6, 2) != first
    # Any number will do as a seed, and neighbors far from 0 differ too.
    assert order(-1, 2) != order(-2, 2)
    assert order(2**62, 2) != order(2**62 + 1, 2)
    assert all(torch.equal(feats[name], kept[name]) for name in feats)


def test_without_features_the_order_is_random():
    ids = np.arange(40)
    plain = epoch_order(0, 0, ids, batch_size=8)
    for kind in KINDS:
        assert epoch_order(0, 0, ids, batch_size=8, kind=kind).tolist() == plain.tolist()


@pytest.mark.parametrize("search_space", [None, 96])
def test_semi_hard_never_pairs_a_product_with_itself(search_space: int | None):
    """Products with several photos that are each other's nearest neighbors: "hard" puts them together, "semi_hard"
    does not.
    """
    products, photos, batch = 48, 4, 8
    ids = np.repeat(np.arange(products), photos)
    center = features(products)
    noise = features(products * photos, seed=1)
    feats = {
        name: F.normalize(center[name].repeat_interleave(photos, 0) + 0.05 * noise[name], dim=-1) for name in center
    }

    def repeats(kind: str, epoch: int) -> int:
        order = epoch_order(1, epoch, ids, batch_size=batch, kind=kind, search_space=search_space, **feats)
        return sum(batch - len(np.unique(ids[run])) for run in order.reshape(-1, batch))

    # What cannot be avoided is left to the end of a walk: the last batches of each search space.
    walks = 1 if search_space is None else len(ids) // search_space
    for epoch in range(3):
        assert repeats("semi_hard", epoch) <= 2 * walks * photos
        assert repeats("hard", epoch) > 3 * repeats("semi_hard", epoch)


def test_a_product_comes_again_only_after_all_others():
    """In one batch of everything: no product twice before every product has come, though its other photos are the most
    similar.
    """
    products, photos = 12, 4
    ids = np.repeat(np.arange(products), photos)
    center = features(products, seed=5)
    feats = {name: x.repeat_interleave(photos, 0) for name, x in center.items()}
    order = epoch_order(0, 1, ids, batch_size=len(ids), kind="semi_hard", **feats)
    assert sorted(ids[order[:products]].tolist()) == list(range(products))


def test_similar_samples_come_together():
    """Clusters of similar products fill batches, which random order does not."""
    clusters, each = 12, 16
    label = np.repeat(np.arange(clusters), each)
    center, noise = features(clusters, seed=2), features(clusters * each, seed=3)
    feats = {
        name: F.normalize(center["image_feats"].repeat_interleave(each, 0) + 0.2 * noise[name], dim=-1)
        for name in center
    }

    def neighbors(kind: str) -> float:
        order = epoch_order(0, 1, np.arange(len(label)), batch_size=8, kind=kind, **feats).reshape(-1, 8)
        return float(np.mean(label[order[:, 1:]] == label[order[:, :-1]]))

    assert neighbors("hard") > 0.6
    assert neighbors("semi_hard") > 0.6
    assert neighbors("random") < 0.25


def test_a_short_last_batch_stays_last():
    feats = features(21)
    walk = epoch_order(0, 1, np.arange(21), batch_size=21, kind="hard", **feats)  # one batch: the walk as it is
    order = epoch_order(0, 1, np.arange(21), batch_size=8, kind="hard", **feats)
    assert order[16:].tolist() == walk[16:].tolist()
    assert sorted([order[:8].tolist(), order[8:16].tolist()]) == sorted([walk[:8].tolist(), walk[8:16].tolist()])


@pytest.mark.parametrize(
    ("n", "batch", "ranks"), [(64, 16, 4), (70, 16, 4), (3, 8, 2), (50, 5, 1), (50, 8, 3), (20, 3, 4)]
)
def test_rank_shares(n: int, batch: int, ranks: int):
    order = np.random.default_rng(0).permutation(n)
    shares = [rank_share(order, batch, rank, ranks) for rank in range(ranks)]
    for samples, positions in shares:
        assert order[positions].tolist() == samples.tolist()
        assert (np.diff(positions) > 0).all()
    positions = np.sort(np.concatenate([p for _, p in shares]))
    batches = n // batch
    assert positions.tolist() == list(range(batches * batch))
    sizes = [len(s) // batches if batches else 0 for s, _ in shares]
    assert max(sizes) - min(sizes) <= 1
    # Step s of all ranks together is the s-th run of batch samples.
    for step in range(batches):
        part = np.concatenate([s[step * size : (step + 1) * size] for (s, _), size in zip(shares, sizes, strict=True)])
        assert part.tolist() == order[step * batch : (step + 1) * batch].tolist()


@pytest.mark.parametrize("rank", [-1, 2, 7])
def test_impossible_rank(rank: int):
    with pytest.raises(ValueError, match="rank"):
        rank_share(np.arange(8), 2, rank, 2)
