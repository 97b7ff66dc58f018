"""Evaluation of a trained model: `python -m syncmask_fast.evaluate retrieval|composed|category|subcategory|sync --model DIR --data PATH`."""

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
from torch import Tensor

from syncmask_fast.config import MaskConfig, Task, TrainConfig
from syncmask_fast.data.images import check_image
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.splits import Split, open_evaluation
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.triplets import Triplets, open_triplets
from syncmask_fast.model.layout import PackedLayout, group_by_image, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import mlm_loss
from syncmask_fast.objective.masking import Masks, num_masked, sync_masks
from syncmask_fast.tasks import composed, recognition, retrieval
from syncmask_fast.tasks import mask_quality as sync
from syncmask_fast.utils.device import choose_device
from syncmask_fast.utils.errors import UserError, run_command
from syncmask_fast.utils.terminal import markdown_table, print_results

BATCH = 128
PAIRS = 512  # that the fusion encoder sees in one pass
RERANK = 16  # candidates that the ITM head judges where nothing else is said


def evaluation_batches(
    split: Split, tokens: TokenCache, config: TrainConfig, device: torch.device, order: np.ndarray
) -> Iterator[Batch]:
    """Batches of whole images, not cropped, in the given order of sample numbers."""
    loader = Loader(
        split.index,
        tokens,
        batch_size=min(BATCH, max(len(order), 1)),
        size=config.image.size,
        augment=None,
        device=device,
        backend=config.decoder,
        threads=config.decode_threads,
    )
    with loader:
        yield from loader.epoch(order, 0)


@torch.inference_mode()
def embed(model: SyncMaskModel, split: Split, tokens: TokenCache) -> tuple[retrieval.Gallery, np.ndarray]:
    """The features of all images of a split and of the text of each product (its first one, where a product has several).

    Also returns the sample number of each image, int64 [N]: an image that cannot be read is not among them.
    """
    samples, images = [], []
    for batch in evaluation_batches(split, tokens, model.config, model.device, split.samples):
        samples.append(batch.sample_ids.cpu().numpy())
        images.append(model.encode_image(batch.pixels))
    if not images:
        raise UserError(f"{split.index.folder} has no readable image to evaluate on.")
    at = np.concatenate(samples)
    _, first, product = np.unique(split.index.product_ids[at], return_index=True, return_inverse=True)
    texts = [model.project_texts(features, layout) for features, layout in text_features(model, tokens, at[first])]
    group = split.index.subcategory.codes[at[first]]
    device = model.device
    product, group = torch.from_numpy(product).to(device), torch.from_numpy(group).to(device)
    return retrieval.Gallery(torch.cat(images), torch.cat(texts), product, group), at


def text_features(
    model: SyncMaskModel, tokens: TokenCache, samples: np.ndarray
) -> Iterator[tuple[Tensor, PackedLayout]]:
    """The packed features [T, C] of the texts of these samples, in groups."""
    for begin in range(0, len(samples), BATCH):
        ids, starts = tokens.pack(samples[begin : begin + BATCH])
        layout = PackedLayout.of(np.diff(starts).tolist(), model.device)
        yield model.text(torch.from_numpy(ids).to(model.device), layout), layout


def evaluate_retrieval(model: SyncMaskModel, split: Split, tokens: TokenCache, rerank: int = 0) -> dict[str, float]:
    """Every retrieval metric in percent, by name; the 101-candidate ones only where there are 101 products.

    rerank: how many of the best candidates by ITC the ITM head puts in order anew, for the metrics named itm-rerank; 0 leaves these out.
    """
    gallery, at = embed(model, split, tokens)
    config = model.config.eval
    draw = {"queries": config.queries, "draws": config.draws, "seed": model.config.seed}
    found = retrieval.recall_full(gallery)
    if len(gallery.texts) >= retrieval.CANDIDATES:
        found |= retrieval.recall_101(gallery, **draw)
    if rerank:
        lists = retrieval.shortlists(gallery, rerank, **draw)
        found |= retrieval.recall_reranked(lists, itm_scores(model, split, tokens, gallery, at, lists)) | {
            "itm-rerank/K": float(rerank)
        }
    found |= {"images": float(len(gallery.images)), "products": float(len(gallery.texts))}
    return {f"retrieval/{name}": value for name, value in found.items()}


@torch.inference_mode()
def itm_scores(
    model: SyncMaskModel,
    split: Split,
    tokens: TokenCache,
    gallery: retrieval.Gallery,
    at: np.ndarray,
    lists: list[retrieval.Shortlist],
) -> list[Tensor]:
    """The ITM scores (log-odds of a match), float32 [Q, K], of the pairs on each shortlist; a pair that several lists have is judged once.

    Texts are encoded once and kept. Images are encoded once, batch by batch, so that a large gallery's features need not be kept, and an image's keys
    and values are projected once for all texts that look at it.
    """
    count = len(gallery.texts)
    codes = [(entry.images * count + entry.texts).cpu().numpy() for entry in lists]
    pairs, places = np.unique(
        np.concatenate([code.ravel() for code in codes]), return_inverse=True
    )  # in the order of the images
    image, text = pairs // count, pairs % count
    first = np.unique(gallery.product_index.cpu().numpy(), return_index=True)[1]
    features, layouts = zip(*text_features(model, tokens, at[first]), strict=True)
    features, layout = torch.cat(features), sum(layouts[1:], layouts[0])

    score = torch.empty(len(pairs))
    shown = np.unique(image)
    for batch in evaluation_batches(split, tokens, model.config, model.device, at[shown]):
        images = model.image(batch.pixels)
        numbers = shown[batch.epoch_positions.cpu().numpy()]
        begin, end = np.searchsorted(image, numbers[0]), np.searchsorted(image, numbers[-1], side="right")
        for low in range(begin, end, PAIRS):
            part = slice(low, min(low + PAIRS, end))
            seen, looks_at = np.unique(image[part], return_inverse=True)
            looks_at, texts = torch.from_numpy(looks_at).to(model.device), torch.from_numpy(text[part]).to(model.device)
            pack = group_by_image(layout, texts, looks_at, len(seen))
            fused = model.fusion(
                features[pack.source_rows],
                pack,
                images[torch.from_numpy(np.searchsorted(numbers, seen)).to(model.device)],
            )
            logits = model.itm_head(fused[pack.cls_rows]).float()
            score[part] = (logits[:, 1] - logits[:, 0]).cpu()
    parts = np.split(places.ravel(), np.cumsum([code.size for code in codes])[:-1])
    return [
        score[torch.from_numpy(place)].view(code.shape).to(model.device)
        for place, code in zip(parts, codes, strict=True)
    ]


@torch.inference_mode()
def evaluate_composed(model: SyncMaskModel, split: Split, tokens: TokenCache, triplets: Triplets) -> dict[str, float]:
    """Composed retrieval in percent, with both galleries by name: every picture of the class, and the union of candidates and targets.

    A model that was not fine-tuned for it asks with the sum of its image and text features.
    """
    galleries = {"val-union": {name: _union(triplets, name) for name in sorted(set(triplets.classes))}}
    if triplets.galleries:
        galleries = {"original": triplets.galleries} | galleries
    wanted = np.unique(np.concatenate([triplets.candidate, triplets.target, *triplets.galleries.values()]))
    captions = TokenCache.open(split.index.folder, model.tokenizer, triplets.captions, model.config.text.max_length)
    order = np.argsort(triplets.candidate, kind="stable")
    pictures = torch.empty(len(wanted), model.config.embed_dim, device=model.device)
    queries = torch.empty(len(triplets), model.config.embed_dim, device=model.device)
    found = []
    for batch in evaluation_batches(split, tokens, model.config, model.device, wanted):
        images = model.image(batch.pixels)
        places = np.searchsorted(wanted, batch.sample_ids_host)
        found.append(places)
        pictures[torch.from_numpy(places).to(model.device)] = model.project_images(images)
        rows = order[np.isin(triplets.candidate[order], batch.sample_ids_host)]
        for begin in range(0, len(rows), BATCH):
            part = rows[begin : begin + BATCH]
            [(texts, layout)] = text_features(model, captions, part)
            references = images[
                torch.from_numpy(np.searchsorted(batch.sample_ids_host, triplets.candidate[part])).to(model.device)
            ]
            queries[torch.from_numpy(part).to(model.device)] = model.project_queries(references, texts, layout)
    if sum(map(len, found)) < len(wanted):
        raise UserError(
            f"{split.index.folder} has pictures of triplets or galleries that cannot be read: mend or remove them first."
        )
    product = torch.from_numpy(split.index.product_ids[wanted]).to(model.device)
    results = {}
    for protocol, pools in galleries.items():
        asked = {}
        for name in sorted(set(triplets.classes)):
            rows = np.array([row for row, each in enumerate(triplets.classes) if each == name])
            goal, pool = (
                torch.from_numpy(np.searchsorted(wanted, x)).to(model.device)
                for x in (triplets.target[rows], pools[name])
            )
            asked[name] = composed.ClassQueries(queries[torch.from_numpy(rows).to(model.device)], goal, pool)
        results |= {
            f"composed/{protocol}/{name}": value
            for name, value in composed.composed_recall(asked, pictures, product).items()
        }
    return results


def _union(triplets: Triplets, name: str) -> np.ndarray:
    """The pictures of a class that are a candidate or a target, int64 [G]."""
    rows = np.array([each == name for each in triplets.classes])
    return np.unique(np.concatenate([triplets.candidate[rows], triplets.target[rows]]))


@torch.inference_mode()
def evaluate_recognition(model: SyncMaskModel, split: Split, tokens: TokenCache) -> dict[str, float]:
    """Recognition in percent by the classifier that a model was fine-tuned with; pictures without a label are left out."""
    task = model.config.task
    labels = getattr(split.index, task.name)
    labelled = split.samples[labels.codes[split.samples] >= 0]
    if not len(labelled):
        raise UserError(f"{split.index.folder} has no {task.name} in its records: recognition needs labels.")
    truth, predicted = [], []
    for batch in evaluation_batches(split, tokens, model.config, model.device, labelled):
        layout = PackedLayout.of_batch(batch)
        best = model.label_logits(model.image(batch.pixels), model.text(batch.token_ids, layout), layout).argmax(1)
        predicted += [task.labels[i] for i in best.tolist()]
        truth += [labels.names[code] for code in labels.codes[batch.sample_ids_host]]
    unseen = sorted(set(truth) - set(task.labels))
    if unseen:
        print(f"labels that the classifier never saw, whose pictures count as errors: {', '.join(unseen)}")
    found = recognition.recognition_metrics(truth, predicted, task.labels) | {
        "unlabelled-images": float(len(split) - len(labelled))
    }
    return {f"{task.name}/{task.inputs}/{name}": value for name, value in found.items()}


def evaluate_task(
    task: Task,
    model: SyncMaskModel,
    split: Split,
    tokens: TokenCache,
    *,
    triplets: Triplets | None = None,
    rerank: int = 0,
) -> dict[str, float]:
    """The metrics of a task on a split; triplets: other ones than the split's own.

    errors: UserError for recognition with a model that was not fine-tuned for it, and where the data lacks what the task needs.
    """
    if task == "retrieval":
        return evaluate_retrieval(model, split, tokens, rerank)
    if task == "composed":
        return evaluate_composed(model, split, tokens, triplets or open_triplets(split))
    if model.config.task.name != task:
        raise UserError(
            f"the model is one for {model.config.task.name}, without a classifier for {task}: fine-tune it with `finetune {task}` first."
        )
    return evaluate_recognition(model, split, tokens)


@dataclass(frozen=True)
class MaskEvalSet:
    """Samples with drawn truth, ready to be compared with masks. samples: int64 [n]."""

    split: Split
    tokens: TokenCache
    samples: np.ndarray
    truths: list[sync.MaskTruth]
    partner: np.ndarray

    @classmethod
    def of(cls, split: Split, tokens: TokenCache, grid: int, limit: int | None = None) -> MaskEvalSet | None:
        """The truth of the split's samples, or of `limit` random ones; None where the records have no attributes."""
        samples = split.samples
        if limit is not None and limit < len(samples):
            samples = np.sort(np.random.default_rng(0).permutation(samples)[:limit])
        records = [split.index.record(i) for i in samples]
        if not any(record.get("attributes") for record in records):
            return None
        truths = []
        for i, record in zip(samples, records, strict=True):
            width, height = check_image(split.index.image_bytes(i))
            truths.append(sync.truth(tokens.spans(i)[1:-1], record.get("attributes") or [], width, height, grid))
        views, products = split.index.view.codes[samples], split.index.product_ids[samples]
        return cls(split, tokens, samples, truths, sync.partners(tokens.lengths[samples], views, products))


@torch.inference_mode()
def teacher_masks(model: SyncMaskModel, data: MaskEvalSet, configs: Sequence[MaskConfig]) -> list[list[sync.SyncMask]]:
    """The masks that each configuration gives to each sample: [configuration][sample]."""
    masks: list[dict[int, sync.SyncMask]] = [{} for _ in configs]
    for batch in evaluation_batches(data.split, data.tokens, model.config, model.device, data.samples):
        layout = PackedLayout.of_batch(batch)
        images, text = model.image(batch.pixels), model.text(batch.token_ids, layout)
        for config, found in zip(configs, masks, strict=True):
            made = sync_masks(model, images, text, layout, config)
            found.update(zip(batch.sample_ids.tolist(), _split_masks(made, batch.lengths), strict=True))
    lost = [int(i) for i in data.samples if i not in masks[0]]
    if lost:
        raise UserError(
            f"{data.split.index.folder} has images that cannot be read, such as sample {lost[0]}: mend or remove them first."
        )
    return [[found[int(i)] for i in data.samples] for found in masks]


def _split_masks(masks: Masks, lengths: list[int]) -> list[sync.SyncMask]:
    words, patches, token_score, patch_score = (x.cpu().numpy() for x in masks)
    return [
        sync.SyncMask(words[i, 1 : n - 1], patches[i], token_score[i, 1 : n - 1], patch_score[i])
        for i, n in enumerate(lengths)
    ]


def evaluate_sync(model: SyncMaskModel, data: MaskEvalSet) -> dict[str, float]:
    """The synchrony of the model's masks in percent, by name."""
    [masks] = teacher_masks(model, data, [model.config.mask])
    return {f"sync/{name}": value for name, value in sync.sync_metrics(data.truths, masks, data.partner).items()}


@torch.inference_mode()
def evaluate_mlm_grounding(model: SyncMaskModel, data: MaskEvalSet) -> dict[str, float]:
    """MLM at masked words that the picture shows: nats a word, with the right picture and with that of another sample (`MaskEvalSet.partner`).

    Of each text `token_ratio` of the words are masked, as in training, or all that are in view where they are fewer. What the other picture costs
    beyond the right one is what the model reads off pictures; the rest is told by the other words.
    """
    truths, rng = dict(zip(data.samples.tolist(), data.truths, strict=True)), np.random.default_rng(0)
    nats, words = np.zeros(2), 0
    shown, others = (
        evaluation_batches(data.split, data.tokens, model.config, model.device, at)
        for at in (data.samples, data.samples[data.partner])
    )
    for batch, other in zip(shown, others, strict=True):
        if not torch.equal(batch.epoch_positions, other.epoch_positions):
            raise UserError(f"{data.split.index.folder} has images that cannot be read: mend or remove them first.")
        masks = []
        for sample in batch.sample_ids.tolist():
            visible = truths[sample].visible
            masks.append(np.zeros(len(visible) + 2, bool))
            masks[-1][
                1 + rng.permutation(np.flatnonzero(visible))[: num_masked(model.config.mask.token_ratio, len(visible))]
            ] = True
        hidden = torch.from_numpy(np.concatenate(masks)).to(model.device)
        layout, at = PackedLayout.of_batch(batch), hidden.nonzero()[:, 0]
        text, pack = model.text(batch.token_ids.masked_fill(hidden, model.mask_id), layout), one_to_one(layout)
        for number, pixels in enumerate((batch.pixels, other.pixels)):
            fused = model.fusion(text, pack, model.image(pixels))[at]
            nats[number] += float(
                mlm_loss(model.mlm_head(fused, model.text.word_embeddings.weight), batch.token_ids[at]).sum
            )
        words += len(at)
    names = ("mlm/words-in-view/nats", "mlm/words-in-view/nats-with-another-picture")
    return dict(zip(names, (nats / max(words, 1)).tolist(), strict=True))


def compare_score_rules(model: SyncMaskModel, data: MaskEvalSet) -> list[dict[str, float | str | int]]:
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
    """Retrieval in both directions: 101 candidates and the full gallery, by ITC scores and re-ranked by the ITM head."""

    rerank: int = RERANK
    """How many of the best candidates by ITC the ITM head puts in order anew; 0 leaves that out."""


@dataclass(frozen=True)
class Composed(Common):
    """Text-guided retrieval: a reference picture and what is to change. Needs triplets.json beside the shards: FashionIQ's, or the lookbook's."""


@dataclass(frozen=True)
class Category(Common):
    """Accuracy and macro-F1 of the category, by a model that was fine-tuned for it."""


@dataclass(frozen=True)
class Subcategory(Common):
    """Accuracy and macro-F1 of the subcategory, by a model that was fine-tuned for it."""


@dataclass(frozen=True)
class Sync(Common):
    """Do the teacher's masks lie on what both the picture and the text show? Needs data with attributes, such as the lookbook."""

    every_rule: bool = False
    """Compare every score rule in every fusion layer."""


Command = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Composed, tyro.conf.subcommand("composed")]
    | Annotated[Category, tyro.conf.subcommand("category")]
    | Annotated[Subcategory, tyro.conf.subcommand("subcategory")]
    | Annotated[Sync, tyro.conf.subcommand("sync")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Command, args=argv, prog="python -m syncmask_fast.evaluate")
    model = SyncMaskModel.from_pretrained(command.model, choose_device(command.device))
    split = open_evaluation(command.data, model.config.eval.holdout_fraction)
    if not len(split):
        raise UserError(f"{command.data} has no held-out products to evaluate on.")
    tokens = TokenCache.open(split.index.folder, model.tokenizer, split.index.texts, model.config.text.max_length)
    results: object
    if not isinstance(command, Sync):
        if isinstance(command, Retrieval) and command.rerank < 0:
            raise UserError(f"--rerank is {command.rerank}, but must be 0 or more.")
        results = evaluate_task(
            type(command).__name__.lower(), model, split, tokens, rerank=getattr(command, "rerank", 0)
        )
    else:
        data = MaskEvalSet.of(split, tokens, model.config.image.size // model.config.image.patch)
        if data is None:
            raise UserError(
                f"{command.data} has no attributes in its records: synchrony needs drawn truth, such as the lookbook's."
            )
        results = (
            compare_score_rules(model, data)
            if command.every_rule
            else evaluate_sync(model, data) | evaluate_mlm_grounding(model, data)
        )
    if isinstance(results, dict):
        print_results(results)
    else:
        print(markdown_table(results))
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        command.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
