"""Several processes train as one: real processes, real gloo, started by torchrun as users start them."""

from __future__ import annotations

import json
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

ROOT = Path(__file__).parent.parent
STEPS, SAVED = 20, 5
# Every objective, the convolutional stem with its batch norms, Muon, a queue, soft targets; 4 steps of ITC alone, then masks from random to sync; the
# second epoch's plan is made from features.
SETTINGS = (
    "--image.size 48 --image.patch 16 --image.width 32 --image.depth 2 --image.heads 2 --text.width 32 --text.heads 2 --text.layers 1"
    " --text.fusion-layers 2 --text.pretrain-steps 2 --embed-dim 16 --batch-size 16 --loss.queue 32 --loss.alpha 0.4 --loss.itc-only 0.2"
    f" --mask.ramp 0.2 0.3 --optim.lr 1e-5 --optim.muon-lr 1e-4 --precision float32 --steps {STEPS} --save-every {SAVED} --log-every 2"
    " --decode-threads 1 --device cpu --decoder torchvision --eval.holdout-fraction 0"
).split()
OBJECTIVES = {"loss", "loss_itc", "loss_itm", "loss_mlm", "loss_mim", "loss_presence"}


@pytest.fixture(scope="module")
def data(lookbook: Path) -> Path:
    return lookbook / "train"


def torchrun(ranks: int, *words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words]


def train_on(ranks: int, data: Path, out: Path, *words: str) -> str:
    """A run to its end; returns what it printed."""
    command = torchrun(
        ranks, *words, "-m", "syncmask_fast.train", "tiny", *SETTINGS, "--data", str(data), "--out", str(out)
    )
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "one"
    main(["tiny", *SETTINGS, "--data", str(data), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "two"
    printed = train_on(2, data, out)
    assert printed.count(f"step {STEPS:>5}/{STEPS}") == 1  # one rank alone prints
    assert "2 x cpu" in printed
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def kept(out: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_close(ours: Path, theirs: Path) -> None:
    """Weights, teacher, queue and feature bank of the last step; the plan, exactly."""
    for name in ("model", "teacher", "memory"):
        a, b = kept(ours, name), kept(theirs, name)
        assert a.keys() == b.keys()
        for key, value in a.items():
            # AdamW and Muon bring gradients that are rounding alone to the size of the others.
            assert torch.allclose(value.double(), b[key].double(), rtol=0, atol=3e-4), (
                name,
                key,
                (value.double() - b[key]).abs().max(),
            )
    assert torch.equal(kept(ours, "memory")["order"], kept(theirs, "memory")["order"])
    assert torch.equal(kept(ours, "memory")["queue.product_ids"], kept(theirs, "memory")["queue.product_ids"])


def test_pieces_on_three_ranks():
    """Gathering, fetching, summed gradients, batch norms and every loss, on unequal parts: see rank_checks.py."""
    found = subprocess.run(torchrun(3, "-m", "tests.rank_checks"), capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("passed") == 8


def test_two_ranks_compute_what_one_does(one: Path, two: Path):
    ours, theirs = rows(two), rows(one)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert ours[-1]["epoch"] >= 2
    assert set(ours[-1]) >= OBJECTIVES
    fell_otherwise = 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() & OBJECTIVES == b.keys() & OBJECTIVES
        apart = {name: abs(a[name] - b[name]) for name in a.keys() & OBJECTIVES}
        assert apart["loss"] <= (1e-5 if a["step"] == 1 else 1e-2), (a["step"], apart)
        # Where two scores are the same to rounding, another word or patch is masked; the losses of the whole pairs do not see it.
        assert all(apart[name] < 1e-4 for name in apart.keys() - {"loss", "loss_mlm", "loss_mim"}), (a["step"], apart)
        fell_otherwise += max(apart.values()) >= 1e-4
    assert fell_otherwise <= 3
    assert_close(two, one)


def process_of(rank: int, mark: str) -> int:
    """The process that is this rank of the run whose command line has the mark."""
    for folder in Path("/proc").iterdir():
        try:
            words, environment = (
                (folder / "cmdline").read_bytes().split(b"\0"),
                (folder / "environ").read_bytes().split(b"\0"),
            )
        except OSError:
            continue
        if mark.encode() in words and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


def start_until_saved(data: Path, out: Path, *words: str) -> subprocess.Popen:
    """A run of two ranks, which has written its first checkpoint."""
    command = torchrun(
        2, *words, "-m", "syncmask_fast.train", "tiny", *SETTINGS, "--data", str(data), "--out", str(out)
    )
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    while not checkpoints(out / "checkpoints"):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.02)
    return run


def test_a_killed_rank_is_started_again(data: Path, two: Path, tmp_path: Path):
    out = tmp_path / "run"
    run = start_until_saved(data, out, "--max-restarts=1")
    os.kill(process_of(1, str(out)), signal.SIGKILL)
    printed = run.communicate()[0]
    assert run.returncode == 0, printed
    assert "resuming from" in printed
    assert [row["step"] for row in rows(out)] == list(range(1, STEPS + 1))
    for name in ("model", "teacher", "memory"):  # bit for bit what was never killed
        a, b = kept(out, name), kept(two, name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_resume_with_another_number_of_ranks(data: Path, one: Path, tmp_path: Path):
    """SIGTERM saves and ends a run of two; one process and three (16 pairs: 5, 5 and 6) take it to its end."""
    out = tmp_path / "stopped"
    run = start_until_saved(data, out)
    run.send_signal(signal.SIGTERM)
    printed = run.communicate()[0]
    assert run.returncode != 0
    assert printed.count("Stopped at step") == 1, printed
    step = int(checkpoints(out / "checkpoints")[-1].name.split("-")[1])
    assert f"Stopped at step {step} of {STEPS}" in printed
    assert SAVED <= step < STEPS
    copy = shutil.copytree(out, tmp_path / "copy")
    main(["tiny", *SETTINGS, "--data", str(data), "--out", str(copy)])
    assert_close(copy, one)
    assert "3 x cpu" in train_on(3, data, out)
    assert_close(out, one)


# What users get wrong


@pytest.mark.parametrize(("total", "ranks"), [(16, 1), (16, 3), (2, 4), (0, 2)])
def test_shares_are_even_but_for_one(total: int, ranks: int):
    bounds = shard_bounds(total, ranks)
    sizes = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    assert (len(sizes), sum(sizes)) == (ranks, total)
    assert max(sizes) - min(sizes) <= 1


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch):
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


def test_fine_tuning_runs_in_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        finetune.main(["retrieval", "--model", "none"])


def test_one_process_of_a_machine_complains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    with pytest.raises(UserError, match="--batch-size"):
        main(["tiny", "--batch-size", "1"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as found:
        main(["tiny", "--batch-size", "1"])
    assert found.value.code == 2
    assert capsys.readouterr() == ("", "")
