"""What keeps a run from losing anything: where it goes on, saving on a full disk, stopping at a signal, and at batches that give nothing finite."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.distributed.group import restart_count
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.training.checkpoint import TrainState, checkpoints, save_checkpoint
from syncmask_fast.training.log import MetricsLog
from syncmask_fast.utils.errors import UserError, warn
from syncmask_fast.utils.files import replace_folder

CHECKPOINTS = "checkpoints"


def find_resume_path(config: TrainConfig, out: Path) -> Path | None:
    """The folder of the run's own checkpoints, a checkpoint that --resume names, or None for a run from the start.

    A run that began from another run's checkpoint goes on from its own once it has one: the same command may be started again and again. So does
    one that torchrun has started again, whatever --resume names.
    """
    own = out / CHECKPOINTS
    named = (
        None if config.resume in ("auto", "never") or (restart_count() and checkpoints(own)) else Path(config.resume)
    )
    if named is not None and (named.resolve().parent == own.resolve() or not checkpoints(own)):
        return named
    return own if checkpoints(own) else None


def save(folder: Path, state: TrainState, log: MetricsLog) -> bool:
    """Saves a checkpoint, after the steps before it are in metrics.jsonl; returns whether it could. On a full disk the ones before stay."""
    try:
        log.sync()
        save_checkpoint(folder, state)
    except OSError as error:
        older = checkpoints(folder)
        stays = f"{older[-1].name} stays the newest" if older else "there is none yet"
        warn(
            f"the checkpoint of step {state.step} could not be written to {folder} ({error}): {stays}, and training goes on. Free some space."
        )
        return False
    return True


def save_model(model: SyncMaskModel, folder: Path) -> None:
    """Writes a model's folder whole or not at all. errors: UserError where it cannot be written."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        replace_folder(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder} cannot be written ({error}): free some space and start again; nothing before is lost."
        ) from error


def dump_bad_batch(
    config: TrainConfig, out: Path, state: TrainState, loader: Loader, batch: Batch, skipped: int
) -> str:
    """Saves the last of a row of batches that gave nothing finite, for study; returns what to tell the user."""
    path = out / f"not-finite-step-{state.step}.safetensors"
    tensors = {
        f.name: value.cpu().contiguous()
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), torch.Tensor)
    }
    names = [f"{loader.index.shard_path(i).name}: {loader.index.key(i)}" for i in batch.sample_ids_host.tolist()]
    save_file(tensors, path, {"step": str(state.step), "epoch": str(state.epoch), "samples": json.dumps(names)})
    return (
        f"{skipped} steps in a row up to step {state.step} had a loss or gradient that is not finite (--max-skipped-steps {config.max_skipped_steps}) "
        f"and changed nothing; the last of their batches is in {path}: look at it, then start another --out with a lower --optim.lr "
        "or --precision float32."
    )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """The same for tokenizers that give a word piece the same number."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@contextlib.contextmanager
def graceful_stop(launched: bool = False) -> Iterator[list[int]]:
    """A list that Ctrl-C or SIGTERM puts its number into, so that the loop can save and leave; a second Ctrl-C stops at once.

    A second SIGTERM does not: schedulers send it to every process of a job and once more from a launcher, and only the first is meant.
    launched: by torchrun, which hands on a Ctrl-C that the process may have got already, and ends what takes too long by itself.
    """
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT and not launched:
            raise KeyboardInterrupt
        caught.append(number)
        print("\nstopping after this step (Ctrl-C once more to stop at once) ...", flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
