"""Evaluate a model on a task: `python -m syncmask_fast.evaluate TASK --model DIR --data PATH`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from syncmask_fast.config import Task
from syncmask_fast.data.splits import Split, open_evaluation
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.triplets import open_triplets
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.tasks.base import open_tokens
from syncmask_fast.tasks.composed import evaluate_composed
from syncmask_fast.tasks.mask_quality import MaskEvalSet, compare_score_rules, evaluate_mlm_grounding, evaluate_sync
from syncmask_fast.tasks.recognition import evaluate_recognition
from syncmask_fast.tasks.retrieval import RERANK, evaluate_retrieval
from syncmask_fast.utils.device import choose_device
from syncmask_fast.utils.errors import UserError, run_command
from syncmask_fast.utils.terminal import markdown_table, print_results


@dataclass(frozen=True)
class Common:
    """What every evaluation needs."""

    model: Path
    """Model folder: a run's `model`."""
    data: str
    """Folder or address of shards. Its `eval` folder is evaluated; without one, the products held out from training."""
    out: Path | None = None
    """JSON file for the results. Unset: print only."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`. `auto` uses CUDA if there is a CUDA device."""


@dataclass(frozen=True)
class Retrieval(Common):
    """Image-text retrieval in both directions, among 101 candidates and in the full gallery."""

    rerank: int = RERANK
    """Re-rank the top K ITC candidates with the ITM head. 0 disables re-ranking."""


@dataclass(frozen=True)
class Composed(Common):
    """Composed retrieval: a reference image and a change in words. Needs triplets.json next to the shards."""


@dataclass(frozen=True)
class Category(Common):
    """Accuracy and macro-F1 of the category. Needs a model fine-tuned with `finetune category`."""


@dataclass(frozen=True)
class Subcategory(Common):
    """Accuracy and macro-F1 of the subcategory. Needs a model fine-tuned with `finetune subcategory`."""


@dataclass(frozen=True)
class Sync(Common):
    """Are masks where image and text agree? Needs data with attributes, such as the lookbook."""

    every_rule: bool = False
    """Compare all score rules in all fusion layers. Prints a table."""


Command = (
    Annotated[Retrieval, tyro.conf.subcommand("retrieval")]
    | Annotated[Composed, tyro.conf.subcommand("composed")]
    | Annotated[Category, tyro.conf.subcommand("category")]
    | Annotated[Subcategory, tyro.conf.subcommand("subcategory")]
    | Annotated[Sync, tyro.conf.subcommand("sync")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    command = tyro.cli(
        Command, args=argv, prog="python -m syncmask_fast.evaluate", description="Evaluate a trained model."
    )
    if isinstance(command, Retrieval) and command.rerank < 0:
        raise UserError(f"--rerank {command.rerank} is negative. Give 0 or more.")
    model = SyncMaskModel.from_pretrained(command.model, choose_device(command.device))
    split = open_evaluation(command.data, model.config.eval.holdout_fraction)
    if not len(split):
        raise UserError(f"{command.data} has no held-out products. Give more data, or train and eval folders.")
    tokens = open_tokens(model, split)
    if isinstance(command, Sync):
        results = _evaluate_masks(command, model, split, tokens)
    else:
        rerank = command.rerank if isinstance(command, Retrieval) else 0
        results = evaluate_task(type(command).__name__.lower(), model, split, tokens, rerank)
    if isinstance(results, dict):
        print_results(results)
    else:
        print(markdown_table(results))
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        command.out.write_text(json.dumps(results, indent=2) + "\n")


def evaluate_task(
    task: Task, model: SyncMaskModel, split: Split, tokens: TokenCache, rerank: int = 0
) -> dict[str, float]:
    """Return the metrics of a task on a split. rerank: for retrieval, see `evaluate_retrieval`.

    errors: UserError for recognition with a model that has no such classifier, and for data without triplets or labels.
    """
    if task == "retrieval":
        return evaluate_retrieval(model, split, tokens, rerank)
    if task == "composed":
        return evaluate_composed(model, split, tokens, open_triplets(split))
    if model.config.task.name != task:
        raise UserError(
            f"The model is for {model.config.task.name} and cannot classify {task}. Run `finetune {task}` first."
        )
    return evaluate_recognition(model, split, tokens)


def _evaluate_masks(command: Sync, model: SyncMaskModel, split: Split, tokens: TokenCache) -> dict | list[dict]:
    data = MaskEvalSet.of(split, tokens, model.config.image.size // model.config.image.patch)
    if data is None:
        raise UserError(f"{command.data} has no attributes in its records. Give data with boxes, such as the lookbook.")
    if command.every_rule:
        return compare_score_rules(model, data)
    return evaluate_sync(model, data) | evaluate_mlm_grounding(model, data)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
