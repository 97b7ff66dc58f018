"""Mask quality on hand-made samples, and its base rates against drawn masks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from syncmask_fast.tasks.mask_quality import MaskTruth, SampleMask, mask_truth, shuffled_partners, sync_metrics

#            0         1         2         3
#            0123456789012345678901234567890123456789
TEXT = "a red dress with a star and a zip"
SPANS = np.array(
    [[0, 1], [2, 5], [6, 11], [12, 16], [17, 18], [19, 21], [21, 23], [24, 27], [28, 29], [30, 33]]
)  # "star" is two tokens

NO_SCORE = np.zeros(0)  # only the report needs patch scores


def item(name: str, box: list[float] | None) -> dict:
    begin = TEXT.index(name)
    return {"name": name, "span": [begin, begin + len(name)], "box": box}


def bools(text: str) -> np.ndarray:
    return np.array([c == "x" for c in text.replace(" ", "")])


def test_mask_truth():
    """An image 80 wide and 40 high, 4 x 4 patches of 20 x 10 pixels."""
    attributes = [item("red", [0, 0, 80, 40]), item("star", [20, 10, 40, 20]), item("zip", None)]
    found = mask_truth(SPANS, attributes, 80, 40, 4)
    assert found.attribute.tolist() == bools(".x...xx..x").tolist()
    assert found.visible.tolist() == bools(".x...xx...").tolist()
    assert found.patches.tolist() == bools(".... .x.. .... ....").tolist()  # the color is everywhere and has no place
    assert found.patches_any_attribute.all()


@pytest.mark.parametrize(
    ("box", "patches"),
    [
        ([0, 0, 9, 10], "x... .... .... ...."),  # less than half of a patch, but all of the box
        ([0, 0, 31, 10], "xx.. .... .... ...."),  # 11 of 20 pixels of the second patch
        ([0, 0, 29, 10], "x... .... .... ...."),  # 9 of 20
        ([38, 18, 42, 22], ".... .xx. .xx. ...."),  # a small box on a corner: half of it in each of four
        ([41, 21, 43, 23], ".... .... ..x. ...."),  # a small box within one patch
        ([60, 30, 80, 40], ".... .... .... ...x"),  # the last patch
        ([10, 10, 10, 20], ".... .... .... ...."),  # an empty box
    ],
)
def test_patches_of_a_box(box: list[float], patches: str):
    found = mask_truth(SPANS, [item("star", box)], 80, 40, 4)
    assert found.patches_any_attribute.tolist() == bools(patches).tolist()
    assert found.patches.tolist() == bools(patches).tolist()


def test_place_area():
    """A box has a place if it covers less than a fifth of the image."""
    for width, has_place in ((19.0, True), (21.0, False)):
        found = mask_truth(SPANS, [item("star", [0, 0, width, 100])], 100, 100, 10)
        assert found.patches.any() == has_place
        assert found.patches_any_attribute.any()


def test_empty_truth():
    found = mask_truth(np.zeros((0, 2), np.int64), [], 40, 40, 3)
    assert found.attribute.shape == found.visible.shape == (0,)
    assert not found.patches_any_attribute.any()
    assert len(found.patches) == 9


def test_partners():
    """They show the same view of another product, with about as many tokens."""
    rng = np.random.default_rng(0)
    products = np.repeat(np.arange(40), 3)
    views = np.tile(np.arange(3), 40)
    tokens = rng.integers(5, 30, 40).repeat(3)
    partner = shuffled_partners(tokens, views, products)
    assert (views[partner] == views).all()
    assert (products[partner] != products).all()
    # In each view, neighbors in the order of token counts differ by little.
    assert np.abs(tokens[partner] - tokens).max() <= np.diff(np.sort(tokens[::3])).max() * 2
    assert np.abs(tokens[partner] - tokens).mean() < np.abs(rng.permutation(tokens) - tokens).mean() / 4
    assert shuffled_partners(tokens, views, products).tolist() == partner.tolist()


def test_partners_without_choice():
    partner = shuffled_partners(np.array([4, 4, 9]), np.array([0, 0, 1]), np.array([7, 7, 8]))
    assert partner.tolist() == [1, 0, 2]  # one product in the view; one sample in the view


def by_hand() -> tuple[list[MaskTruth], list[SampleMask], np.ndarray]:
    truths = [
        MaskTruth(bools("xxx.x"), bools("xx..."), bools("xx.."), bools("xxx.")),
        MaskTruth(bools(".xx"), bools("..x"), bools("...x"), bools("...x")),
        MaskTruth(bools("...."), bools("...."), bools("...."), bools("....")),
    ]
    masks = [
        SampleMask(bools("x.xx."), bools("x.x."), np.array([3.0, 1, 2, 9, 1]), NO_SCORE),
        SampleMask(bools(".x."), bools("..xx"), np.array([9.0, 2, 2]), NO_SCORE),
        SampleMask(bools("xx.."), bools("xx.."), np.array([4.0, 3, 2, 1]), NO_SCORE),
    ]
    return truths, masks, np.array([1, 2, 0])


def test_metrics_by_hand():
    found = sync_metrics(*by_hand())
    # Masked attribute tokens: 0 and 2 of the first sample (0 is visible), 1 of the second (it is not).
    assert found["words/precision"] == pytest.approx(100 * 1 / 3)
    # Masked tokens: 3, 1 and 2; visible attributes among them: 0 of the first sample.
    assert found["masked-words/precision"] == pytest.approx(100 * 1 / 6)
    assert found["masked-words/random"] == pytest.approx(100 * (3 / 5 * 2 + 1 / 3 * 1) / 6)
    assert found["masked-words/shuffled"] == pytest.approx(100 * 1 / (1 + 2 + 3))
    # Masked shares 3/5, 1/3, 1/2: expected visible ones over expected attribute ones.
    assert found["words/random"] == pytest.approx(100 * (3 / 5 * 2 + 1 / 3 * 1) / (3 / 5 * 4 + 1 / 3 * 2))
    # Partners' masks: ".x..." on the first (1: visible), "xx." on the second (1: not visible), "x.xx" on the third.
    assert found["words/shuffled"] == pytest.approx(100 * 1 / 2)
    # First: visible 3, 1 against hidden 2, 1: pairs 1, 1, 0, 1/2. Second: 2 against 2: 1/2.
    assert found["words/auc"] == pytest.approx(100 * (2.5 / 4 + 0.5) / 2)
    # First with scores 9 2 2 9 2: visible 9, 2 against 2, 2: 1, 1, 1/2, 1/2. Second with 4 3 2: 2 against 3: 0.
    assert found["words/auc/shuffled"] == pytest.approx(100 * (3 / 4 + 0) / 2)
    assert found["patches/precision"] == pytest.approx(100 * (1 + 1 + 0) / 6)
    assert found["patches-any-attribute/precision"] == pytest.approx(100 * (2 + 1 + 0) / 6)
    assert found["patches/random"] == pytest.approx(100 * (1 + 0.5 + 0) / 6)
    assert found["patches-any-attribute/random"] == pytest.approx(100 * (1.5 + 0.5 + 0) / 6)
    assert found["patches/shuffled"] == pytest.approx(100 * (0 + 0 + 0) / 6)
    assert found["patches-any-attribute/shuffled"] == pytest.approx(100 * (1 + 0 + 0) / 6)


def test_random_rates():
    """They are the mean precision of drawn masks."""
    rng = np.random.default_rng(4)
    truths, masks = [], []
    for _ in range(30):
        m = int(rng.integers(3, 20))
        attribute = rng.random(m) < 0.6
        truths.append(
            MaskTruth(attribute, attribute & (rng.random(m) < 0.5), rng.random(16) < 0.2, rng.random(16) < 0.6)
        )
        masks.append(
            SampleMask(
                rng.permutation(np.arange(m) < max(1, m // 4)),
                rng.permutation(np.arange(16) < 5),
                rng.random(m),
                NO_SCORE,
            )
        )
    expected = sync_metrics(truths, masks, np.arange(30))
    drawn: dict[str, list[float]] = {}
    for _ in range(150):
        random = [
            SampleMask(rng.permutation(m.token_mask), rng.permutation(m.patch_mask), m.token_score, NO_SCORE)
            for m in masks
        ]
        found = sync_metrics(truths, random, np.arange(30))
        for name in ("words", "patches", "patches-any-attribute"):
            drawn.setdefault(name, []).append(found[f"{name}/precision"])
            assert found[f"{name}/random"] == pytest.approx(expected[f"{name}/random"])
    for name, values in drawn.items():
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - expected[f"{name}/random"]) < 5 * error + 0.3, (
            name
        )  # 0.3: a mean of ratios, not a ratio of means


def test_perfect_masks():
    """Masks of exactly the visible attribute tokens and patches reach 100 %."""
    truths = [truth for truth in by_hand()[0] if truth.visible.any()]
    masks = [SampleMask(t.visible, t.patches, t.visible.astype(float), NO_SCORE) for t in truths]
    found = sync_metrics(truths, masks, np.array([1, 0]))
    names = ("words/precision", "masked-words/precision", "words/auc", "patches/precision")
    assert [found[name] for name in names] == [100, 100, 100, 100]
    assert found["patches/random"] < 100


def test_auc_of_perfect_and_reversed_scores():
    truths, masks, partner = by_hand()
    for sign, auc in ((1.0, 100.0), (-1.0, 0.0)):
        scored = [m._replace(token_score=sign * t.visible.astype(float)) for t, m in zip(truths, masks, strict=True)]
        assert sync_metrics(truths, scored, partner)["words/auc"] == auc


def test_nothing_to_measure():
    found = sync_metrics(by_hand()[0][2:], by_hand()[1][2:], np.array([0]))
    assert math.isnan(found["words/precision"])
    assert math.isnan(found["words/auc"])
    assert found["patches/precision"] == 0
