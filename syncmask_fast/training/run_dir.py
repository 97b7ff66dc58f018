"""The folder of a run: its name, its config.json, and whether a command may resume it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from syncmask_fast.config import TrainConfig, from_json, to_json
from syncmask_fast.distributed.group import Group, restart_count
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.training.checkpoint import FOLDER, save_model
from syncmask_fast.utils.errors import UserError
from syncmask_fast.utils.files import write_json

# Settings that change neither the model nor the order of its samples.
RESUME_MAY_CHANGE = {
    "out", "resume", "steps", "epochs", "save_every", "log_every", "max_skipped_steps", "device", "decode_threads",
    "decoder", "eval", "compile", "grad_checkpointing",
}  # fmt: skip


def create_run_dir(config: TrainConfig, group: Group) -> TrainConfig:
    """Create the run's folder, or check that the existing one is of this configuration; return the config with `out`.

    errors: UserError if the folder holds another run, or one that --resume never forbids to resume, or is not writable.
    """
    out = group.broadcast_object(config.out or _default_run_dir(config))
    config = dataclasses.replace(config, out=out)
    if not group.is_main:
        return config
    path = out / "config.json"
    # A run that failed before its first step does not count as started.
    started = any((out / name).exists() for name in ("metrics.jsonl", FOLDER))
    if path.is_file() and started:
        if config.resume == "never" and not restart_count():
            raise UserError(f"{out} already contains a run. Choose another --out, or drop --resume never to resume it.")
        # Compare what is saved with what would be saved, so defaults of both are equal.
        before, now = to_json(from_json(TrainConfig, _read_json(path))), to_json(config)
        changed = sorted(name for name in now if now[name] != before[name] and name not in RESUME_MAY_CHANGE)
        if changed:
            raise UserError(
                f"{out} contains a run with other settings ({', '.join(changed)}). "
                "Use the same settings to resume it, or choose another --out."
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, to_json(config))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}). Choose another --out.") from error
    if out.parent.name == "runs":
        _point_latest_to(out)
    return config


def save_if_best(run_dir: Path, model: SyncMaskModel, step: int, metric: str, value: float) -> None:
    """Save the model as the run's if its validation metric is the best so far (best.json)."""
    # A resumed run repeats its steps exactly, so a best model from after the checkpoint stays the best.
    path = run_dir / "best.json"
    best = _read_json(path)["value"] if path.is_file() else -math.inf
    print(f"step {step:>5}: validation {metric} {value:.2f}" + (" (best so far)" if value > best else ""), flush=True)
    # The model first: a kill between both leaves the better model under the old value, and is repaired at the resume.
    if value > best:
        save_model(model, run_dir / "model")
        write_json(path, {"step": step, "metric": metric, "value": value})


def _default_run_dir(config: TrainConfig) -> Path:
    name = config.preset if config.task.name == "pretraining" else config.task.name
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _point_latest_to(out: Path) -> None:
    # A convenience for people: a folder of that name, or a file system without links, is left alone.
    latest = out.parent / "latest"
    with contextlib.suppress(OSError):
        if latest.is_symlink() or not latest.exists():
            latest.unlink(missing_ok=True)
            latest.symlink_to(out.name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Repair it, or choose another --out.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object. Repair it, or choose another --out.")
    return content
