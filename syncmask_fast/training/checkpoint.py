"""Checkpoints: one `TrainState` to and from a folder of safetensors and JSON. Written aside, then renamed; the last two are kept.

state.json is the manifest: the layout's version, the clocks, where the run comes from, and size and SHA-256 of every other file, with a SHA-256 of
its own. docs/reliability.md says what that guarantees.

Random draws are functions of the seed, the epoch, the position and the step, so that there is no generator state to save.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import Queue
from syncmask_fast.training.optimizer import Optimizer
from syncmask_fast.utils.errors import UserError, warn
from syncmask_fast.utils.files import replace_folder, sha256, write_json

FORMAT = 2  # 1 had no checksums, and is read still
MANIFEST = "state.json"
MAX_MANIFEST = 2**20  # bytes
PARTS = ("model", "teacher", "optimizer", "memory")
NUMBERS = ("step", "epoch", "samples_done", "batches_done")


@dataclass
class FeatureBank:
    """The teacher's last features of every training sample, for the next epoch's plan."""

    images: Tensor
    """float32 [N, E]."""
    texts: Tensor
    """float32 [N, E]."""
    filled: Tensor
    """bool [N]."""

    @classmethod
    def empty(cls, samples: int, width: int, device: torch.device) -> FeatureBank:
        features = torch.zeros(2, samples, width, device=device)
        return cls(features[0], features[1], torch.zeros(samples, dtype=torch.bool, device=device))

    def update(self, at: Tensor, images: Tensor, texts: Tensor) -> None:
        self.images.index_copy_(0, at, images)
        self.texts.index_copy_(0, at, texts)
        self.filled.index_fill_(0, at, True)


@dataclass
class TrainState:
    """Everything that a run needs to go on."""

    model: SyncMaskModel
    teacher: SyncMaskModel
    optimizer: Optimizer
    queue: Queue
    bank: FeatureBank
    order: Tensor
    """int64 [N]: this epoch's plan, as places in the training split."""
    step: int = 0
    """Optimiser steps done."""
    epoch: int = 0
    samples_done: int = 0
    """Samples of this epoch's plan that are done."""
    batches_done: int = 0
    """Batches done in all (the queue's clock)."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the run was made from: training `samples`, and marks of the `data` and the `tokenizer`."""


def save_checkpoint(folder: Path, state: TrainState, keep: int = 2) -> Path:
    """Writes `folder`/step-NNNNNNNN and removes all but the newest `keep`. Returns the new one's path.

    A kill at any moment leaves the checkpoints that were there before. errors: OSError where it cannot be written; what was written of it is gone.
    """
    target = folder / f"step-{state.step:08d}"
    aside = folder / f".{target.name}.partial"
    for old in folder.glob(".step-*.partial"):  # what a kill has left
        shutil.rmtree(old, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        memory = {
            **{f"queue.{name}": value for name, value in state.queue._asdict().items()},
            **{f"bank.{name}": getattr(state.bank, name) for name in ("images", "texts", "filled")},
            "order": state.order,
        }
        parts = {
            "model": state.model.state_dict(),
            "teacher": state.teacher.state_dict(),
            "optimizer": _optimizer_tensors(state),
            "memory": memory,
        }
        for name, tensors in parts.items():
            save_file(_plain(tensors), aside / f"{name}.safetensors")
        numbers = {name: getattr(state, name) for name in NUMBERS}
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(aside.iterdir())}
        content = {"format": FORMAT, **numbers, "provenance": state.provenance, "files": files}
        write_json(aside / MANIFEST, {**content, "sha256": _digest(content)})
        replace_folder(aside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    for old in checkpoints(folder)[:-keep]:
        gone = old.with_name(f".{old.name}.partial")  # a half removed one must not look like a checkpoint
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-????????"))


def load_latest(folder: Path, state: TrainState) -> Path:
    """Fills `state` from the newest checkpoint that is whole; a damaged one is said, renamed to damaged-*, and the one before is taken.

    errors: UserError where none is whole, or where it belongs to another configuration.
    """
    while found := checkpoints(folder):
        newest = found[-1]
        try:
            _fill(newest, state, _read(newest))
            return newest
        except DamagedCheckpoint as damage:
            if len(found) == 1:
                raise UserError(
                    f"{damage}, and there is no other: copy one back, or start anew with another --out."
                ) from damage
            aside = newest.with_name(f"damaged-{newest.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newest.rename(aside)
            warn(f"{damage}: it is kept as {aside.name}, and the run goes on from {found[-2].name}.")
    raise UserError(f"{folder} holds no checkpoint.")


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fills `state` in place from a checkpoint; raises `UserError` where it is damaged or belongs to another configuration."""
    try:
        _fill(path, state, _read(path))
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}: give another with --resume, or start anew with another --out.") from damage


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are not what was written; the message names the checkpoint and the damage."""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The manifest and the tensors of a checkpoint, after a comparison of every file with its checksum.

    Nothing is unpickled, and no file is read into memory before its size is known to be what was written.
    """
    try:
        with open(path / MANIFEST, "rb") as file:
            content = json.loads(file.read(MAX_MANIFEST))
        if not isinstance(content, dict) or type(content.get("format")) is not int:
            raise ValueError(f"{MANIFEST} is not that of a checkpoint")
        if not 1 <= content["format"] <= FORMAT:
            raise UserError(
                f"{path} was written by another version (layout {content['format']}, this one reads 1 to {FORMAT}): "
                "go on with the version that wrote it, or start anew with another --out."
            )
        if content["format"] == 1:  # without checksums and origin; the rest is the same
            content |= {"provenance": {}, "files": {}}
        elif content.pop("sha256", None) != _digest(content):
            raise ValueError(f"{MANIFEST} does not have its checksum")
        if not all(type(content[name]) is int and 0 <= content[name] < 2**53 for name in NUMBERS):
            raise ValueError(f"{MANIFEST} has counts that are none")
        for name, known in content["files"].items():
            file = path / Path(name).name
            if file.stat().st_size != known["bytes"] or sha256(file) != known["sha256"]:
                raise ValueError(f"{name} does not have its checksum")
        return content, {name: load_file(path / f"{name}.safetensors") for name in PARTS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedCheckpoint(f"{path} is not a whole checkpoint ({type(error).__name__}: {reason})") from error


def _fill(path: Path, state: TrainState, content: tuple[dict[str, Any], dict[str, dict[str, Tensor]]]) -> None:
    """Fills `state` in place. errors: UserError where the checkpoint is of another configuration or of other data."""
    numbers, files = content
    _compare_origin(path, numbers["provenance"], state.provenance)
    memory = files["memory"]
    targets = {f"queue.{name}": value for name, value in state.queue._asdict().items()}
    targets |= {f"bank.{name}": getattr(state.bank, name) for name in ("images", "texts", "filled")}
    try:
        for name, value in targets.items():
            if memory[name].shape != value.shape or memory[name].dtype != value.dtype:
                raise ValueError(f"{name} is {list(memory[name].shape)}, where {list(value.shape)} is needed")
        order = memory["order"]
        if len(state.bank.filled) and not torch.equal(order.sort().values, torch.arange(len(state.bank.filled))):
            raise ValueError("its plan is not an order of the training samples")
        state.model.load_state_dict(files["model"])
        state.teacher.load_state_dict(files["teacher"])
        _load_optimizer(state, files["optimizer"])
    except (ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = "give another with --resume, or start anew with another --out"
        raise UserError(f"{path} is not a checkpoint of this run ({reason}): {mend}.") from error
    for name, value in targets.items():
        value.copy_(memory[name])
    state.order = order
    for name in NUMBERS:
        setattr(state, name, numbers[name])


def _compare_origin(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Says where the data is no longer what the run began with, and refuses where it could not go on sensibly."""
    if not saved or not ours:
        return
    if saved.get("samples") != ours["samples"]:
        raise UserError(
            f"{path} is of a run on {saved.get('samples')} training samples, but there are {ours['samples']} now: "
            "put shards that are missing or new back as they were, or start anew with another --out."
        )
    if saved.get("tokenizer") != ours["tokenizer"]:
        raise UserError(
            f"{path} is of a run with another tokenizer (one that is trained on the texts changes with them): "
            "put the data back as it was, or start anew with another --out."
        )
    if saved.get("data") != ours["data"]:
        warn(f"the data is no longer what the run of {path} began with: it goes on, but not as it would have.")


def _digest(content: dict[str, Any]) -> str:
    """The checksum of a manifest, whatever the layout of its JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, kept in state.optimizer.states()
        for key, value in kept.items()
    }


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    saved: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition(".")
        saved.setdefault(name, {})[key] = value
    unknown = saved.keys() - names.values()
    if unknown:
        raise ValueError(f"its optimiser has a state of {min(unknown)}, which the model lacks")
    for parameter, kept in state.optimizer.states():
        kept.clear()
        for key, value in saved.get(names[parameter], {}).items():
            if value.numel() not in (1, parameter.numel()):
                raise ValueError(f"its optimiser's {key} of {names[parameter]} has {value.numel()} numbers")
            kept[key] = value.to(parameter.device if key != "step" or parameter.is_cuda else "cpu")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
