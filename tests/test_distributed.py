"""Several processes train as one, over real gloo. Ranks are forks of one process; a single test uses torchrun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from syncmask_fast import finetune
from syncmask_fast.distributed import group as distributed
from syncmask_fast.distributed.group import init_distributed, local_device, shard_bounds
from syncmask_fast.train import main
from syncmask_fast.training.checkpoint import checkpoints
from syncmask_fast.utils.errors import UserError
from tests.distributed_worker import CHECKS
from tests.faults.launcher import Launcher
from tests.helpers import FLAGS, run_rows

ROOT = Path(__file__).parent.parent
STEPS, SAVED = 20, 5
# Every objective, the convolutional stem with its batch norms, Muon, a queue, soft targets; 4 steps of ITC, then masks
# from random to sync; the second epoch's plan is made from features.
SETTINGS = [
    *FLAGS,
    *"--loss.alpha 0.4 --loss.itc-only 0.2 --mask.ramp 0.2 0.3 --optim.lr 1e-5 --optim.muon-lr 1e-4".split(),
    *f"--precision float32 --steps {STEPS} --save-every {SAVED}".split(),
    *"--decoder torchvision --eval.holdout-fraction 0".split(),
]
OBJECTIVES = {"loss", "loss_itc", "loss_itm", "loss_mlm", "loss_mim", "loss_presence"}


@pytest.fixture(scope="module")
def data(lookbook: Path) -> Path:
    return lookbook / "train"


def flags(data: Path, out: Path) -> list[str]:
    return ["tiny", *SETTINGS, "--data", str(data), "--out", str(out)]


def train_on(launcher: Launcher, ranks: int, data: Path, out: Path) -> str:
    """Train to the end on several ranks; return what they printed."""
    log = out.with_suffix(".log")
    launcher.start_ranks(ranks, "syncmask_fast.train", flags(data, out), log)
    assert launcher.wait_ranks() == [0] * ranks, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("ranks") / "one"
    main(flags(data, out))
    return out


@pytest.fixture(scope="module")
def two(launcher: Launcher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks."""
    out = tmp_path_factory.mktemp("ranks") / "two"
    printed = train_on(launcher, 2, data, out)
    assert printed.count(f"step {STEPS:>5}/{STEPS}") == 1  # only one rank prints
    assert "2 x cpu" in printed
    return out


def saved(out: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def wait_for_checkpoint(out: Path, alive: Path, log: Path) -> None:
    """Return once the run has written its first checkpoint; fail if the process with this /proc folder ends before."""
    while not checkpoints(out / "checkpoints"):
        assert alive.exists(), log.read_text()
        time.sleep(0.02)


def assert_close(ours: Path, theirs: Path) -> None:
    """Compare weights, teacher, queue and feature bank of the last step; the epoch order and the queue's ids
    exactly.
    """
    for name in ("model", "teacher", "memory"):
        a, b = saved(ours, name), saved(theirs, name)
        assert a.keys() == b.keys()
        for key, value in a.items():
            # AdamW and Muon scale gradients that are rounding errors to the size of the others.
            assert torch.allclose(value.double(), b[key].double(), rtol=0, atol=3e-4), (name, key)
    for key in ("order", "queue.product_ids"):
        assert torch.equal(saved(ours, "memory")[key], saved(theirs, "memory")[key])


def test_pieces(launcher: Launcher, tmp_path: Path):
    """Gathering, exchange, summed gradients, batch norms and every loss on three unequal shards:
    distributed_worker.py.
    """
    log = tmp_path / "log"
    launcher.start_ranks(3, "tests.distributed_worker", [], log)
    assert launcher.wait_ranks() == [0, 0, 0], log.read_text()
    assert log.read_text().splitlines() == [f"{check.__name__} passed" for check in CHECKS]


def test_two_ranks(one: Path, two: Path):
    """Two ranks compute what one process does."""
    ours, theirs = run_rows(two), run_rows(one)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert ours[-1]["epoch"] >= 2
    assert set(ours[-1]) >= OBJECTIVES
    different_masks = 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() & OBJECTIVES == b.keys() & OBJECTIVES
        error = {name: abs(a[name] - b[name]) for name in a.keys() & OBJECTIVES}
        assert error["loss"] <= (1e-5 if a["step"] == 1 else 1e-2), (a["step"], error)
        # Where two scores are equal up to rounding, another token or patch is masked. The losses of unmasked pairs
        # do not see it.
        assert all(error[name] < 1e-4 for name in error.keys() - {"loss", "loss_mlm", "loss_mim"}), (a["step"], error)
        different_masks += max(error.values()) >= 1e-4
    assert different_masks <= 3
    assert_close(two, one)


def test_other_number_of_ranks(launcher: Launcher, data: Path, one: Path, tmp_path: Path):
    """SIGTERM saves and ends a run of two ranks; one process and three ranks (5, 5 and 6 pairs) resume it."""
    out, log = tmp_path / "stopped", tmp_path / "stopped.log"
    ranks = launcher.start_ranks(2, "syncmask_fast.train", flags(data, out), log)
    wait_for_checkpoint(out, Path(f"/proc/{ranks[0]}"), log)
    for rank in ranks:
        os.kill(rank, signal.SIGTERM)
    assert launcher.wait_ranks() == [128 + signal.SIGTERM] * 2, log.read_text()
    step = int(checkpoints(out / "checkpoints")[-1].name.split("-")[1])
    assert log.read_text().count(f"Stopped at step {step} of {STEPS}") == 1
    assert SAVED <= step < STEPS
    copy = shutil.copytree(out, tmp_path / "copy")
    main(flags(data, copy))
    assert_close(copy, one)
    assert "3 x cpu" in train_on(launcher, 3, data, out)
    assert_close(out, one)


def process_of(rank: int, mark: str) -> int:
    """Return the process that is this rank of the run whose command line has the mark."""
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


def test_torchrun_restart(data: Path, two: Path, tmp_path: Path):
    """torchrun restarts a run whose rank was killed; it ends bit for bit as the run that was never killed."""
    out, log = tmp_path / "run", tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*torchrun, "-m", "syncmask_fast.train", *flags(data, out)]
    with open(log, "w") as printed:
        run = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, cwd=ROOT)
        while not checkpoints(out / "checkpoints"):
            assert run.poll() is None, log.read_text()
            time.sleep(0.02)
        os.kill(process_of(1, str(out)), signal.SIGKILL)
        assert run.wait() == 0, log.read_text()
    assert "resuming from" in log.read_text()
    assert [row["step"] for row in run_rows(out)] == list(range(1, STEPS + 1))
    for name in ("model", "teacher", "memory"):
        a, b = saved(out, name), saved(two, name)
        assert all(torch.equal(a[key], b[key]) for key in a)


# User errors


@pytest.mark.parametrize(("total", "ranks"), [(16, 1), (16, 3), (2, 4), (0, 2)])
def test_shard_bounds(total: int, ranks: int):
    bounds = shard_bounds(total, ranks)
    sizes = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    assert (len(sizes), sum(sizes)) == (ranks, total)
    assert max(sizes) - min(sizes) <= 1


def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK.*torchrun"), init_distributed(torch.device("cpu")):
        pass


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="nproc_per_node 2"):
        local_device("auto")
    with pytest.raises(UserError, match="--device cuda"):
        local_device("cuda:0")
    assert local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert local_device("auto") == "cuda:1"


def test_restarts_need_a_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(UserError, match="--out"):
        main(["tiny"])


def test_more_ranks_than_pairs():
    with pytest.raises(UserError, match="--batch-size 3 .* Give 4"):
        distributed.check_batch_size(3, 4, "global")
    with pytest.raises(UserError, match="Give 8"):
        distributed.check_batch_size(7, 4, "local")


def test_finetune_is_single_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        finetune.main(["retrieval", "--model", "none"])


def test_one_rank_complains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    with pytest.raises(UserError, match="--batch-size"):
        main(["tiny", "--batch-size", "1"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as found:
        main(["tiny", "--batch-size", "1"])
    assert found.value.code == 2
    assert capsys.readouterr() == ("", "")
