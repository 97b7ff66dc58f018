"""Fine-tune a model for a task: `python -m syncmask_fast.finetune TASK --model DIR --data PATH --out DIR`.

The loop is the trainer's (`train.train`); items, losses and validation are the task's (`tasks/`). The best model by the
task's metric on validation products, which are cut from the training products, is kept. The evaluation split is used
once, at the end.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from syncmask_fast.config import Inputs, Task, TaskConfig, TrainConfig
from syncmask_fast.data.splits import open_splits, split_validation
from syncmask_fast.distributed.group import SINGLE_PROCESS
from syncmask_fast.evaluate import evaluate_task
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.tasks.base import open_tokens
from syncmask_fast.tasks.composed import finetune_composed
from syncmask_fast.tasks.recognition import finetune_recognition
from syncmask_fast.tasks.retrieval import RERANK, finetune_retrieval
from syncmask_fast.train import train
from syncmask_fast.training.run_dir import create_run_dir
from syncmask_fast.training.setup import draw_default_lookbook
from syncmask_fast.utils.device import choose_device, tune_malloc
from syncmask_fast.utils.errors import UserError, run_command
from syncmask_fast.utils.files import write_json
from syncmask_fast.utils.terminal import print_results

# Recipes of the tasks: setting -> value and origin. A model of the `tiny` preset takes TINY's values first.
Recipe = dict[str, tuple[float | int | None, str]]
RECIPES: dict[Task, Recipe] = {
    task: {
        "epochs": (epochs, "FashionSAP"),
        "batch_size": (per_gpu * gpus, f"FashionSAP: {per_gpu} on each of {gpus} GPUs"),
        "lr": (lr, "FashionSAP"),
        "min_lr": (1e-6, "ours"),
        "muon_lr": (None, "ALBEF and FashionSAP use AdamW only"),
        "weight_decay": (0.2, "FashionSAP")
        if task == "composed"
        else (0.02, "pretraining of ALBEF and FashionSAP; their fine-tuning's is not known"),
    }
    for task, epochs, per_gpu, gpus, lr in (
        ("retrieval", 20, 16, 4, 1e-5),
        ("composed", 20, 16, 2, 2e-5),
        ("category", 30, 64, 2, 2e-5),
        ("subcategory", 30, 64, 2, 2e-5),
    )
}
TINY: Recipe = {
    name: (value, "ours, for `tiny`")
    for name, value in {"epochs": 3, "batch_size": 64, "lr": 5e-4, "muon_lr": 0.005, "min_lr": 1e-5}.items()
}


@dataclass(frozen=True)
class Settings:
    """What every fine-tuning needs. Unset values come from the task's recipe, and the run prints where each is from."""

    model: Path
    """Model folder to start from: a run's `model`."""
    data: str | None = None
    """Folder or address of shards, or of `train` and `eval` folders. Unset: draw the lookbook."""
    out: Path | None = None
    """Run folder. Unset: runs/TASK-TIMESTAMP."""
    scratch: bool = False
    """Start from random weights in the model's shape. The difference is what pretraining gains."""
    epochs: int | None = None
    """Passes over the training items. Unset: the recipe's."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    batch_size: int | None = None
    """Items per step. Unset: the recipe's."""
    lr: float | None = None
    """Peak learning rate of AdamW. Unset: the recipe's."""
    muon_lr: float | None = None
    """Peak learning rate of Muon for matrices and convolutions. Unset: the recipe's; only `tiny` uses Muon."""
    weight_decay: float | None = None
    """Weight decay of AdamW. Unset: the recipe's."""
    validation: float = 0.1
    """Fraction of the training products that select the best model; the same products in every run."""
    seed: int = 0
    """Seed of initial weights, order and augmentation."""
    resume: str = "auto"
    """`auto`: resume from --out if it holds a checkpoint. `never`: fail if it does. Or a checkpoint path."""
    save_every: int | None = None
    """Steps between checkpoints, each after a validation. Unset: an epoch."""
    log_every: int = 20
    """Steps between printed lines."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`. `auto` uses CUDA if there is a CUDA device."""
    decode_threads: int | None = None
    """Threads that decode images. Unset: one per CPU core, at most 16."""


@dataclass(frozen=True)
class Retrieval(Settings):
    """Image-text retrieval in both directions, by ITC and ITM. Keeps the best mean R@1, 5, 10 in the full gallery."""


@dataclass(frozen=True)
class Composed(Settings):
    """Composed retrieval: a reference image and a change in words. Needs triplets.json. Keeps the best mean R@10."""


@dataclass(frozen=True)
class Recognition(Settings):
    """What category and subcategory share."""

    inputs: Inputs = "image+text"
    """What the classifier sees. ALBEF and FashionSAP use image and text. If texts name the label, use `image`."""


@dataclass(frozen=True)
class Category(Recognition):
    """Category recognition. Keeps the best accuracy."""


@dataclass(frozen=True)
class Subcategory(Recognition):
    """Subcategory recognition. Keeps the best accuracy."""


Command = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Composed, tyro.conf.subcommand("composed")]
    | Annotated[Category, tyro.conf.subcommand("category")]
    | Annotated[Subcategory, tyro.conf.subcommand("subcategory")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: fine-tune, keep the best model, evaluate it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("Fine-tuning runs in one process, but torchrun started several. Start it without torchrun.")
    settings = tyro.cli(
        Command, args=argv, prog="python -m syncmask_fast.finetune", description="Fine-tune a model for a task."
    )
    name: Task = type(settings).__name__.lower()
    device = choose_device(settings.device)
    tune_malloc()
    # 1. Configuration and data.
    config = configure(name, settings, SyncMaskModel.from_pretrained(settings.model).config)
    config.check()
    data = config.data or str(draw_default_lookbook(config, SINGLE_PROCESS))
    train_split, eval_split = open_splits(data, config.eval.holdout_fraction)
    train_split, validation = split_validation(train_split, config.task.validation)
    if not len(validation):
        raise UserError(f"--validation {settings.validation} leaves no product of {data} to validate on. Give more.")
    # 2. Training with the task's items and losses.
    prepare = {"retrieval": finetune_retrieval, "composed": finetune_composed}.get(name, finetune_recognition)
    task, config = prepare(config, train_split, validation)
    if settings.save_every is None:
        config = dataclasses.replace(config, save_every=max(1, len(task.product_ids) // config.batch_size))
    config = create_run_dir(dataclasses.replace(config, data=data), SINGLE_PROCESS)
    signal_number = train(config, device, train_split, eval_split, SINGLE_PROCESS, task)
    if signal_number is not None:
        raise SystemExit(128 + signal_number)
    # 3. The best model on the evaluation split.
    model = SyncMaskModel.from_pretrained(config.out / "model", device)
    results = {}
    if len(eval_split):
        results = evaluate_task(name, model, eval_split, open_tokens(model, eval_split), RERANK)
    print_results(results)
    write_json(config.out / "results.json", {name: value for name, value in results.items() if not math.isnan(value)})
    print(f"\nmodel: {config.out / 'model'}")


def configure(task: Task, settings: Settings, base: TrainConfig) -> TrainConfig:
    """Return the run's configuration: the model's, changed by the task's recipe, then by flags. Prints all origins."""
    recipe = RECIPES[task] | (TINY if base.preset == "tiny" else {})
    if settings.steps is not None:
        recipe["epochs"] = (None, "--steps was given")
    given = {name: getattr(settings, name) for name in recipe if getattr(settings, name, None) is not None}
    recipe |= {name: (value, "given") for name, value in given.items()}
    for name, (value, origin) in recipe.items():
        print(f"{name} {value} ({origin})")
    value = {name: value for name, (value, _) in recipe.items()}
    optim = {name: value[name] for name in ("lr", "min_lr", "muon_lr", "weight_decay")}
    inputs = settings.inputs if isinstance(settings, Recognition) else "image+text"
    retrieval = task == "retrieval"
    return dataclasses.replace(
        base,
        data=settings.data,
        out=settings.out,
        steps=settings.steps,
        epochs=value["epochs"],
        seed=settings.seed,
        masking="none",
        batching="semi_hard" if retrieval else "random",
        resume=settings.resume,
        save_every=settings.save_every or 1,
        log_every=settings.log_every,
        batch_size=value["batch_size"],
        device=settings.device,
        decode_threads=settings.decode_threads,
        # The weights are the model's, or random ones.
        image=dataclasses.replace(base.image, pretrained=False),
        text=dataclasses.replace(base.text, name=None),
        weights=None,
        loss=dataclasses.replace(
            base.loss, presence=0.0, collages=0.0, itc_only=0.0, queue=base.loss.queue if retrieval else 0
        ),
        optim=dataclasses.replace(base.optim, grad_accum=1, **optim),
        task=TaskConfig(task, settings.model, settings.scratch, (), inputs, settings.validation),
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
