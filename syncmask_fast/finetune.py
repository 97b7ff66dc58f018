"""Fine-tuning: `python -m syncmask_fast.finetune retrieval|composed|category|subcategory --model DIR --data PATH --out DIR`.

The loop, the checkpoints, the log and Ctrl-C are the trainer's (`train.train`); here are the items, the objective and the validation of each task.
The best model by the task's metric on a validation part, which is cut from the training products, is kept; the evaluation split is touched once, at
the end.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from syncmask_fast.config import Inputs, Task, TaskConfig, TrainConfig
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.splits import Split, open_splits, split_validation
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.triplets import Triplets, open_triplets
from syncmask_fast.distributed.group import SINGLE_PROCESS
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.evaluate import RERANK, evaluate_task
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import itc_loss, means
from syncmask_fast.objective.memory import Features, Queue
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.tasks.base import FineTuneTask
from syncmask_fast.train import train
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.epochs import epoch_batches, plan_epoch
from syncmask_fast.training.log import NullLog
from syncmask_fast.training.run_dir import create_run_dir
from syncmask_fast.training.setup import draw_default_lookbook
from syncmask_fast.training.step import Objective
from syncmask_fast.utils.device import choose_device, tune_malloc
from syncmask_fast.utils.errors import UserError, run_command
from syncmask_fast.utils.files import write_json
from syncmask_fast.utils.terminal import print_results

# Of each task: flag -> value and where it is from. For a model of the `tiny` preset, TINY's values go before these.
Recipe = dict[str, tuple[float | int | None, str]]
_SHARED: Recipe = {"min_lr": (1e-6, "ours"), "muon_lr": (None, "the parents know no Muon")}
RECIPES: dict[Task, Recipe] = {
    "retrieval": _SHARED
    | {
        "epochs": (20, "FashionSAP"),
        "batch_size": (64, "FashionSAP: 16 on each of 4 GPUs"),
        "lr": (1e-5, "FashionSAP"),
        "weight_decay": (0.02, "pretraining of ALBEF and FashionSAP; theirs of the fine-tuning is not known"),
    },
    "composed": _SHARED
    | {
        "epochs": (20, "FashionSAP"),
        "batch_size": (32, "FashionSAP: 16 on each of 2 GPUs"),
        "lr": (2e-5, "FashionSAP"),
        "weight_decay": (0.2, "FashionSAP"),
    },
    "category": _SHARED
    | {
        "epochs": (30, "FashionSAP"),
        "batch_size": (128, "FashionSAP: 64 on each of 2 GPUs"),
        "lr": (2e-5, "FashionSAP"),
        "weight_decay": (0.02, "pretraining of ALBEF and FashionSAP; theirs of the fine-tuning is not known"),
    },
}
RECIPES["subcategory"] = RECIPES["category"]
_OURS = "ours, for `tiny`"
TINY: Recipe = {
    "epochs": (3, _OURS),
    "batch_size": (64, _OURS),
    "lr": (5e-4, _OURS),
    "muon_lr": (0.005, _OURS),
    "min_lr": (1e-5, _OURS),
}
METRICS = {
    "retrieval": "retrieval/mean-of-six/full",
    "composed": "composed/val-union/mean/R@10",  # FashionSAP: the sum of R@10 over the classes
    "category": "accuracy",
    "subcategory": "accuracy",
}


@dataclass(frozen=True)
class Settings:
    """What every fine-tuning needs. What is unset follows the parents, for a model of the `tiny` preset us; the run prints each value's origin."""

    model: Path
    """Folder of the model to start from: a run's `model`."""
    data: str | None = None
    """Folder of shards, or one with `train` and `eval` inside; unset draws the lookbook."""
    out: Path | None = None
    """Folder of the run; unset is runs/TASK-TIMESTAMP."""
    scratch: bool = False
    """Start from random weights in the model's shape: what pretraining is worth is the difference."""
    epochs: int | None = None
    steps: int | None = None
    """Optimiser steps, in place of --epochs."""
    batch_size: int | None = None
    lr: float | None = None
    muon_lr: float | None = None
    """Learning rate of Muon for matrices and convolutions."""
    weight_decay: float | None = None
    validation: float = 0.1
    """Share of the training products that the best model is chosen on; the same in every run."""
    seed: int = 0
    resume: str = "auto"
    """auto: go on where --out stopped; never: refuse to; or the path of a checkpoint to go on from."""
    save_every: int | None = None
    """Steps between checkpoints, with a validation before each; unset is an epoch."""
    log_every: int = 20
    device: str = "auto"
    decode_threads: int | None = None


@dataclass(frozen=True)
class Retrieval(Settings):
    """Image-to-text and text-to-image retrieval, by ITC and ITM. Keeps the best mean of R@1, 5, 10 of both directions in the full gallery."""


@dataclass(frozen=True)
class Composed(Settings):
    """Text-guided retrieval: a reference picture and what is to change. Needs triplets.json beside the shards. Keeps the best mean R@10."""


@dataclass(frozen=True)
class Recognition(Settings):
    """What category and subcategory share."""

    inputs: Inputs = "image+text"
    """What the classifier sees. The parents feed image and text; in texts that name the label, "image" is the harder and more telling task."""


@dataclass(frozen=True)
class Category(Recognition):
    """Recognition of the category. Keeps the best accuracy."""


@dataclass(frozen=True)
class Subcategory(Recognition):
    """Recognition of the subcategory. Keeps the best accuracy."""


Command = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Composed, tyro.conf.subcommand("composed")]
    | Annotated[Category, tyro.conf.subcommand("category")]
    | Annotated[Subcategory, tyro.conf.subcommand("subcategory")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: fine-tunes, keeps the best, evaluates it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("torchrun started several processes, but a fine-tuning runs in one: start it without torchrun.")
    settings = tyro.cli(Command, args=argv, prog="python -m syncmask_fast.finetune")
    task: Task = type(settings).__name__.lower()
    device = choose_device(settings.device)
    tune_malloc()
    config = configure(task, settings, SyncMaskModel.from_pretrained(settings.model).config)
    config.check()
    data = config.data or str(draw_default_lookbook(config, SINGLE_PROCESS))
    train_split, eval_split = open_splits(data, config.eval.holdout_fraction)
    train_split, validation = split_validation(train_split, config.task.validation)
    if not len(validation):
        raise UserError(
            f"--validation {settings.validation} leaves no product of {data} to choose the best model by: give more."
        )
    make = {"retrieval": tune_retrieval, "composed": tune_composed}.get(task, tune_recognition)
    task_loop, config = make(config, train_split, validation)
    if settings.save_every is None:
        config = dataclasses.replace(config, save_every=max(1, len(task_loop.product_ids) // config.batch_size))
    config = create_run_dir(dataclasses.replace(config, data=data), SINGLE_PROCESS)
    signal_number = train(config, device, train_split, eval_split, SINGLE_PROCESS, task_loop)
    if signal_number is not None:
        raise SystemExit(128 + signal_number)

    out = config.out
    model = SyncMaskModel.from_pretrained(out / "model", device)
    results = (
        evaluate_task(task, model, eval_split, tokens_of(model.config, model, eval_split), rerank=RERANK)
        if len(eval_split)
        else {}
    )
    print_results(results)
    write_json(out / "results.json", {name: value for name, value in results.items() if not math.isnan(value)})
    print(f"\nmodel: {out / 'model'}")


def configure(task: Task, settings: Settings, base: TrainConfig) -> TrainConfig:
    """The run's configuration: the model's shape and data settings, the task's recipe, then the flags. Prints where each value is from."""
    recipe = RECIPES[task] | (TINY if base.preset == "tiny" else {})
    given = {name: getattr(settings, name) for name in recipe if getattr(settings, name, None) is not None}
    if settings.steps is not None:
        recipe["epochs"] = (None, "--steps was given")
    chosen = {name: value for name, (value, _) in recipe.items()} | given
    for name, (value, origin) in recipe.items():
        print(f"{name} {given[name]} (given)" if name in given else f"{name} {value} ({origin})")
    optim = {name: chosen[name] for name in ("lr", "min_lr", "muon_lr", "weight_decay")}
    inputs = settings.inputs if isinstance(settings, Recognition) else "image+text"
    return dataclasses.replace(
        base,
        data=settings.data,
        out=settings.out,
        steps=settings.steps,
        epochs=chosen["epochs"],
        seed=settings.seed,
        masking="none",
        batching="semi_hard" if task == "retrieval" else "random",
        resume=settings.resume,
        save_every=settings.save_every or 1,
        log_every=settings.log_every,
        batch_size=chosen["batch_size"],
        device=settings.device,
        decode_threads=settings.decode_threads,
        image=dataclasses.replace(base.image, pretrained=False),  # the weights are the model's, or random ones
        text=dataclasses.replace(base.text, name=None),
        weights=None,
        loss=dataclasses.replace(
            base.loss, presence=0.0, collages=0.0, itc_only=0.0, queue=base.loss.queue if task == "retrieval" else 0
        ),
        optim=dataclasses.replace(base.optim, grad_accum=1, **optim),
        task=TaskConfig(task, settings.model, settings.scratch, (), inputs, settings.validation),
    )


def tokens_of(config: TrainConfig, model: SyncMaskModel, split: Split) -> TokenCache:
    return TokenCache.open(split.index.folder, model.tokenizer, split.index.texts, config.text.max_length)


# Retrieval: the trainer's own step without masks ------------------------------------------------------------------------------------------


def tune_retrieval(config: TrainConfig, split: Split, validation: Split) -> tuple[FineTuneTask, TrainConfig]:
    def validate(model: SyncMaskModel) -> dict[str, float]:
        found = evaluate_task("retrieval", model, validation, tokens_of(config, model, validation))
        six = [found[f"retrieval/{way}/full/R@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
        return found | {METRICS["retrieval"]: sum(six) / 6}

    return _over_pictures(split, pretraining_losses, validate, METRICS["retrieval"]), config


def _over_pictures(split: Split, losses: Objective, validate, metric: str) -> FineTuneTask:
    """A fine-tuning whose items are the pictures of a split with their texts."""
    products = split.index.product_ids[split.samples]
    numbers = np.unique(products, return_inverse=True)[1]

    def batches(config: TrainConfig, state: TrainState, loader: Loader) -> Iterator[Batch]:
        return epoch_batches(config, state, loader, split, numbers, NullLog(), SINGLE_PROCESS)

    return FineTuneTask(products, 1, batches, losses, validate, metric)


# Recognition ------------------------------------------------------------------------------------------------------------------------------


def tune_recognition(config: TrainConfig, split: Split, validation: Split) -> tuple[FineTuneTask, TrainConfig]:
    """The labels are those of the training part; a picture without one is left out of training."""
    kind = config.task.name
    labels = getattr(split.index, kind)
    labelled = Split(split.index, split.samples[labels.codes[split.samples] >= 0])
    known = np.unique(labels.codes[labelled.samples])
    if len(known) < 2:
        raise UserError(
            f"{split.index.folder} has {len(known)} {kind} labels in its records: recognition needs two or more."
        )
    names = tuple(labels.names[code] for code in known)
    target_of = np.searchsorted(known, labels.codes)  # meant for the labelled training pictures alone

    def losses(
        model: SyncMaskModel,
        teacher: SyncMaskModel,
        batch: Batch,
        queue: Queue,
        config: TrainConfig,
        schedule: Schedule,
    ) -> tuple[dict[str, Tensor], Features]:
        """Cross-entropy of the label."""
        layout = PackedLayout.of_batch(batch)
        images, texts = model.image(batch.pixels), model.text(batch.token_ids, layout)
        target = torch.from_numpy(target_of[batch.sample_ids_host]).to(images.device)
        loss = F.cross_entropy(model.label_logits(images, texts, layout), target)
        return {"total": loss}, Features(
            model.project_images(images).detach(), model.project_texts(texts, layout).detach()
        )

    def validate(model: SyncMaskModel) -> dict[str, float]:
        return evaluate_task(kind, model, validation, tokens_of(config, model, validation))

    task = dataclasses.replace(config.task, labels=names)
    metric = f"{kind}/{task.inputs}/{METRICS[kind]}"
    return _over_pictures(labelled, losses, validate, metric), dataclasses.replace(config, task=task)


# Composed retrieval -----------------------------------------------------------------------------------------------------------------------


@dataclass
class TripletBatch(Batch):
    """B triplets: `pixels` are the references', the texts what is to change, the products the targets'."""

    target_pixels: Tensor
    """float32 [B, 3, S, S]."""


def tune_composed(config: TrainConfig, split: Split, validation: Split) -> tuple[FineTuneTask, TrainConfig]:
    """A triplet whose target is a validation product is one to validate on; one whose reference alone is, is left out."""
    whole = Split(split.index, np.sort(np.concatenate([split.samples, validation.samples])))
    triplets = open_triplets(whole)
    held = [np.isin(pictures, validation.samples) for pictures in (triplets.candidate, triplets.target)]
    ours, theirs = triplets.subset(~held[0] & ~held[1]), triplets.subset(held[1])
    if not len(theirs):
        raise UserError(
            f"--validation {config.task.validation} leaves no triplet to choose the best model by: give more."
        )

    def batches(config: TrainConfig, state: TrainState, loader: Loader) -> Iterator[TripletBatch]:
        return epoch_triplets(config, state, loader, ours)

    def validate(model: SyncMaskModel) -> dict[str, float]:
        return evaluate_task("composed", model, whole, tokens_of(config, model, whole), triplets=theirs)

    products = split.index.product_ids[ours.target]
    return FineTuneTask(products, 2, batches, composed_losses, validate, METRICS["composed"]), config


def composed_losses(
    model: SyncMaskModel,
    teacher: SyncMaskModel,
    batch: TripletBatch,
    queue: Queue,
    config: TrainConfig,
    schedule: Schedule,
) -> tuple[dict[str, Tensor], Features]:
    """Contrast of queries and targets within the batch, in both directions; pictures of one product are no negatives of one another."""
    layout = PackedLayout.of_batch(batch)
    references, targets = model.image(torch.cat([batch.pixels, batch.target_pixels])).chunk(2)
    queries = model.project_queries(references, model.text(batch.token_ids, layout), layout)
    targets = model.project_images(targets)
    student = Features(targets, queries)
    momentum = Features(*(x.detach() for x in student))
    shard = batch.shard
    loss = itc_loss(student, momentum, shard.product_ids, queue, model.temperature, 0.0, shard.rows)
    return {"total": means({"itc": loss}, shard)["itc"]}, momentum


def epoch_triplets(
    config: TrainConfig, state: TrainState, loader: Loader, triplets: Triplets
) -> Iterator[TripletBatch]:
    """Batches without end, as `epoch_batches`; a triplet of which one picture is damaged is left out."""
    product_ids = np.unique(loader.index.product_ids[triplets.target], return_inverse=True)[1]
    captions = TokenCache.open(loader.index.folder, state.model.tokenizer, triplets.captions, config.text.max_length)
    while True:
        order = state.order.numpy()
        pictures = np.stack([triplets.candidate[order], triplets.target[order]], axis=1).ravel()
        for batch in loader.epoch(pictures, state.epoch, start=2 * state.samples_done):
            places = batch.epoch_positions.cpu().numpy()
            state.samples_done = (int(places[-1]) // (2 * config.batch_size) + 1) * config.batch_size
            found, count = np.unique(places // 2, return_counts=True)
            whole = found[count == 2]
            if len(whole) < 2:
                continue
            pixels = batch.pixels[torch.from_numpy(np.isin(places // 2, whole)).to(batch.pixels.device)]
            numbers = order[whole]
            ids, starts = captions.pack(numbers)
            references = triplets.candidate[numbers]
            arrays = product_ids[numbers], numbers, ids, starts, references, whole
            products, items, ids, cu_seqlens, samples, at = (torch.from_numpy(x).to(pixels.device) for x in arrays)
            lengths = np.diff(starts).tolist()
            shard = BatchShard.whole(lengths, items, products)
            yield TripletBatch(
                pixels[0::2], ids, cu_seqlens, lengths, samples, references, at, shard, target_pixels=pixels[1::2]
            )
        state.epoch, state.samples_done = state.epoch + 1, 0
        state.order = plan_epoch(config, state, product_ids, SINGLE_PROCESS)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
