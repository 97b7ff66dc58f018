"""The measures of synchrony on samples made by hand, and their base rates against drawn masks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from syncmask_fast.tasks.mask_quality import MaskTruth, SyncMask, partners, sync_metrics, truth

#            0         1         2         3
#            0123456789012345678901234567890123456789
TEXT = "a red dress with a star and a zip"
SPANS = np.array(
    [[0, 1], [2, 5], [6, 11], [12, 16], [17, 18], [19, 21], [21, 23], [24, 27], [28, 29], [30, 33]]
)  # "star" in two pieces

NO_SCORE = np.zeros(0)  # patch scores are for the report alone


def item(name: str, box: list[float] | None) -> dict:
    begin = TEXT.index(name)
    return {"name": name, "span": [begin, begin + len(name)], "box": box}


def bools(text: str) -> np.ndarray:
    return np.array([c == "x" for c in text.replace(" ", "")])


def test_truth_of_words_and_patches():
    """A picture 80 wide and 40 high, 4 x 4 patches of 20 x 10 pixels."""
    attributes = [item("red", [0, 0, 80, 40]), item("star", [20, 10, 40, 20]), item("zip", None)]
    found = truth(SPANS, attributes, 80, 40, 4)
    assert found.attribute.tolist() == bools(".x...xx..x").tolist()
    assert found.visible.tolist() == bools(".x...xx...").tolist()
    assert found.patches.tolist() == bools(".... .x.. .... ....").tolist()  # the colour is everywhere and has no place
    assert found.any_patches.all()


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
def test_which_patches_a_box_covers(box: list[float], patches: str):
    found = truth(SPANS, [item("star", box)], 80, 40, 4)
    assert found.any_patches.tolist() == bools(patches).tolist()
    assert found.patches.tolist() == bools(patches).tolist()


def test_where_a_place_ends():
    """A box has a place if it covers less than a fifth of the picture."""
    for width, has_place in ((19.0, True), (21.0, False)):
        found = truth(SPANS, [item("star", [0, 0, width, 100])], 100, 100, 10)
        assert found.patches.any() == has_place
        assert found.any_patches.any()


def test_sample_without_words_or_attributes():
    found = truth(np.zeros((0, 2), np.int64), [], 40, 40, 3)
    assert found.attribute.shape == found.visible.shape == (0,)
    assert not found.any_patches.any()
    assert len(found.patches) == 9


def test_partners_are_of_the_same_view_and_another_product():
    rng = np.random.default_rng(0)
    products = np.repeat(np.arange(40), 3)
    views = np.tile(np.arange(3), 40)
    words = rng.integers(5, 30, 40).repeat(3)
    partner = partners(words, views, products)
    assert (views[partner] == views).all()
    assert (products[partner] != products).all()
    # As many words, as nearly as possible: in each view the neighbours in order of words differ by little.
    assert np.abs(words[partner] - words).max() <= np.diff(np.sort(words[::3])).max() * 2
    assert np.abs(words[partner] - words).mean() < np.abs(rng.permutation(words) - words).mean() / 4
    assert partners(words, views, products).tolist() == partner.tolist()


def test_partners_where_there_is_no_choice():
    partner = partners(np.array([4, 4, 9]), np.array([0, 0, 1]), np.array([7, 7, 8]))
    assert partner.tolist() == [1, 0, 2]  # one product in the view; one sample in the view


def by_hand() -> tuple[list[MaskTruth], list[SyncMask], np.ndarray]:
    truths = [
        MaskTruth(bools("xxx.x"), bools("xx..."), bools("xx.."), bools("xxx.")),
        MaskTruth(bools(".xx"), bools("..x"), bools("...x"), bools("...x")),
        MaskTruth(bools("...."), bools("...."), bools("...."), bools("....")),
    ]
    masks = [
        SyncMask(bools("x.xx."), bools("x.x."), np.array([3.0, 1, 2, 9, 1]), NO_SCORE),
        SyncMask(bools(".x."), bools("..xx"), np.array([9.0, 2, 2]), NO_SCORE),
        SyncMask(bools("xx.."), bools("xx.."), np.array([4.0, 3, 2, 1]), NO_SCORE),
    ]
    return truths, masks, np.array([1, 2, 0])


def test_metrics_by_hand():
    found = sync_metrics(*by_hand())
    # Masked attribute words: 0 and 2 of the first sample (0 is visible), 1 of the second (it is not).
    assert found["words/precision"] == pytest.approx(100 * 1 / 3)
    # Masked words: 3, 1 and 2; visible attributes among them: 0.
    assert found["all-words/precision"] == pytest.approx(100 * 1 / 6)
    assert found["all-words/random"] == pytest.approx(100 * (3 / 5 * 2 + 1 / 3 * 1) / 6)
    assert found["all-words/shuffled"] == pytest.approx(100 * 1 / (1 + 2 + 3))
    # Masked shares 3/5, 1/3, 1/2: expected visible ones over expected attribute ones.
    assert found["words/random"] == pytest.approx(100 * (3 / 5 * 2 + 1 / 3 * 1) / (3 / 5 * 4 + 1 / 3 * 2))
    # Partners' masks: ".x..." on the first (1: visible), "xx." on the second (1: not visible), "x.xx" on the third (no attribute).
    assert found["words/shuffled"] == pytest.approx(100 * 1 / 2)
    # First: visible 3, 1 against hidden 2, 1: pairs 1, 1, 0, 1/2. Second: 2 against 2: 1/2.
    assert found["words/auc"] == pytest.approx(100 * (2.5 / 4 + 0.5) / 2)
    # First with scores 9 2 2 9 2: visible 9, 2 against 2, 2: 1, 1, 1/2, 1/2. Second with 4 3 2: 2 against 3: 0.
    assert found["words/auc/shuffled"] == pytest.approx(100 * (3 / 4 + 0) / 2)
    assert found["patches/precision"] == pytest.approx(100 * (1 + 1 + 0) / 6)
    assert found["any-patches/precision"] == pytest.approx(100 * (2 + 1 + 0) / 6)
    assert found["patches/random"] == pytest.approx(100 * (1 + 0.5 + 0) / 6)
    assert found["any-patches/random"] == pytest.approx(100 * (1.5 + 0.5 + 0) / 6)
    assert found["patches/shuffled"] == pytest.approx(100 * (0 + 0 + 0) / 6)
    assert found["any-patches/shuffled"] == pytest.approx(100 * (1 + 0 + 0) / 6)


def test_random_rates_are_those_of_drawn_masks():
    rng = np.random.default_rng(4)
    truths, masks = [], []
    for _ in range(30):
        m = int(rng.integers(3, 20))
        attribute = rng.random(m) < 0.6
        truths.append(
            MaskTruth(attribute, attribute & (rng.random(m) < 0.5), rng.random(16) < 0.2, rng.random(16) < 0.6)
        )
        masks.append(
            SyncMask(
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
            SyncMask(rng.permutation(m.words), rng.permutation(m.patches), m.token_score, NO_SCORE) for m in masks
        ]
        found = sync_metrics(truths, random, np.arange(30))
        for name in ("words", "patches", "any-patches"):
            drawn.setdefault(name, []).append(found[f"{name}/precision"])
            assert found[f"{name}/random"] == pytest.approx(expected[f"{name}/random"])
    for name, values in drawn.items():
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - expected[f"{name}/random"]) < 5 * error + 0.3, (
            name
        )  # 0.3: a mean of ratios, not a ratio of means


def test_perfect_and_reversed_scores():
    truths, masks, partner = by_hand()
    for sign, auc in ((1.0, 100.0), (-1.0, 0.0)):
        scored = [m._replace(token_score=sign * t.visible.astype(float)) for t, m in zip(truths, masks, strict=True)]
        assert sync_metrics(truths, scored, partner)["words/auc"] == auc


def test_nothing_to_measure_is_nan():
    found = sync_metrics(by_hand()[0][2:], by_hand()[1][2:], np.array([0]))
    assert math.isnan(found["words/precision"])
    assert math.isnan(found["words/auc"])
    assert found["patches/precision"] == 0
