"""Evaluation of a trained model: `python -m syncmask_fast.evaluate retrieval|sync --model DIR --data PATH`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from syncmask_fast import retrieval, sync
from syncmask_fast.attention import Layout
from syncmask_fast.config import MaskConfig, TrainConfig
from syncmask_fast.data.images import check_image
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.splits import Split, open_evaluation
from syncmask_fast.data.text import TokenCache
from syncmask_fast.errors import UserError, run_command
from syncmask_fast.masking import Masks, sync_masks
from syncmask_fast.model import SyncMaskModel

BATCH = 128


def evaluation_batches(split: Split, tokens: TokenCache, config: TrainConfig, device: torch.device, order: np.ndarray) -> Iterator[Batch]:
    """Batches of whole images, not cropped, in the given order of sample numbers."""
    loader = Loader(
        split.index, tokens, batch_size=min(BATCH, max(len(order), 1)), size=config.image.size, augment=None, device=device,
        backend=config.loader, threads=config.threads,
    )  # fmt: skip
    with loader:
        yield from loader.epoch(order, 0)


@torch.inference_mode()
def embed(model: SyncMaskModel, split: Split, tokens: TokenCache) -> tuple[retrieval.Gallery, np.ndarray]:
    """The features of all images of a split and of the text of each product (its first one, where a product has several).

    Also returns the sample number of each image, int64 [N]: an image that cannot be read is not among them.
    """
    samples, images = [], []
    for batch in evaluation_batches(split, tokens, model.config, model.device, split.samples):
        samples.append(batch.samples.cpu().numpy())
        images.append(model.encode_image(batch.pixels))
    if not images:
        raise UserError(f"{split.index.folder} has no readable image to evaluate on.")
    at = np.concatenate(samples)
    _, first, product = np.unique(split.index.product_ids[at], return_index=True, return_inverse=True)
    texts = []
    for begin in range(0, len(first), BATCH):
        ids, starts = tokens.gather(at[first[begin : begin + BATCH]])
        layout = Layout.of(np.diff(starts).tolist(), model.device)
        texts.append(model.project_texts(model.text(torch.from_numpy(ids).to(model.device), layout), layout))
    group = split.index.subcategory.codes[at[first]]
    device = model.device
    product, group = torch.from_numpy(product).to(device), torch.from_numpy(group).to(device)
    return retrieval.Gallery(torch.cat(images), torch.cat(texts), product, group), at


def evaluate_retrieval(model: SyncMaskModel, split: Split, tokens: TokenCache) -> dict[str, float]:
    """Every retrieval metric in percent, by name; the 101-candidate ones only where there are 101 products."""
    gallery, _ = embed(model, split, tokens)
    results = {f"retrieval/{name}": value for name, value in retrieval.full_recall(gallery).items()}
    if len(gallery.texts) >= retrieval.CANDIDATES:
        config = model.config.eval
        found = retrieval.candidate_recall(gallery, queries=config.queries, draws=config.draws, seed=model.config.seed)
        results |= {f"retrieval/{name}": value for name, value in found.items()}
    return results | {"retrieval/images": float(len(gallery.images)), "retrieval/products": float(len(gallery.texts))}


@dataclass(frozen=True)
class SyncData:
    """Samples with drawn truth, ready to be compared with masks. samples: int64 [n]."""

    split: Split
    tokens: TokenCache
    samples: np.ndarray
    truths: list[sync.SyncTruth]
    partner: np.ndarray

    @classmethod
    def of(cls, split: Split, tokens: TokenCache, grid: int, limit: int | None = None) -> SyncData | None:
        """The truth of the split's samples, or of `limit` random ones; None where the records have no attributes."""
        samples = split.samples
        if limit is not None and limit < len(samples):
            samples = np.sort(np.random.default_rng(0).permutation(samples)[:limit])
        records = [split.index.record(i) for i in samples]
        if not any(record.get("attributes") for record in records):
            return None
        truths = []
        for i, record in zip(samples, records, strict=True):
            width, height = check_image(split.index.jpeg(i))
            truths.append(sync.truth(tokens.spans(i)[1:-1], record.get("attributes") or [], width, height, grid))
        views, products = split.index.view.codes[samples], split.index.product_ids[samples]
        return cls(split, tokens, samples, truths, sync.partners(tokens.lengths[samples], views, products))


@torch.inference_mode()
def teacher_masks(model: SyncMaskModel, data: SyncData, configs: Sequence[MaskConfig]) -> list[list[sync.SyncMask]]:
    """The masks that each configuration gives to each sample: [configuration][sample]."""
    masks: list[dict[int, sync.SyncMask]] = [{} for _ in configs]
    for batch in evaluation_batches(data.split, data.tokens, model.config, model.device, data.samples):
        layout = Layout(batch.cu_seqlens, max(batch.lengths), sum(batch.lengths))
        images, text = model.image(batch.pixels), model.text(batch.token_ids, layout)
        for config, found in zip(configs, masks, strict=True):
            made = sync_masks(model, images, text, layout, config)
            found.update(zip(batch.samples.tolist(), _split_masks(made, batch.lengths), strict=True))
    lost = [int(i) for i in data.samples if i not in masks[0]]
    if lost:
        raise UserError(f"{data.split.index.folder} has images that cannot be read, such as sample {lost[0]}: mend or remove them first.")
    return [[found[int(i)] for i in data.samples] for found in masks]


def _split_masks(masks: Masks, lengths: list[int]) -> list[sync.SyncMask]:
    words, patches, word_score, patch_score = (x.cpu().numpy() for x in masks)
    return [sync.SyncMask(words[i, 1 : n - 1], patches[i], word_score[i, 1 : n - 1], patch_score[i]) for i, n in enumerate(lengths)]


def evaluate_sync(model: SyncMaskModel, data: SyncData) -> dict[str, float]:
    """The synchrony of the model's masks in percent, by name."""
    [masks] = teacher_masks(model, data, [model.config.mask])
    return {f"sync/{name}": value for name, value in sync.sync_metrics(data.truths, masks, data.partner).items()}


def compare_rules(model: SyncMaskModel, data: SyncData) -> list[dict[str, float | str | int]]:
    """The synchrony of every word rule and every patch rule in every fusion layer: a row for each layer and pair of rules."""
    from syncmask_fast.ops import PATCH_SCORES, TOKEN_SCORES

    base = model.config.mask
    # Word and patch rules do not depend on one another, so that pairing them off covers all.
    rules = [
        dataclasses.replace(base, layer=layer, token_score=words, patch_score=patches)
        for layer in range(1, model.config.text.fusion_layers + 1)
        for words, patches in zip(TOKEN_SCORES, PATCH_SCORES, strict=True)
    ]
    rows = []
    for rule, masks in zip(rules, teacher_masks(model, data, rules), strict=True):
        found = sync.sync_metrics(data.truths, masks, data.partner)
        rows.append({"layer": rule.layer, "token_score": rule.token_score, "patch_score": rule.patch_score, **found})
    return rows


@dataclass(frozen=True)
class Common:
    """What every evaluation needs."""

    model: Path
    """Folder of a model: a run's `model`."""
    data: str
    """Folder of shards, or its address; its `eval` folder is evaluated where it has one, otherwise the products held out from training."""
    out: Path | None = None
    """File for the results, as JSON."""
    device: str = "auto"


@dataclass(frozen=True)
class Retrieval(Common):
    """Retrieval in both directions: 101 candidates and the full gallery."""


@dataclass(frozen=True)
class Sync(Common):
    """Do the teacher's masks lie on what both the picture and the text show? Needs data with attributes, such as the lookbook."""

    every_rule: bool = False
    """Compare every score rule in every fusion layer."""


Command = Annotated[Retrieval, tyro.conf.subcommand("retrieval")] | Annotated[Sync, tyro.conf.subcommand("sync")]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=argv, prog="python -m syncmask_fast.evaluate")
    model = SyncMaskModel.from_pretrained(command.model, choose_device(command.device))
    split = open_evaluation(command.data, model.config.eval.holdout)
    if not len(split):
        raise UserError(f"{command.data} has no held-out products to evaluate on.")
    tokens = TokenCache.open(split.index.folder, model.tokenizer, split.index.texts, model.config.text.max_tokens)
    results: object
    if isinstance(command, Retrieval):
        results = evaluate_retrieval(model, split, tokens)
    else:
        data = SyncData.of(split, tokens, model.config.image.size // model.config.image.patch)
        if data is None:
            raise UserError(f"{command.data} has no attributes in its records: synchrony needs drawn truth, such as the lookbook's.")
        results = compare_rules(model, data) if command.every_rule else evaluate_sync(model, data)
    if isinstance(results, dict):
        print_results(results)
    else:
        print_table(results)
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        command.out.write_text(json.dumps(results, indent=2) + "\n")


def choose_device(name: str) -> torch.device:
    """The device of a --device flag; "auto" is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown: give auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} was asked for, but this machine has no CUDA device that PyTorch can use.")
    return device


def print_results(results: dict[str, float]) -> None:
    """One metric a line."""
    for name, value in results.items():
        print(f"{name:44s} {value:8.2f}")


def print_table(rows: list[dict]) -> None:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
