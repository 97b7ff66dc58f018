"""Checkpoints: save a `TrainState` to a folder of safetensors and JSON, and resume from it.

A checkpoint is written to a temporary folder and then renamed; the last two are kept. state.json is the manifest:
version, counters, provenance, and size and SHA-256 of every other file, with a SHA-256 of its own
(docs/reliability.md).

Random draws are functions of seed, epoch, position and step, so there is no generator state to save.
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
from tokenizers import Tokenizer
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.distributed.group import Group, one_line, restart_count
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.memory import FeatureBank, Queue, make_teacher
from syncmask_fast.training.log import MetricsLog
from syncmask_fast.training.optimizer import Optimizer, make_optimizer
from syncmask_fast.utils.errors import UserError, warn
from syncmask_fast.utils.files import replaced_folder, sha256, write_json

FORMAT = 3
FOLDER = "checkpoints"
MANIFEST = "state.json"
MAX_MANIFEST_BYTES = 2**20
TENSOR_FILES = ("model", "teacher", "optimizer", "memory")
COUNTERS = ("step", "epoch", "samples_done", "batches_done")


@dataclass
class TrainState:
    """Everything that a run needs to resume."""

    model: SyncMaskModel
    teacher: SyncMaskModel
    optimizer: Optimizer
    queue: Queue
    bank: FeatureBank
    order: Tensor
    """int64 [N]: this epoch's order of the training items."""
    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    samples_done: int = 0
    """Items of this epoch's order that are done."""
    batches_done: int = 0
    """Batches done in all, which gives the queue's position."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Number of training `samples`, and fingerprints of the `data` and the `tokenizer`."""

    @classmethod
    def create(cls, model: SyncMaskModel, config: TrainConfig, provenance: dict[str, Any]) -> TrainState:
        """Return the state of step 0 around an initialized model."""
        items = provenance["samples"]
        return cls(
            model,
            make_teacher(model),
            make_optimizer(model, config.optim),
            Queue.empty(config.loss.queue, config.embed_dim, model.device),
            FeatureBank.empty(items, config.embed_dim, model.device),
            torch.arange(items),
            provenance=provenance,
        )

    def memory(self) -> dict[str, Tensor]:
        """Return the tensors of queue and feature bank by the names that they have in a checkpoint."""
        queue = {f"queue.{name}": value for name, value in self.queue._asdict().items()}
        return queue | {f"bank.{name}": getattr(self.bank, name) for name in ("images", "texts", "filled")}


def find_resume_path(config: TrainConfig, run_dir: Path) -> Path | None:
    """Return the folder of the run's own checkpoints, the checkpoint that --resume names, or None for a new run.

    A run that started from another run's checkpoint resumes from its own once it has one, so the same command can be
    repeated. The same holds for a run that torchrun has restarted, whatever --resume names.
    """
    # Own checkpoints win: they are later than the one that --resume named when the run started.
    own = run_dir / FOLDER
    has_own = bool(checkpoints(own))
    if config.resume not in ("auto", "never") and not (restart_count() and has_own):
        named = Path(config.resume)
        if not has_own or named.resolve().parent == own.resolve():
            return named
    return own if has_own else None


def resume(path: Path, state: TrainState, group: Group) -> Path:
    """Fill `state` from a checkpoint, or from the latest one in a folder of them; return its path.

    errors: UserError if it is damaged or belongs to another run, or if a rank does not find it.
    """
    if not group.is_main and not path.exists():
        raise UserError(
            f"{path} is not on the machine of rank {group.rank}. Give an --out in a folder that all machines share."
        )
    # Rank 0 alone looks for the latest complete one, because it may rename damaged ones.
    if path.name == FOLDER and group.is_main:
        path = load_latest(path, state)
        return group.broadcast_object(path)
    path = group.broadcast_object(path)
    load_checkpoint(path, state)
    return path


def save(run_dir: Path, state: TrainState, log: MetricsLog) -> bool:
    """Save a checkpoint after the steps before it are in metrics.jsonl; return whether that worked.

    On a full disk the earlier checkpoints stay, and training continues.
    """
    folder = run_dir / FOLDER
    try:
        # In this order: a resumed run must find the rows of all steps before its checkpoint.
        log.fsync()
        save_checkpoint(folder, state)
    except OSError as error:
        older = checkpoints(folder)
        latest = f"{older[-1].name} stays the latest" if older else "there is none yet"
        warn(
            f"The checkpoint of step {state.step} could not be written to {folder} ({error}); {latest}, and training "
            "continues. Free some space."
        )
        return False
    return True


def save_model(model: SyncMaskModel, folder: Path) -> None:
    """Write a model's folder completely or not at all. errors: UserError if it cannot be written."""
    try:
        with replaced_folder(folder) as partial:
            model.save_pretrained(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}). Free some space and run the same command; it resumes."
        ) from error


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 that is equal for tokenizers with the same ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def save_checkpoint(folder: Path, state: TrainState, keep: int = 2) -> Path:
    """Write `folder`/step-NNNNNNNN, remove all but the latest `keep`, and return the new path.

    A kill at any moment leaves the earlier checkpoints intact. errors: OSError if it cannot be written; nothing of it
    stays.
    """
    target = folder / f"step-{state.step:08d}"
    # Left by a kill.
    for old in folder.glob(".step-*.partial"):
        shutil.rmtree(old, ignore_errors=True)
    tensors = {
        "model": state.model.state_dict(),
        "teacher": state.teacher.state_dict(),
        "optimizer": _optimizer_tensors(state),
        "memory": state.memory() | {"order": state.order},
    }
    try:
        with replaced_folder(target) as partial:
            for name in TENSOR_FILES:
                save_file(_to_cpu(tensors[name]), partial / f"{name}.safetensors")
            # The manifest comes last: a folder without one is no checkpoint.
            counters = {name: getattr(state, name) for name in COUNTERS}
            files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(partial.iterdir())}
            manifest = {"format": FORMAT, **counters, "provenance": state.provenance, "files": files}
            write_json(partial / MANIFEST, {**manifest, "sha256": _digest(manifest)})
    except SafetensorError as error:  # a full disk, as safetensors says it
        raise OSError(str(error)) from error
    for old in checkpoints(folder)[:-keep]:
        # Rename first: a half removed folder must not look like a checkpoint.
        gone = old.with_name(f".{old.name}.partial")
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-????????"))


def load_latest(folder: Path, state: TrainState) -> Path:
    """Fill `state` from the latest intact checkpoint and return its path.

    A damaged one is reported and renamed to damaged-*. errors: UserError if none is intact, or if it is of another run.
    """
    while found := checkpoints(folder):
        latest = found[-1]
        try:
            _restore(latest, state, *_read(latest))
            return latest
        except DamagedCheckpoint as damage:
            if len(found) == 1:
                raise UserError(
                    f"{damage}, and no other checkpoint is left. Restore one, or start a new run with another --out."
                ) from damage
            # Renamed, not removed: the user may want to know what happened to it.
            renamed = latest.with_name(f"damaged-{latest.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            latest.rename(renamed)
            warn(f"{damage}. It is renamed to {renamed.name}, and the run resumes from {found[-2].name}.")
    raise UserError(f"{folder} contains no checkpoint.")


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fill `state` in place from a checkpoint. errors: UserError if it is damaged or of another run."""
    try:
        _restore(path, state, *_read(path))
    except DamagedCheckpoint as damage:
        raise UserError(f"{damage}. Give another with --resume, or start a new run with another --out.") from damage


class DamagedCheckpoint(Exception):
    """A checkpoint whose files differ from what was written. The message names the checkpoint and the damage."""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return the manifest and the tensors of a checkpoint after checking every file's size and SHA-256."""
    try:
        with open(path / MANIFEST, "rb") as file:
            manifest = json.loads(file.read(MAX_MANIFEST_BYTES))
        if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
            raise ValueError(f"{MANIFEST} is not that of a checkpoint")
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} was written by another version (layout {manifest['format']}; this one reads {FORMAT}). "
                "Resume with the version that wrote it, or start a new run with another --out."
            )
        if manifest.pop("sha256", None) != _digest(manifest):
            raise ValueError(f"{MANIFEST} does not have its checksum")
        if not all(type(manifest[name]) is int and 0 <= manifest[name] < 2**53 for name in COUNTERS):
            raise ValueError(f"{MANIFEST} has invalid counters")
        # Sizes come first: no file is read into memory before its size is known to be right.
        for name, known in manifest["files"].items():
            file = path / Path(name).name
            if file.stat().st_size != known["bytes"] or sha256(file) != known["sha256"]:
                raise ValueError(f"{name} does not have its checksum")
        return manifest, {name: load_file(path / f"{name}.safetensors") for name in TENSOR_FILES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({type(error).__name__}: {one_line(error)})") from error


def _restore(path: Path, state: TrainState, manifest: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Fill `state` in place. errors: UserError if the checkpoint is of another configuration or of other data."""
    _check_provenance(path, manifest["provenance"], state.provenance)
    memory, targets = tensors["memory"], state.memory()
    try:
        for name, value in targets.items():
            if memory[name].shape != value.shape or memory[name].dtype != value.dtype:
                raise ValueError(f"{name} is {list(memory[name].shape)}, where {list(value.shape)} is needed")
        order = memory["order"]
        if not torch.equal(order.sort().values, torch.arange(len(state.bank.filled))):
            raise ValueError("its order is not a permutation of the training items")
        # Shapes of queue and bank were checked first, so a checkpoint that does not fit changes nothing of them.
        state.model.load_state_dict(tensors["model"])
        state.teacher.load_state_dict(tensors["teacher"])
        _load_optimizer(state, tensors["optimizer"])
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of this run ({one_line(error)}). "
            "Give another with --resume, or start a new run with another --out."
        ) from error
    # In place: the queue's tensors may already be part of a compiled step.
    for name, value in targets.items():
        value.copy_(memory[name])
    state.order = order
    for name in COUNTERS:
        setattr(state, name, manifest[name])


def _check_provenance(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Warn if the data has changed since the run started; raise `UserError` if resuming would make no sense."""
    # The bank has a row for each training item, and token embeddings belong to one vocabulary.
    if not saved or not ours:
        return
    if saved.get("samples") != ours["samples"]:
        raise UserError(
            f"{path} is of a run on {saved.get('samples')} training samples, but there are {ours['samples']} now. "
            "Restore missing shards and remove new ones, or start a new run with another --out."
        )
    if saved.get("tokenizer") != ours["tokenizer"]:
        raise UserError(
            f"{path} is of a run with another tokenizer (one that is trained on the texts changes with them). "
            "Restore the data, or start a new run with another --out."
        )
    if saved.get("data") != ours["data"]:
        warn(f"The data has changed since the run of {path} started. The run resumes, but not bit for bit.")


def _digest(manifest: dict[str, Any]) -> str:
    """Return the checksum of a manifest, independent of the JSON's layout."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    # By parameter name, not by number: the optimizer's groups may change between versions.
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, entries in state.optimizer.parameter_states()
        for key, value in entries.items()
    }


def _load_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    saved: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition(".")
        saved.setdefault(name, {})[key] = value
    unknown = saved.keys() - names.values()
    if unknown:
        raise ValueError(f"its optimizer has a state of {min(unknown)}, which the model lacks")
    for parameter, entries in state.optimizer.parameter_states():
        entries.clear()
        for key, value in saved.get(names[parameter], {}).items():
            if value.numel() not in (1, parameter.numel()):
                raise ValueError(f"its optimizer's {key} of {names[parameter]} has {value.numel()} numbers")
            # torch keeps Adam's step counts on the CPU unless the parameter is on CUDA.
            entries[key] = value.to(parameter.device if key != "step" or parameter.is_cuda else "cpu")


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies that share no memory, as safetensors demands."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
