"""Runs that are killed, told to stop, or out of disk, and started again with the same command, end with the bits of
one that was never stopped.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from syncmask_fast.sources.lookbook import draw_lookbook
from syncmask_fast.training.checkpoint import checkpoints
from tests.faults.kills import arguments, differences, kill_often
from tests.faults.launcher import Launcher
from tests.helpers import run_rows

STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "lookbook"
    draw_lookbook(folder, products=22, eval_products=12, size=48, workers=1)
    return folder


@pytest.fixture(scope="module")
def whole(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert launcher.run(arguments(data, out, STEPS), out.with_suffix(".log")) == 0, out.with_suffix(".log").read_text()
    return out


def test_killed_and_started_again(launcher: Launcher, data: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    moments = kill_often(launcher, arguments(data, out, STEPS), out, kills=4, seed=1)
    assert moments.total() == 4
    assert differences(whole, out) == []


def test_the_comparison_sees_a_difference(launcher: Launcher, data: Path, whole: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert launcher.run([*arguments(data, out, STEPS), "--seed", "1"], out.with_suffix(".log")) == 0
    found = differences(whole, out)
    assert "metrics.jsonl" in found
    assert any(name.startswith("optimizer.safetensors") for name in found)


def test_sigterm_saves_and_leaves(launcher: Launcher, data: Path, whole: Path, tmp_path: Path):
    """As a scheduler does it, which may send the signal twice."""
    out, log = tmp_path / "run", tmp_path / "run.log"
    argv = arguments(data, out, STEPS, save_every=1000)
    pid = launcher.start(argv, log)
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    assert launcher.wait() == 128 + signal.SIGTERM
    (saved,) = checkpoints(out / "checkpoints")
    step = int(saved.name[-8:])
    assert 0 < step < STEPS
    assert f"Stopped at step {step} of {STEPS}" in log.read_text()
    assert [row["step"] for row in run_rows(out)] == list(range(1, step + 1))
    assert launcher.run(argv, log) == 0
    assert differences(whole, out) == []


def test_disk_full_during_a_checkpoint(launcher: Launcher, data: Path, whole: Path, tmp_path: Path):
    """No file may grow beyond 100 KB, as optimizer.safetensors does.

    Training continues without a checkpoint and warns.
    """
    out, log = tmp_path / "run", tmp_path / "run.log"
    argv = arguments(data, out, STEPS, save_every=4)
    assert launcher.run(argv, log, file_limit=100_000) == 2
    said = log.read_text()
    assert f"WARNING: The checkpoint of step 4 could not be written to {out / 'checkpoints'}" in said
    assert "there is none yet, and training continues" in said
    assert "WARNING: The checkpoint of step 8" in said
    assert said.splitlines()[-1].startswith(f"error: {out / 'model'} cannot be written")
    assert "Traceback" not in said
    assert list((out / "checkpoints").iterdir()) == []  # nothing half written
    assert launcher.run(argv, log) == 0
    assert differences(whole, out) == []
