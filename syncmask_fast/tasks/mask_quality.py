"""Do masks lie on what both modalities show? Measures against drawn truth, each beside two base rates: random masks, and shuffled ones.

A shuffled mask is the mask of another sample of the same view with as many maskable words: it keeps whatever position and word statistics explain, so
that only what exceeds it is synchrony.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Attributes whose box covers less of the picture than this have a place; on larger ones anything on the garment would be a hit.
PLACE_AREA = 0.2


class MaskTruth(NamedTuple):
    """What one sample's picture shows of its text: m maskable word pieces, P patches."""

    attribute: np.ndarray
    """bool [m]: pieces of words that name an attribute."""
    visible: np.ndarray
    """bool [m]: those of them whose attribute this view shows."""
    patches: np.ndarray
    """bool [P]: patches on an attribute that is mentioned, visible and has a place: its box covers less than a fifth of the picture."""
    any_patches: np.ndarray
    """bool [P]: patches on any attribute that is mentioned and visible: a colour or a material covers the whole garment."""


class SyncMask(NamedTuple):
    """One sample's masks and word scores."""

    words: np.ndarray
    """bool [m]."""
    patches: np.ndarray
    """bool [P]."""
    token_score: np.ndarray
    """float32 [m]."""
    patch_score: np.ndarray
    """float32 [P]."""


def truth(spans: np.ndarray, attributes: Sequence[dict], width: int, height: int, grid: int) -> MaskTruth:
    """The truth of a sample.

    spans:      int [m, 2], characters of each maskable word piece.
    attributes: the record's, with "span" and "box" (pixels of the stored image of width x height).
    grid:       patches per side.
    A patch lies on a box where they share half of the smaller one's width and half of the smaller one's height.
    """
    attribute, visible = np.zeros(len(spans), bool), np.zeros(len(spans), bool)
    patches, any_patches = np.zeros((2, grid * grid), bool)
    edges = np.arange(grid + 1)
    for item in attributes:
        begin, end = item["span"]
        named = (spans[:, 0] < end) & (spans[:, 1] > begin)
        attribute |= named
        box = item.get("box")
        if box is None:
            continue
        visible |= named
        x0, x1 = np.asarray(box[0::2], float) * grid / width
        y0, y1 = np.asarray(box[1::2], float) * grid / height
        across = np.clip(np.minimum(edges[1:], x1) - np.maximum(edges[:-1], x0), 0, None)
        down = np.clip(np.minimum(edges[1:], y1) - np.maximum(edges[:-1], y0), 0, None)
        area = (x1 - x0) * (y1 - y0)
        half = 0.5 - 1e-6  # so that a box right between two patches lies on both, however its numbers round
        on = np.outer(down >= half * min(1.0, y1 - y0), across >= half * min(1.0, x1 - x0)).ravel() & (area > 0)
        any_patches |= on
        if area < PLACE_AREA * grid * grid:
            patches |= on
    return MaskTruth(attribute, visible, patches, any_patches)


def partners(words: np.ndarray, views: np.ndarray, products: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each sample another one of the same view and, as nearly as there is one, the same number of maskable words: int64 [N].

    It shows another product wherever the view has one.
    """
    n = len(words)
    order = np.lexsort((np.random.default_rng(seed).permutation(n), words, views))
    partner = np.arange(n)
    for view in np.unique(views):
        run = order[views[order] == view]
        for place, sample in enumerate(run):
            near = np.delete(run, place)[max(0, place - 8) : place + 8]
            others = sorted(
                near[products[near] != products[sample]], key=lambda j: abs(int(words[j]) - int(words[sample]))
            )
            partner[sample] = others[0] if others else run[(place + 1) % len(run)]
    return partner


def sync_metrics(truths: Sequence[MaskTruth], masks: Sequence[SyncMask], partner: np.ndarray) -> dict[str, float]:
    """The measures of a set of samples, in percent, pooled over samples (AUC: the mean of the samples that have both kinds of word).

    words/precision:   share of masked attribute words that the view shows.
    all-words/precision: share of all masked words that name an attribute which the view shows.
    words/auc:         chance that a visible attribute word scores higher than an invisible one of the same sample; 50 is chance.
    patches/precision: share of masked patches on a mentioned and visible attribute that has a place.
    any-patches/precision: the same with attributes of the whole garment (colour, material, category), which most patches lie on.
    Each has `random`, the expectation for random masks of the same size, and `shuffled`.
    """
    results: dict[str, float] = {}
    fit = [_fit(masks[j].words, len(t.attribute)) for j, t in zip(partner, truths, strict=True)]
    share = [m.words.mean() if len(m.words) else 0.0 for m in masks]
    results["words/precision"] = _percent(
        (m.words & t.visible, m.words & t.attribute) for t, m in zip(truths, masks, strict=True)
    )
    results["words/random"] = _percent((s * t.visible, s * t.attribute) for t, s in zip(truths, share, strict=True))
    results["words/shuffled"] = _percent((f & t.visible, f & t.attribute) for t, f in zip(truths, fit, strict=True))
    results["all-words/precision"] = _percent(
        (m.words & t.visible, m.words) for t, m in zip(truths, masks, strict=True)
    )
    results["all-words/random"] = _percent(
        (s * t.visible, m.words) for t, m, s in zip(truths, masks, share, strict=True)
    )
    results["all-words/shuffled"] = _percent((f & t.visible, f) for t, f in zip(truths, fit, strict=True))
    results["words/auc"] = _mean_auc(truths, [m.token_score for m in masks])
    results["words/auc/shuffled"] = _mean_auc(
        truths, [np.resize(masks[j].token_score, len(t.attribute)) for j, t in zip(partner, truths, strict=True)]
    )
    for name in ("patches", "any-patches"):
        on = [getattr(t, name.replace("-", "_")) for t in truths]
        results[f"{name}/precision"] = _percent((m.patches & o, m.patches) for o, m in zip(on, masks, strict=True))
        results[f"{name}/random"] = _percent((m.patches.mean() * o, m.patches) for o, m in zip(on, masks, strict=True))
        results[f"{name}/shuffled"] = _percent(
            (masks[j].patches & o, masks[j].patches) for o, j in zip(on, partner, strict=True)
        )
    return results


def _percent(parts) -> float:
    """100 * the sum of all first parts / the sum of all second parts; NaN where there is nothing."""
    top, bottom = np.sum([(a.sum(), b.sum()) for a, b in parts] or [(0, 0)], axis=0)
    return float(100 * top / bottom) if bottom else float("nan")


def _fit(mask: np.ndarray, length: int) -> np.ndarray:
    """A mask cut or filled up with False to another length."""
    out = np.zeros(length, bool)
    out[: len(mask)] = mask[:length]
    return out


def _mean_auc(truths: Sequence[MaskTruth], scores: Sequence[np.ndarray]) -> float:
    values = []
    for t, score in zip(truths, scores, strict=True):
        shown, hidden = score[t.visible], score[t.attribute & ~t.visible]
        if len(shown) and len(hidden):
            above = shown[:, None] - hidden
            values.append((above > 0).mean() + 0.5 * (above == 0).mean())
    return float(100 * np.mean(values)) if values else float("nan")
