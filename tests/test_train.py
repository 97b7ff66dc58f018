"""Training from end to end on drawn images: a run's folder, stop and resume, every mode, and user errors."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from syncmask_fast import train
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.train import main
from syncmask_fast.training.checkpoint import checkpoints
from syncmask_fast.utils.errors import UserError, run_command
from tests.helpers import FLAGS, SIX_STEPS, SPEED, learned, run_rows, write_plain

ROOT = Path(__file__).parent.parent
KEYS = {"step", "epoch", *(SPEED - {"plan_s"}), "lr", "loss", "loss_itc", "loss_presence"}
LOSSES = ("loss_itc", "loss_itm", "loss_mlm", "loss_mim")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "shards"
    write_plain(folder, 70)
    return folder


@pytest.fixture(scope="module")
def run(lookbook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, which go into the second epoch, without a break; loaded with DALI."""
    out = tmp_path_factory.mktemp("run") / "whole"
    main(["tiny", *FLAGS, *SIX_STEPS, "--decoder", "dali", "--data", str(lookbook), "--out", str(out)])
    return out


def assert_same_model(a: Path, b: Path) -> None:
    ours, theirs = (SyncMaskModel.from_pretrained(out / "model").state_dict() for out in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# A whole run


def test_folder_of_a_run(run: Path, lookbook: Path):
    assert {"config.json", "metrics.jsonl", "results.json", "report.html", "checkpoints", "model"} <= {
        p.name for p in run.iterdir()
    }
    assert not [p for p in run.rglob("*") if "partial" in p.name]
    config = json.loads((run / "config.json").read_text())
    assert config["batch_size"] == 16
    assert config["data"] == str(lookbook)
    assert [p.name for p in checkpoints(run / "checkpoints")] == ["step-00000003", "step-00000006"]
    model = SyncMaskModel.from_pretrained(run / "model")
    assert model.encode_text(["a red dress"]).shape == (1, 16)
    assert (run / "report.html").stat().st_size > 20_000


def test_metrics_of_every_step(run: Path):
    found = run_rows(run)
    assert [row["step"] for row in found] == list(range(1, 7))
    assert [row["epoch"] for row in found] == sorted(row["epoch"] for row in found)
    assert found[-1]["epoch"] == 1  # the second epoch was reached, so that its plan was made from features
    for row in found:
        assert set(row) >= KEYS
        assert all(math.isfinite(value) for value in row.values())
        assert row["pairs_per_s"] > 0
        assert row["mfu"] >= 0
        assert row["peak_gib"] > 0.05
        assert 0 <= row["data_wait_share"] <= 1
        fused = row["step"] > 2
        assert all((name in row) == (fused or name == "loss_itc") for name in LOSSES)
        if fused:
            assert row["loss"] == pytest.approx(
                sum(row[name] for name in (*LOSSES, "loss_presence", "loss_collage")), rel=1e-4
            )  # all weights are 1
    assert [row["epoch"] for row in found if "plan_s" in row] == [1]
    assert "sync/words/auc" in found[-1]
    assert found[0]["lr"] > 0


def test_results(run: Path):
    results = json.loads((run / "results.json").read_text())
    for way in ("i2t", "t2i", "mean"):
        for k in (1, 5, 10):
            assert 0 <= results[f"retrieval/{way}/101-candidate/R@{k}"] <= 100
            assert f"retrieval/{way}/101-candidate/R@{k}/std" in results
    assert results["retrieval/i2t/full/R@1"] <= results["retrieval/i2t/full/R@10"]
    assert results["retrieval/products"] == 105
    for name in (
        "words/precision",
        "words/random",
        "words/shuffled",
        "words/auc",
        "patches/precision",
        "patches/random",
        "patches/shuffled",
    ):
        assert 0 <= results[f"sync/{name}"] <= 100


# Stop and resume


def test_resume_equals_an_uninterrupted_run(run: Path, lookbook: Path, tmp_path: Path):
    """As after a crash: metrics beyond the checkpoint, one of them half written, are there and must go."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    for rest in ("model", "results.json", "report.html"):
        shutil.rmtree(out / rest) if (out / rest).is_dir() else (out / rest).unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "ep')
    main(["tiny", *FLAGS, *SIX_STEPS, "--decoder", "dali", "--data", str(lookbook), "--out", str(out)])
    assert learned(out) == learned(run)
    assert_same_model(run, out)
    assert (out / "report.html").is_file()


def test_finished_run_is_evaluated_again_and_no_more(run: Path, lookbook: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / "results.json").unlink()
    main(["tiny", *FLAGS, *SIX_STEPS, "--decoder", "dali", "--data", str(lookbook), "--out", str(out)])
    assert run_rows(out) == run_rows(run)
    assert json.loads((out / "results.json").read_text()) == json.loads((run / "results.json").read_text())


def test_ctrl_c_saves_and_a_named_checkpoint_resumes(
    run: Path, lookbook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Ctrl-C within the fourth step, between two checkpoints: the step ends and is saved, and the run resumes
    exactly.
    """
    out = tmp_path / "run"
    flags = ["tiny", *FLAGS, *SIX_STEPS, "--decoder", "dali", "--data", str(lookbook), "--out", str(out)]
    step = train.train_step

    def interrupted(state, *more):
        if state.step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(state, *more)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(SystemExit) as left:
        main(flags)
    monkeypatch.undo()
    assert left.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopped at step 4 of 6" in capsys.readouterr().out
    assert learned(out) == learned(run)[:4]
    assert not (out / "model").exists()
    main([*flags, "--resume", str(out / "checkpoints" / "step-00000004")])
    assert learned(out) == learned(run)
    assert_same_model(run, out)


def test_resume_of_another_run(run: Path, lookbook: Path, tmp_path: Path):
    """A checkpoint of another model, and a damaged one, end with a sentence that names it."""
    again = ["tiny", *FLAGS, *SIX_STEPS, "--data", str(lookbook), "--out", str(tmp_path / "run"), "--resume"]
    with pytest.raises(UserError, match="step-00000099"):
        main([*again, str(run / "checkpoints" / "step-00000099")])
    shutil.copytree(run / "checkpoints" / "step-00000003", tmp_path / "step-00000003")
    (tmp_path / "step-00000003" / "teacher.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=str(tmp_path / "step-00000003")):
        main([*again, str(tmp_path / "step-00000003")])


# Every mode


@pytest.mark.parametrize(
    "flags",
    [
        "--masking random --batching random --loss.mim-input visible",
        "--masking none --batching hard",
        "--loss.mim-target teacher --optim.grad-accum 2 --loss.queue 0 --mask.ramp 0 0",
        "--epochs 1 --batch-size 32 --batching hard --precision bfloat16",
    ],
)
def test_modes(pairs: Path, tmp_path: Path, flags: str):
    length = [] if "--epochs" in flags else ["--steps", "2"]
    main(
        [
            "tiny",
            *FLAGS,
            "--loss.itc-only",
            "0",
            *length,
            *flags.split(),
            "--data",
            str(pairs),
            "--out",
            str(tmp_path / "run"),
        ]
    )
    found = run_rows(tmp_path / "run")
    assert len(found) == 2
    for row in found:
        expected = {"loss_itc", "loss_itm"} if "none" in flags else set(LOSSES)
        assert expected == set(LOSSES) & set(row)
        assert all(math.isfinite(row[name]) for name in expected)
    assert (tmp_path / "run" / "report.html").is_file()


def test_plain_webdataset(pairs: Path, tmp_path: Path):
    out = tmp_path / "run"
    main(
        [
            "tiny",
            *FLAGS,
            "--steps",
            "2",
            "--loss.itc-only",
            "0",
            "--eval.holdout-fraction",
            "0.1",
            "--data",
            str(pairs),
            "--out",
            str(out),
        ]
    )
    assert len(run_rows(out)) == 2
    results = json.loads((out / "results.json").read_text())
    assert results["retrieval/products"] == 7  # each pair is its own product; too few for 101 candidates
    assert not [name for name in results if name.startswith("sync/") or "101" in name]
    assert (out / "report.html").is_file()


def test_damaged_image_is_left_out(tmp_path: Path):
    write_plain(tmp_path / "shards", 40)
    tar = tmp_path / "shards" / "00000.tar"
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        member = archive.getmember("000000005.jpeg")
    content[member.offset_data + member.size // 3 : member.offset_data + member.size] = bytes(
        member.size - member.size // 3
    )
    tar.write_bytes(content)
    out = tmp_path / "run"
    main(
        [
            "tiny",
            *FLAGS,
            "--steps",
            "3",
            "--loss.itc-only",
            "0",
            "--eval.holdout-fraction",
            "0",
            "--data",
            str(tmp_path / "shards"),
            "--out",
            str(out),
        ]
    )
    assert all(math.isfinite(value) for row in run_rows(out) for value in row.values())
    assert len(run_rows(out)) == 3


# What users get wrong


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch-size", "1"], "--batch-size"),
        (["--epochs", "1"], "--epochs"),
        (["--batch-size", "5000"], "--batch-size 5000"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--image.name", "no_such_vit"], "no_such_vit"),
        (["--text.name", "no/such/tokenizer"], "no/such/tokenizer"),
        (["--device", "abacus"], "--device abacus"),
        (["--image.heads", "5"], "--image"),
    ],
)
def test_one_sentence_for_a_mistake(
    lookbook: Path, tmp_path: Path, flags: list[str], named: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        main(["tiny", *FLAGS, *SIX_STEPS, "--data", str(lookbook), "--out", str(tmp_path / "run"), *flags])
    assert named in str(error.value)


def test_a_corrected_mistake_may_use_the_same_folder(lookbook: Path, tmp_path: Path):
    """A run that never began leaves nothing in the way of the next one."""
    flags = ["tiny", *FLAGS, "--steps", "1", "--data", str(lookbook), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--batch-size"):
        main([*flags, "--batch-size", "5000"])
    main([*flags, "--loss.itc-only", "1"])
    assert len(run_rows(tmp_path / "run")) == 1


def test_existing_run(run: Path, lookbook: Path):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    again = ["tiny", *FLAGS, *SIX_STEPS, "--decoder", "dali", "--data", str(lookbook), "--out", str(run)]
    with pytest.raises(UserError, match="--resume never"):
        main([*again, "--resume", "never"])
    with pytest.raises(UserError, match="seed"):
        main([*again, "--seed", "1"])
    with pytest.raises(UserError, match="mask"):
        main([*again, "--mask.patch-ratio", "0.9"])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before  # nothing was touched


def test_the_command_exits_with_2_and_one_line(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "syncmask_fast.train",
        "tiny",
        "--data",
        "no/such/folder",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no/such/folder ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_run_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        run_command(lambda: main(["tiny", "--steps", "2", "--epochs", "2", "--out", str(tmp_path / "run")]))
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --steps and --epochs exclude each other. Give one of them.\n"
    assert not (tmp_path / "run").exists()
