"""Metrics of composed retrieval and recognition against independent computations, and the lookbook's triplets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from syncmask_fast.config import TaskConfig
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.splits import Split
from syncmask_fast.data.triplets import open_triplets
from syncmask_fast.sources.lookbook.triplets import SAME, make_triplets
from syncmask_fast.tasks import composed, recognition
from syncmask_fast.tasks.composed import ClassQueries, composed_recall, evaluate_composed
from syncmask_fast.tasks.recognition import evaluate_recognition, recognition_metrics
from syncmask_fast.utils.errors import UserError

# Composed retrieval


@pytest.mark.parametrize("whole_numbers", [False, True])
def test_composed_recall(whole_numbers: bool):
    """Equal to a plain count. Whole numbers make ties; products have several images; a gallery has fewer than 50."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(300, 4, generator=generator)
    product = torch.randint(0, 120, (300,), generator=generator)
    classes = {}
    for name, size in (("dress", 250), ("shirt", 40)):
        gallery = torch.randperm(300, generator=generator)[:size]
        target = gallery[torch.randint(0, size, (60,), generator=generator)]
        queries = images[target] + 1.5 * torch.randn(60, 4, generator=generator)
        classes[name] = ClassQueries(queries.round() if whole_numbers else queries, target, gallery)
    images = images.round() if whole_numbers else images
    found = composed_recall(classes, images, product, tile=17)
    for k in (10, 50):
        means = []
        for name, (queries, target, gallery) in classes.items():
            hits = []
            for query, goal in zip(queries, target, strict=True):
                score = {int(j): float(images[j].double() @ query.double()) for j in gallery}
                right = [j for j in score if product[j] == product[goal]]
                best = max(score[j] for j in right)
                hits.append(sum(score[j] >= best for j in score if j not in right) < k)
            means.append(100 * np.mean(hits))
            assert found[f"{name}/R@{k}"] == pytest.approx(means[-1], abs=1e-3)
        assert found[f"mean/R@{k}"] == pytest.approx(np.mean(means), abs=1e-3)
    assert 0 < found["dress/R@10"] < 100
    assert found["shirt/images"] == 40


def test_composed_chance():
    """The chance level is what random features reach."""
    generator = torch.Generator().manual_seed(2)
    product = torch.arange(50).repeat_interleave(3)
    hits = []
    for _ in range(40):
        images = torch.randn(150, 8, generator=generator)
        classes = {
            "bag": ClassQueries(torch.randn(50, 8, generator=generator), 3 * torch.arange(50), torch.arange(150))
        }
        found = composed_recall(classes, images, product)
        hits.append(found["mean/R@10"])
    assert found["mean/R@10/chance"] == pytest.approx(100 * (1 - np.prod([(140 - i) / (150 - i) for i in range(3)])))
    assert np.mean(hits) == pytest.approx(found["mean/R@10/chance"], abs=2.5)


@pytest.mark.parametrize("seen", [True, False])
def test_evaluate_composed_oracle(lookbook: Path, monkeypatch: pytest.MonkeyPatch, seen: bool):
    """Queries equal to their target's image reach 100 % in both galleries; queries equal to the reference do not."""
    index = ShardIndex.open(lookbook / "eval")
    split = Split(index, np.arange(len(index)))
    triplets = open_triplets(split)

    def encode(model, split, tokens, triplets, sample_ids):
        images = torch.eye(len(sample_ids))
        return images, images[np.searchsorted(sample_ids, triplets.target if seen else triplets.candidate)]

    monkeypatch.setattr(composed, "_encode", encode)
    results = evaluate_composed(SimpleNamespace(device="cpu"), split, None, triplets)
    for protocol in ("original", "val-union"):
        # In a gallery of ten images or fewer every rank is within the first ten.
        names = [name for name in set(triplets.classes) if results[f"composed/{protocol}/{name}/images"] > 12]
        assert names
        assert {results[f"composed/{protocol}/{name}/R@10"] for name in names} == {100 if seen else 0}
        assert 0 < results[f"composed/{protocol}/mean/R@10/chance"] < 100


# Recognition


def test_recognition():
    """Equal to a confusion matrix, with a label unknown to the classifier, and one that the truth lacks."""
    rng = np.random.default_rng(0)
    known = ["bag", "coat", "dress", "hat"]
    truth = rng.choice(["bag", "coat", "dress", "glove"], 400, p=[0.5, 0.3, 0.1, 0.1])
    predicted = np.where(rng.random(400) < 0.6, truth, rng.choice(known, 400))
    predicted[predicted == "glove"] = "hat"
    names = ["bag", "coat", "dress", "glove", "hat"]
    matrix = confusion_matrix(truth, predicted, labels=names)
    f1 = [2 * matrix[i, i] / max(1, matrix[i].sum() + matrix[:, i].sum()) for i in range(5)]
    found = recognition_metrics(truth, predicted, known)
    assert found["accuracy"] == pytest.approx(100 * np.trace(matrix) / 400)
    assert found["macro-F1/truth-or-predicted"] == pytest.approx(100 * np.mean(f1))
    assert found["macro-F1/seen-in-truth"] == pytest.approx(100 * np.mean(f1[:3]))
    assert found["accuracy/most-frequent"] == pytest.approx(100 * (truth == "bag").mean())
    assert (found["unseen-labels"], found["unseen-images"]) == (1, (truth == "glove").sum())
    assert (found["labels"], found["labels-in-truth"], found["images"]) == (4, 4, 400)


def test_unseen_label():
    """It is always an error. FashionSAP gives it class 0, which makes predictions of class 0 right."""
    found = recognition_metrics(["glove", "glove"], ["bag", "bag"], ["bag", "coat"])
    assert found["accuracy"] == found["macro-F1/truth-or-predicted"] == found["macro-F1/seen-in-truth"] == 0


@pytest.mark.parametrize("shift", [0, 1])
def test_evaluate_recognition_oracle(lookbook: Path, monkeypatch: pytest.MonkeyPatch, shift: int):
    """A classifier with the true label's logit highest has accuracy 100; with the next label's, 0."""
    index = ShardIndex.open(lookbook / "eval")
    split = Split(index, np.arange(len(index)))
    labels = tuple(index.category.names)
    current = []

    def batches(model, split, tokens, sample_ids):
        for begin in range(0, len(sample_ids), 100):
            ids = sample_ids[begin : begin + 100]
            current[:] = [torch.from_numpy((index.category.codes[ids] + shift) % len(labels)).long()]
            lengths = torch.ones(len(ids), dtype=torch.int32)
            cu_seqlens = torch.cat([lengths[:1] * 0, lengths.cumsum(0, dtype=torch.int32)])
            yield SimpleNamespace(
                pixels=None,
                token_ids=None,
                lengths=lengths.tolist(),
                cu_seqlens=cu_seqlens,
                sample_ids_host=ids,
                shard=SimpleNamespace(lengths=lengths.tolist()),
            )

    monkeypatch.setattr(recognition, "evaluation_batches", batches)
    model = SimpleNamespace(
        config=SimpleNamespace(task=TaskConfig("category", labels=labels)),
        image=lambda pixels: None,
        text=lambda token_ids, layout: None,
        label_logits=lambda images, text, layout: torch.nn.functional.one_hot(current[0], len(labels)).float(),
    )
    results = evaluate_recognition(model, split, None)
    assert results["category/image+text/accuracy"] == (0 if shift else 100)
    assert results["category/image+text/macro-F1/seen-in-truth"] == (0 if shift else 100)
    assert results["category/image+text/images"] == len(split)
    assert results["category/image+text/unlabeled-images"] == 0


# The lookbook's triplets


def test_triplets(lookbook: Path):
    """Captions say what differs; galleries hold all images of a class."""
    index = ShardIndex.open(lookbook / "eval")
    triplets = open_triplets(Split(index, np.arange(len(index))))
    assert len(triplets) > 200
    for i in range(len(triplets)):
        before, after = (index.record(int(x[i])) for x in (triplets.candidate, triplets.target))
        assert before["product_id"] != after["product_id"]
        assert before["category"] == after["category"] == triplets.classes[i]
        assert before["view"] == after["view"] == "front"
        for phrase in triplets.captions[i].split(" and "):
            said = phrase.removeprefix("has ").removeprefix("is ").removeprefix("made of ").removeprefix("a pair of ")
            said = said.removeprefix("an ").removeprefix("a ")
            if phrase.startswith("has no ") and phrase != "has no sleeves":
                name = phrase.removeprefix("has no ")
                assert name == "pattern" or (name in before["facts"] and name not in after["facts"])
            elif phrase != SAME:
                told = [
                    name for name, value in after["facts"].items() if said in (value, f"{value.removesuffix('s')}s")
                ]
                assert any(before["facts"].get(name) != after["facts"][name] for name in told), phrase
    assert {name: len(pool) for name, pool in triplets.galleries.items()} == {
        name: (index.category.codes == code).sum() for code, name in enumerate(index.category.names)
    }


def test_triplet_captions(tmp_path: Path):
    base = {"category": "shoe", "subcategory": "sneaker", "color": "red", "pattern": "solid", "zip": "blue zip"}
    other = {
        "category": "shoe",
        "subcategory": "ankle boot",
        "color": "orange",
        "pattern": "white stripes",
        "lacing": "olive lacing",
    }
    samples = [
        (f"{i}_front", {"view": "front", "category": "shoe", "product_id": i, "facts": facts})
        for i, facts in enumerate((base, other, base))
    ]
    found, galleries = make_triplets(samples)
    assert galleries == {"shoe": ["0_front", "1_front", "2_front"]}
    assert {(t["candidate"][0], t["target"][0]) for t in found} == {("1", "0"), ("0", "1"), ("2", "1"), ("1", "2")}
    phrases = {phrase for t in found for caption in t["captions"] for phrase in caption.split(" and ")}
    assert phrases <= {
        "is red",
        "is orange",
        "has no pattern",
        "has white stripes",
        "has a blue zip",
        "has no zip",
        "has olive lacing",
        "has no lacing",
        "is a pair of sneakers",
        "is a pair of ankle boots",
    }


def test_broken_triplets(lookbook: Path, tmp_path: Path):
    index = ShardIndex.open(lookbook / "eval")
    index.folder = tmp_path
    whole = Split(index, np.arange(len(index)))
    with pytest.raises(UserError, match=r"triplets\.json is missing"):
        open_triplets(whole)
    for content in (
        "[",
        '[{"class": "bag"}]',
        '[{"class": "bag", "candidate": "x", "target": "y", "captions": ["z"]}]',
        "[]",
        "[3]",
    ):
        (tmp_path / "triplets.json").write_text(content)
        with pytest.raises(UserError, match=r"triplets\.json"):
            open_triplets(whole)
    (tmp_path / "triplets.json").write_text(
        r'[{"class": "bag", "candidate": "x", "target": "y", "captions": ["\ud800"]}]'
    )
    with pytest.raises(UserError, match=r"triplets\.json has a text that is not valid Unicode"):
        open_triplets(whole)
