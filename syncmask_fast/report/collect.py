"""Collect what a run's report shows: masks on images and words, and retrieval with right and wrong answers."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

import syncmask_fast
from syncmask_fast.config import to_json
from syncmask_fast.data.images import decode_image
from syncmask_fast.data.splits import Split
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.masking import random_masks
from syncmask_fast.report.report import MaskExample, RetrievalExample, RetrievedItem, WordMark, write_report
from syncmask_fast.tasks.mask_quality import mask_truth, teacher_masks
from syncmask_fast.tasks.retrieval import encode_split

SHOWN, ANSWERS = 12, 5


def write_run_report(out: Path, model: SyncMaskModel, split: Split, results: dict[str, float]) -> Path:
    """Write report.html into a run's folder from its config, metrics and results, and new examples; return its path."""
    masks: list[MaskExample] = []
    retrieval: list[RetrievalExample] = []
    config, metrics = model.config, out / "metrics.jsonl"
    if len(split):
        tokens = split.tokens(model.tokenizer, config.text.max_length)
        masks, retrieval = mask_examples(model, split, tokens), retrieval_examples(model, split, tokens)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    versions = (syncmask_fast.__version__, torch.__version__, platform.python_version())
    write_report(
        out / "report.html",
        title=f"SyncMask: {out.name}",
        config=to_json(config),
        metrics=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [],
        results=results,
        masks=masks,
        retrieval=retrieval,
        summary={
            "about": f"{millions:.1f} M parameters, pretrained on {config.data} with {config.masking} masks.",
            "command": f"python -m syncmask_fast.train {config.preset} --data {config.data} --out {out}"
            f" --seed {config.seed}",
            "versions": "syncmask_fast {}, PyTorch {}, Python {}".format(*versions),
            "device": str(model.device),
            "finished": time.strftime("%Y-%m-%d %H:%M"),
        },
    )
    return out / "report.html"


def mask_examples(model: SyncMaskModel, split: Split, tokens: TokenCache, shown: int = SHOWN) -> list[MaskExample]:
    """Return samples of different products and, in turn, different views, with their random and their sync masks."""
    config = model.config
    size, grid = config.image.size, config.image.size // config.image.patch
    samples = diverse_samples(split, shown)
    [sync] = teacher_masks(model, split, tokens, samples, [config.mask])
    layout = PackedLayout.of(tokens.lengths[samples].tolist())
    drawn = random_masks(layout, grid * grid, config.mask, torch.Generator().manual_seed(config.seed))
    examples = []
    for row, (sample, mask) in enumerate(zip(samples, sync, strict=True)):
        record, spans = split.index.record(sample), tokens.spans(sample)[1:-1]
        attributes = record.get("attributes") or []
        height, width = decode_image(split.index.image_bytes(sample)).shape[:2]
        scale = np.array([size / width, size / height] * 2)
        truth = mask_truth(spans, attributes, width, height, grid)
        hidden = drawn.token_mask[row, 1 : 1 + len(spans)].tolist()
        words = [
            WordMark(int(begin), int(end), shows(attributes, begin, end), random, bool(mask.token_mask[i]), score)
            for i, ((begin, end), random, score) in enumerate(
                zip(spans, hidden, mask.token_score.tolist(), strict=True)
            )
        ]
        examples.append(
            MaskExample(
                image=decode_image(split.index.image_bytes(sample), size),
                text=record["text"],
                words=words,
                grid=grid,
                random=drawn.patch_mask[row].numpy(),
                sync=mask.patch_mask,
                score=mask.patch_score,
                boxes=[
                    (item.get("value", item.get("name", "")), tuple(np.array(item["box"]) * scale))
                    for item in attributes
                    if item.get("box")
                ],
                named=truth.patches_any_attribute,
                detail=truth.patches,
                view=record.get("view", ""),
                product=str(split.index.product_ids[sample]),
            )
        )
    return examples


def retrieval_examples(
    model: SyncMaskModel, split: Split, tokens: TokenCache, shown: int = SHOWN
) -> list[RetrievalExample]:
    """Return queries among the whole evaluation set: half from text to image, half from image to text."""
    gallery, samples = encode_split(model, split, tokens)
    product = gallery.product_index.cpu().numpy()
    first = np.unique(product, return_index=True)[1]  # the image whose text is the product's
    rng, size = np.random.default_rng(model.config.seed), model.config.image.size

    def image(i: int) -> np.ndarray:
        return decode_image(split.index.image_bytes(samples[i]), size)

    def text(i: int) -> str:
        return split.index.texts[samples[first[i]]]

    examples = []
    for query in rng.permutation(len(first))[: shown // 2]:
        score = (gallery.images @ gallery.texts[query]).cpu().numpy()
        best = score.argsort()[::-1]
        right = product[best] == query
        found = zip(best[:ANSWERS], right, strict=False)
        items = [RetrievedItem(image(i), None, float(score[i]), bool(correct)) for i, correct in found]
        examples.append(RetrievalExample(text(query), items, 1 + int(right.argmax())))
    for query in rng.permutation(len(product))[: shown - shown // 2]:
        score = (gallery.texts @ gallery.images[query]).cpu().numpy()
        best = score.argsort()[::-1]
        right = best == product[query]
        found = zip(best[:ANSWERS], right, strict=False)
        items = [RetrievedItem(None, text(i), float(score[i]), bool(correct)) for i, correct in found]
        examples.append(RetrievalExample(image(query), items, 1 + int(right.argmax())))
    return examples


def diverse_samples(split: Split, shown: int) -> np.ndarray:
    """Return sample ids of different products whose views take turns."""
    views, ids = split.index.view.codes[split.samples], split.index.product_ids[split.samples]
    order = np.random.default_rng(0).permutation(len(split))
    kinds = np.unique(views)
    chosen: list[int] = []
    for turn in range(shown):
        fits = [i for i in order if views[i] == kinds[turn % len(kinds)] and ids[i] not in ids[chosen]]
        chosen += fits[:1]
    return split.samples[chosen]


def shows(attributes: list[dict], begin: int, end: int) -> bool | None:
    """Tell whether the view shows the attribute that these characters name; None where they name none."""
    boxes = [item.get("box") for item in attributes if item["span"][0] < end and item["span"][1] > begin]
    return any(box is not None for box in boxes) if boxes else None
