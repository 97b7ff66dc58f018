"""What a run's report shows: masks on pictures and words, and retrieval with right and wrong answers."""

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
from syncmask_fast.report import MaskExample, RetrievalExample, RetrievedItem, WordMark, write_report
from syncmask_fast.tasks.mask_quality import teacher_masks
from syncmask_fast.tasks.retrieval import encode_split

SHOWN = 12
ANSWERS = 5


def write_run_report(out: Path, model: SyncMaskModel, split: Split, results: dict[str, float]) -> Path:
    """Writes report.html into a run's folder from its config, metrics and results, with fresh examples; returns its path."""
    masks: list[MaskExample] = []
    retrieval: list[RetrievalExample] = []
    if len(split):
        tokens = TokenCache.open(split.index.folder, model.tokenizer, split.index.texts, model.config.text.max_length)
        masks = mask_examples(model, split, tokens)
        retrieval = retrieval_examples(model, split, tokens)
    config = model.config
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").is_file() else []
    summary = {
        "about": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, pretrained on {config.data} with {config.masking} masks.",
        "command": f"python -m syncmask_fast.train {config.preset} --data {config.data} --out {out} --seed {config.seed}",
        "versions": f"syncmask_fast {syncmask_fast.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
        "device": str(model.device),
        "finished": time.strftime("%Y-%m-%d %H:%M"),
    }
    write_report(
        out / "report.html",
        title=f"SyncMask: {out.name}",
        config=to_json(config),
        metrics=[json.loads(line) for line in lines],
        results=results,
        masks=masks,
        retrieval=retrieval,
        summary=summary,
    )
    return out / "report.html"


def mask_examples(model: SyncMaskModel, split: Split, tokens: TokenCache, shown: int = SHOWN) -> list[MaskExample]:
    """Samples of different products and, in turn, different views, with their random and their sync masks."""
    config = model.config
    size, grid = config.image.size, config.image.size // config.image.patch
    samples = _diverse_samples(split, shown)
    [found] = teacher_masks(model, split, tokens, samples, [config.mask])
    layout = PackedLayout.of(tokens.lengths[samples].tolist())
    drawn = random_masks(layout, grid * grid, config.mask, torch.Generator().manual_seed(config.seed))
    examples = []
    for row, (i, mask) in enumerate(zip(samples, found, strict=True)):
        record = split.index.record(i)
        attributes = record.get("attributes") or []
        picture = decode_image(split.index.image_bytes(i))
        scale = np.array([size / picture.shape[1], size / picture.shape[0]] * 2)
        boxes = [
            (item.get("value", item.get("name", "")), tuple(np.array(item["box"]) * scale))
            for item in attributes
            if item.get("box")
        ]
        words = [
            WordMark(
                record["text"][begin:end],
                int(begin),
                int(end),
                True,
                _visible(attributes, begin, end),
                bool(drawn.token_mask[row, place + 1]),
                bool(mask.token_mask[place]),
                float(mask.token_score[place]),
            )
            for place, (begin, end) in enumerate(tokens.spans(i)[1:-1])
        ]
        examples.append(
            MaskExample(
                decode_image(split.index.image_bytes(i), size),
                record["text"],
                words,
                grid,
                drawn.patch_mask[row].numpy(),
                mask.patch_mask,
                mask.patch_score,
                boxes,
                record.get("view", ""),
                str(split.index.product_ids[i]),
            )
        )
    return examples


def retrieval_examples(
    model: SyncMaskModel, split: Split, tokens: TokenCache, shown: int = SHOWN
) -> list[RetrievalExample]:
    """Half of them from text to image, half from image to text, among the whole evaluation set."""
    gallery, place = encode_split(model, split, tokens)
    product = gallery.product_index.cpu().numpy()
    size = model.config.image.size
    first = np.unique(product, return_index=True)[1]
    rng = np.random.default_rng(model.config.seed)
    examples = []
    for query in rng.permutation(len(first))[: shown // 2]:
        score = (gallery.images @ gallery.texts[query]).cpu().numpy()
        best = score.argsort()[::-1]
        items = [
            RetrievedItem(
                decode_image(split.index.image_bytes(place[j]), size), None, float(score[j]), bool(product[j] == query)
            )
            for j in best[:ANSWERS]
        ]
        examples.append(
            RetrievalExample(
                "t2i", split.index.texts[place[first[query]]], None, items, 1 + int((product[best] == query).argmax())
            )
        )
    for query in rng.permutation(len(product))[: shown - shown // 2]:
        score = (gallery.texts @ gallery.images[query]).cpu().numpy()
        best = score.argsort()[::-1]
        items = [
            RetrievedItem(None, split.index.texts[place[first[j]]], float(score[j]), bool(j == product[query]))
            for j in best[:ANSWERS]
        ]
        picture = decode_image(split.index.image_bytes(place[query]), size)
        examples.append(RetrievalExample("i2t", None, picture, items, 1 + int((best == product[query]).argmax())))
    return examples


def _diverse_samples(split: Split, shown: int) -> np.ndarray:
    """Sample numbers of different products whose views take turns."""
    views, ids = split.index.view.codes[split.samples], split.index.product_ids[split.samples]
    order = np.random.default_rng(0).permutation(len(split))
    kinds = np.unique(views)
    chosen: list[int] = []
    for turn in range(shown):
        fits = [j for j in order if views[j] == kinds[turn % len(kinds)] and ids[j] not in ids[chosen]]
        if fits:
            chosen.append(fits[0])
    return split.samples[chosen]


def _visible(attributes: list[dict], begin: int, end: int) -> bool | None:
    """Whether the view shows the attribute that these characters name; None where they name none."""
    boxes = [item.get("box") for item in attributes if item["span"][0] < end and item["span"][1] > begin]
    return any(box is not None for box in boxes) if boxes else None
