"""Are masks where both modalities agree? Precision against drawn truth, next to random and shuffled masks.

A shuffled mask is that of another sample of the same view with about as many maskable tokens. It keeps all that
position and word statistics explain: only what exceeds it is synchrony.
N samples; m maskable tokens of a sample, which differ from sample to sample; P patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from syncmask_fast.config import MaskConfig
from syncmask_fast.data.images import check_image
from syncmask_fast.data.splits import Split
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.masking import Masks, num_masked, sync_masks
from syncmask_fast.ops import PATCH_SCORES, TOKEN_SCORES
from syncmask_fast.tasks.base import evaluation_batches
from syncmask_fast.utils.errors import UserError

# Attributes whose box covers less of the image than this have a place. On larger ones every patch of the garment hits.
PLACE_AREA = 0.2


# Truth -------------------------------------------------------------------------------------------------------------


class MaskTruth(NamedTuple):
    """What one sample's image shows of its text."""

    attribute: np.ndarray
    """bool [m]: tokens of words that name an attribute."""
    visible: np.ndarray
    """bool [m]: those of them whose attribute this view shows."""
    patches: np.ndarray
    """bool [P]: patches on a mentioned and visible attribute that has a place (PLACE_AREA)."""
    patches_any_attribute: np.ndarray
    """bool [P]: patches on any mentioned and visible attribute: a color or a material covers the whole garment."""


def mask_truth(spans: np.ndarray, attributes: Sequence[dict], width: int, height: int, grid: int) -> MaskTruth:
    """Return the truth of a sample.

    spans: int [m, 2], the characters of each maskable token. grid: patches per side.
    attributes: the record's, with "span" and "box" (pixels of the stored image of width x height).
    A patch is on a box if they share half of the smaller one's width and half of the smaller one's height.
    """
    attribute, visible = np.zeros(len(spans), bool), np.zeros(len(spans), bool)
    patches, patches_any_attribute = np.zeros((2, grid * grid), bool)
    edges = np.arange(grid + 1)
    for item in attributes:
        begin, end = item["span"]
        # A token belongs to an attribute if they share a character.
        named = (spans[:, 0] < end) & (spans[:, 1] > begin)
        attribute |= named
        if item.get("box") is None:  # this view does not show it
            continue
        visible |= named
        box = np.asarray(item["box"], float) * grid / [width, height, width, height]  # in patches
        shared = [np.minimum(edges[1:], box[axis + 2]) - np.maximum(edges[:-1], box[axis]) for axis in (0, 1)]
        sides = box[2:] - box[:2]
        half = 0.5 - 1e-6  # a box midway between two patches is on both, despite rounding
        across, down = (part.clip(0) >= half * min(1.0, side) for part, side in zip(shared, sides, strict=True))
        on = np.outer(down, across).ravel() & (sides.prod() > 0)
        patches_any_attribute |= on
        if sides.prod() < PLACE_AREA * grid * grid:
            patches |= on
    return MaskTruth(attribute, visible, patches, patches_any_attribute)


def shuffled_partners(tokens: np.ndarray, views: np.ndarray, products: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return for each sample another one of the same view and about as many maskable tokens, int64 [N].

    tokens: int [N], the number of maskable tokens. The partner shows another product wherever the view has one.
    """
    n = len(tokens)
    order = np.lexsort((np.random.default_rng(seed).permutation(n), tokens, views))
    partner = np.arange(n)
    for view in np.unique(views):
        run = order[views[order] == view]
        for place, sample in enumerate(run):
            near = np.delete(run, place)[max(0, place - 8) : place + 8]  # sorted by tokens, so neighbors are similar
            others = near[products[near] != products[sample]]
            difference = np.abs(tokens[others].astype(int) - int(tokens[sample]))
            partner[sample] = others[difference.argmin()] if len(others) else run[(place + 1) % len(run)]
    return partner


@dataclass(frozen=True)
class MaskEvalSet:
    """Samples with drawn truth, ready to be compared with masks."""

    split: Split
    tokens: TokenCache
    samples: np.ndarray
    """int64 [N], sample ids."""
    truths: list[MaskTruth]
    partner: np.ndarray
    """int64 [N], rows: the sample that lends each its shuffled mask."""

    @classmethod
    def of(cls, split: Split, tokens: TokenCache, grid: int, limit: int | None = None) -> MaskEvalSet | None:
        """Return the split's samples, or `limit` random ones, with their truth; None if no record has attributes."""
        samples = split.samples
        if limit is not None and limit < len(samples):
            samples = np.sort(np.random.default_rng(0).permutation(samples)[:limit])
        attributes = [split.index.record(i).get("attributes") or [] for i in samples]
        if not any(attributes):
            return None
        truths = []
        for i, items in zip(samples, attributes, strict=True):
            truths.append(mask_truth(tokens.spans(i)[1:-1], items, *check_image(split.index.image_bytes(i)), grid))
        views, products = split.index.view.codes[samples], split.index.product_ids[samples]
        return cls(split, tokens, samples, truths, shuffled_partners(tokens.lengths[samples], views, products))


# Masks -------------------------------------------------------------------------------------------------------------


class SampleMask(NamedTuple):
    """One sample's masks with their scores."""

    token_mask: np.ndarray
    """bool [m]."""
    patch_mask: np.ndarray
    """bool [P]."""
    token_score: np.ndarray
    """float32 [m]."""
    patch_score: np.ndarray
    """float32 [P]."""


@torch.inference_mode()
def teacher_masks(
    model: SyncMaskModel, split: Split, tokens: TokenCache, sample_ids: np.ndarray, configs: Sequence[MaskConfig]
) -> list[list[SampleMask]]:
    """Return the masks that each configuration gives to each sample: [configuration][sample].

    errors: UserError if an image cannot be read.
    """
    masks: list[dict[int, SampleMask]] = [{} for _ in configs]
    for batch in evaluation_batches(model, split, tokens, sample_ids):
        layout = PackedLayout.of_batch(batch)
        images, text = model.image(batch.pixels), model.text(batch.token_ids, layout)
        for config, by_sample in zip(configs, masks, strict=True):
            samples = _split_masks(sync_masks(model, images, text, layout, config), batch.lengths)
            by_sample.update(zip(batch.sample_ids_host.tolist(), samples, strict=True))
    lost = [int(i) for i in sample_ids if i not in masks[0]]
    if lost:
        raise UserError(f"{split.index.folder} has unreadable images, such as sample {lost[0]}. Repair or remove them.")
    return [[by_sample[int(i)] for i in sample_ids] for by_sample in masks]


def _split_masks(masks: Masks, lengths: list[int]) -> list[SampleMask]:
    """Return the masks of each sample, without [CLS], [SEP] and padding."""
    tokens, patches, token_score, patch_score = (x.cpu().numpy() for x in masks)
    return [
        SampleMask(tokens[i, 1 : n - 1], patches[i], token_score[i, 1 : n - 1], patch_score[i])
        for i, n in enumerate(lengths)
    ]


# Metrics -----------------------------------------------------------------------------------------------------------


def sync_metrics(truths: Sequence[MaskTruth], masks: Sequence[SampleMask], partner: np.ndarray) -> dict[str, float]:
    """Return the measures of N samples in percent, pooled over samples (AUC: the mean over samples).

    words/precision:        share of masked attribute tokens that the view shows.
    masked-words/precision: share of all masked tokens that name an attribute which the view shows.
    words/auc:              chance that a visible attribute token scores above an invisible one of its sample.
    patches/precision:      share of masked patches on a mentioned and visible attribute that has a place.
    patches-any-attribute/precision: the same with attributes of the whole garment (color, material, category).
    Each has `random`, the expectation for random masks of the same size, and `shuffled`. AUC: 50 is chance.
    """
    tokens = [m.token_mask for m in masks]
    attribute, visible = [t.attribute for t in truths], [t.visible for t in truths]
    shuffled = [_resize_mask(tokens[j], len(t.attribute)) for j, t in zip(partner, truths, strict=True)]
    results = _precision("words", tokens, shuffled, visible, attribute)
    results |= _precision("masked-words", tokens, shuffled, visible, [np.ones_like(mask) for mask in tokens])
    results["words/auc"] = _mean_auc(truths, [m.token_score for m in masks])
    shuffled_scores = [np.resize(masks[j].token_score, len(t.visible)) for j, t in zip(partner, truths, strict=True)]
    results["words/auc/shuffled"] = _mean_auc(truths, shuffled_scores)
    patches = [m.patch_mask for m in masks]
    shuffled, everywhere = [patches[j] for j in partner], [np.ones_like(mask) for mask in patches]
    for name, target in (
        ("patches", [t.patches for t in truths]),
        ("patches-any-attribute", [t.patches_any_attribute for t in truths]),
    ):
        results |= _precision(name, patches, shuffled, target, everywhere)
    return results


Bools = list[np.ndarray]


def _precision(name: str, masks: Bools, shuffled: Bools, target: Bools, among: Bools) -> dict[str, float]:
    """Return the shares of masked elements of `among` that are on `target`, its subset; NaN without any."""
    # A random mask of the same size masks each element with this probability.
    random = [np.full(len(mask), mask.mean() if len(mask) else 0.0) for mask in masks]
    results = {}
    for kind, weights in (("precision", masks), ("random", random), ("shuffled", shuffled)):
        hits = sum((weight * on).sum() for weight, on in zip(weights, target, strict=True))
        total = sum((weight * on).sum() for weight, on in zip(weights, among, strict=True))
        results[f"{name}/{kind}"] = float(100 * hits / total) if total else float("nan")
    return results


def _resize_mask(mask: np.ndarray, length: int) -> np.ndarray:
    """Return a mask cut, or filled with False, to another length."""
    resized = np.zeros(length, bool)
    resized[: len(mask)] = mask[:length]
    return resized


def _mean_auc(truths: Sequence[MaskTruth], scores: Sequence[np.ndarray]) -> float:
    """Return the mean AUC in percent of the samples with visible and invisible attribute tokens; NaN without any."""
    values = []
    for truth, score in zip(truths, scores, strict=True):
        shown, hidden = score[truth.visible], score[truth.attribute & ~truth.visible]
        if len(shown) and len(hidden):
            above = shown[:, None] - hidden
            values.append((above > 0).mean() + 0.5 * (above == 0).mean())
    return float(100 * np.mean(values)) if values else float("nan")


# Evaluation --------------------------------------------------------------------------------------------------------


def evaluate_sync(model: SyncMaskModel, data: MaskEvalSet) -> dict[str, float]:
    """Return the synchrony of the model's masks in percent, by name."""
    [masks] = teacher_masks(model, data.split, data.tokens, data.samples, [model.config.mask])
    return {f"sync/{name}": value for name, value in sync_metrics(data.truths, masks, data.partner).items()}


def compare_score_rules(model: SyncMaskModel, data: MaskEvalSet) -> list[dict[str, float | str | int]]:
    """Return the synchrony of every token and patch rule in every fusion layer, a row per layer and pair of rules."""
    # Token and patch rules are independent, so pairing them off covers all.
    rules = [
        dataclasses.replace(model.config.mask, layer=layer, token_score=token_score, patch_score=patch_score)
        for layer in range(1, model.config.text.fusion_layers + 1)
        for token_score, patch_score in zip(TOKEN_SCORES, PATCH_SCORES, strict=True)
    ]
    rows = []
    for rule, masks in zip(rules, teacher_masks(model, data.split, data.tokens, data.samples, rules), strict=True):
        metrics = sync_metrics(data.truths, masks, data.partner)
        rows.append({"layer": rule.layer, "token_score": rule.token_score, "patch_score": rule.patch_score, **metrics})
    return rows


@torch.inference_mode()
def evaluate_mlm_grounding(model: SyncMaskModel, data: MaskEvalSet) -> dict[str, float]:
    """Return the MLM loss (nats per token) at masked visible tokens, with the right image and a mismatched one.

    Of each text `token_ratio` of the tokens are masked, as in training, or all visible ones if these are fewer. The
    mismatched image is the partner's. The difference is what the model reads in images; the context explains the rest.
    """
    truths, rng = dict(zip(data.samples.tolist(), data.truths, strict=True)), np.random.default_rng(0)
    nll, masked = np.zeros(2), 0
    matched, mismatched = (
        evaluation_batches(model, data.split, data.tokens, sample_ids)
        for sample_ids in (data.samples, data.samples[data.partner])
    )
    for batch, other in zip(matched, mismatched, strict=True):
        if not torch.equal(batch.epoch_positions, other.epoch_positions):
            raise UserError(f"{data.split.index.folder} has unreadable images. Repair or remove them.")
        # 1. Draw the masked tokens among the visible ones; [CLS] is token 0.
        masks = []
        for sample, length in zip(batch.sample_ids_host.tolist(), batch.lengths, strict=True):
            visible = truths[sample].visible
            drawn = rng.permutation(np.flatnonzero(visible))[: num_masked(model.config.mask.token_ratio, len(visible))]
            masks.append(np.isin(np.arange(length), 1 + drawn))
        mask = torch.from_numpy(np.concatenate(masks)).to(model.device)
        rows = mask.nonzero()[:, 0]
        # 2. The loss of both images with the same masked text.
        layout = PackedLayout.of_batch(batch)
        text, pack = model.text(batch.token_ids.masked_fill(mask, model.mask_id), layout), one_to_one(layout)
        for number, pixels in enumerate((batch.pixels, other.pixels)):
            fused = model.fusion(text, pack, model.image(pixels))[rows]
            logits = model.mlm_head(fused, model.text.word_embeddings.weight).float()
            nll[number] += float(F.cross_entropy(logits, batch.token_ids[rows], reduction="sum"))
        masked += len(rows)
    names = ("mlm/visible-tokens/nll", "mlm/visible-tokens/nll-mismatched-image")
    return dict(zip(names, (nll / max(masked, 1)).tolist(), strict=True))
