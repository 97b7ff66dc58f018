"""Kills a run at random moments, starts it again each time, and compares its end with that of a run that was never
stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from syncmask_fast.training.checkpoint import COUNTERS, checkpoints
from tests.faults.launcher import Launcher
from tests.helpers import FLAGS, learned

MOMENTS = ("while starting", "within a step", "within a checkpoint")


def arguments(data: Path, out: Path, steps: int, save_every: int = 2) -> list[str]:
    schedule = f"--loss.itc-only 0.2 --mask.ramp 0.2 0.6 --eval.draws 1 --steps {steps} --save-every {save_every}"
    return ["tiny", *FLAGS, *schedule.split(), "--data", str(data), "--out", str(out)]


def kill_often(
    launcher: Launcher, argv: list[str], out: Path, kills: int, seed: int = 0, reach: int = 1
) -> Counter[str]:
    """Starts a run and kills it by SIGKILL, `kills` times, then lets it end. Returns how many kills fell into which
    moment.

    The moment of each kill is drawn: some time after the start, some time after rows of metrics.jsonl were written, or
    while a checkpoint is being written; which of the next `reach` writes of rows, or of the next `reach` checkpoints,
    is drawn too. After each kill the newest checkpoint must not be older than the one before.
    """
    draw = random.Random(seed)
    log, moments, newest = out.with_suffix(".log"), Counter(), 0
    while moments.total() < kills:
        pid = launcher.start(argv, log)
        wanted = draw.choice(MOMENTS)
        _wait_for(wanted, out, pid, draw, draw.randint(1, reach))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = launcher.wait()
        if code == 0:
            raise AssertionError(f"the run was over after {moments.total()} of {kills} kills: give it more steps")
        assert code == -signal.SIGKILL, f"it ended with {code} instead: {log.read_text()[-2000:]}"
        moments[wanted] += 1
        found = [int(path.name[-8:]) for path in checkpoints(out / "checkpoints")]
        assert max(found, default=0) >= newest, f"checkpoint {newest} was lost"
        newest = max(found, default=0)
    code = launcher.run(argv, log)
    assert code == 0, log.read_text()[-2000:]
    return moments


def _wait_for(moment: str, out: Path, pid: int, draw: random.Random, times: int) -> None:
    """Returns at the moment, or when the process is gone, which `kill_often` then finds."""
    if moment == "while starting":
        time.sleep(draw.uniform(0, 0.5))
        return
    metrics, folder = out / "metrics.jsonl", out / "checkpoints"

    def now() -> object:
        if moment == "within a checkpoint":
            return frozenset(folder.glob(".step-*"))
        return metrics.stat().st_size if metrics.exists() else 0

    seen = now()
    while times and Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        found = now()
        if (found - seen) if isinstance(found, frozenset) else found > seen:
            times -= 1
        seen = found
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.01 if moment == "within a checkpoint" else 0.3))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike torch.equal: NaN is NaN, and 0 is not -0."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    )


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs, to the last bit: metrics, checkpoints, model, results."""
    found = []
    if learned(one) != learned(other):
        found.append("metrics.jsonl")
    last = [checkpoints(out / "checkpoints")[-1] for out in (one, other)]
    numbers = [json.loads((path / "state.json").read_text()) for path in last]
    found += [name for name in COUNTERS if numbers[0][name] != numbers[1][name]]
    files = [*sorted(path.name for path in last[0].glob("*.safetensors"))]
    for a, b in [(last[0] / name, last[1] / name) for name in files] + [
        (one / "model/model.safetensors", other / "model/model.safetensors")
    ]:
        ours, theirs = load_file(a), load_file(b)
        same_names = ours.keys() == theirs.keys()
        found += [f"{a.name}: names"] if not same_names else []
        found += [f"{a.name}: {name}" for name in ours if same_names and not same_bits(ours[name], theirs[name])]
    if json.loads((one / "results.json").read_text()) != json.loads((other / "results.json").read_text()):
        found.append("results.json")
    return found
