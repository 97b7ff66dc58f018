"""Checkpoints: one `TrainState` to and from a folder of safetensors and JSON. Written aside, then renamed; the last two are kept.

Random draws are functions of the seed, the epoch, the position and the step, so that there is no generator state to save.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from syncmask_fast.errors import UserError
from syncmask_fast.losses import Queue
from syncmask_fast.model import SyncMaskModel
from syncmask_fast.optimizer import Optimizer

FORMAT = 1


@dataclass
class FeatureBank:
    """The teacher's last features of every training sample, for the next epoch's plan."""

    images: Tensor
    """float32 [N, E]."""
    texts: Tensor
    """float32 [N, E]."""
    seen: Tensor
    """bool [N]."""

    @classmethod
    def empty(cls, samples: int, width: int, device: torch.device) -> FeatureBank:
        features = torch.zeros(2, samples, width, device=device)
        return cls(features[0], features[1], torch.zeros(samples, dtype=torch.bool, device=device))

    def store(self, at: Tensor, images: Tensor, texts: Tensor) -> None:
        self.images.index_copy_(0, at, images)
        self.texts.index_copy_(0, at, texts)
        self.seen.index_fill_(0, at, True)


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
    position: int = 0
    """Samples of this epoch's plan that are done."""
    batches: int = 0
    """Batches done in all (the queue's clock)."""


def save_checkpoint(folder: Path, state: TrainState, keep: int = 2) -> Path:
    """Writes `folder`/step-NNNNNNNN and removes all but the newest `keep`. Returns the new one's path."""
    target = folder / f"step-{state.step:08d}"
    aside = folder / f".step-{state.step:08d}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(_plain(state.model.state_dict()), aside / "model.safetensors")
    save_file(_plain(state.teacher.state_dict()), aside / "teacher.safetensors")
    save_file(_plain(_optimizer_tensors(state)), aside / "optimizer.safetensors")
    memory = {
        **{f"queue.{name}": value for name, value in state.queue._asdict().items()},
        **{f"bank.{name}": getattr(state.bank, name) for name in ("images", "texts", "seen")},
        "order": state.order,
    }
    save_file(_plain(memory), aside / "memory.safetensors")
    numbers = {"format": FORMAT, **{name: getattr(state, name) for name in ("step", "epoch", "position", "batches")}}
    (aside / "state.json").write_text(json.dumps(numbers) + "\n")
    for file in aside.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-????????"))


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fills `state` in place from a checkpoint; raises `UserError` where it is damaged or belongs to another configuration."""
    try:
        numbers = json.loads((path / "state.json").read_text())
        if numbers.pop("format") != FORMAT:
            raise ValueError("it was written by another version")
        files = {name: load_file(path / f"{name}.safetensors") for name in ("model", "teacher", "optimizer", "memory")}
        state.model.load_state_dict(files["model"])
        state.teacher.load_state_dict(files["teacher"])
        memory = files["memory"]
        for name, value in state.queue._asdict().items():
            value.copy_(memory[f"queue.{name}"])
        for name in ("images", "texts", "seen"):
            getattr(state.bank, name).copy_(memory[f"bank.{name}"])
        state.order = memory["order"]
        for name in ("step", "epoch", "position", "batches"):
            setattr(state, name, numbers[name])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = "give another with --resume, or start anew with another --out"
        raise UserError(f"{path} is not a checkpoint of this run ({reason}): {mend}.") from error
    _load_optimizer(state, files["optimizer"])


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {f"{names[parameter]}.{key}": value for parameter, kept in state.optimizer.states() for key, value in kept.items()}


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    saved: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key = path.rsplit(".", 1)
        saved.setdefault(name, {})[key] = value
    for parameter, kept in state.optimizer.states():
        kept.clear()
        for key, value in saved.get(names[parameter], {}).items():
            kept[key] = value.to(parameter.device if key != "step" or parameter.is_cuda else "cpu")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
