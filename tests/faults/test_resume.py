"""What a run resumes from: damaged, other and foreign checkpoints, and metrics.jsonl after a kill or a power loss."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from syncmask_fast.training.checkpoint import (
    FORMAT,
    MANIFEST,
    checkpoints,
    find_resume_path,
    load_checkpoint,
    load_latest,
    save,
    save_checkpoint,
)
from syncmask_fast.training.log import MetricsLog
from syncmask_fast.utils.errors import UserError
from tests.faults.mutations import new_state
from tests.helpers import small_config


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    state = new_state()
    for step in (1, 2):
        state.step = step
        save_checkpoint(tmp_path / "checkpoints", state)
    return tmp_path / "checkpoints"


def rewrite(path: Path, change) -> None:
    """Change a manifest as somebody would who knows the format, checksum included."""
    from syncmask_fast.training import checkpoint

    content = json.loads((path / MANIFEST).read_text())
    content.pop("sha256", None)
    change(content)
    (path / MANIFEST).write_text(json.dumps({**content, "sha256": checkpoint._digest(content)}))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "teacher.safetensors", "optimizer.safetensors", "memory.safetensors", MANIFEST]
)
def test_one_flipped_bit_sends_a_run_to_the_checkpoint_before(two: Path, name: str, capsys: pytest.CaptureFixture[str]):
    file = two / "step-00000002" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    state = new_state()
    assert load_latest(two, state).name == "step-00000001"
    assert state.step == 1
    said = capsys.readouterr().err
    assert said.startswith(f"WARNING: {two / 'step-00000002'} is damaged")
    assert "the run resumes from step-00000001" in said
    assert (two / "damaged-step-00000002").is_dir()
    assert checkpoints(two) == [two / "step-00000001"]
    state.step = 2
    assert save_checkpoint(two, state) in checkpoints(two)


def test_no_whole_checkpoint_is_a_sentence_and_no_new_start(two: Path):
    for path in checkpoints(two):
        os.truncate(path / "model.safetensors", 100)
    with pytest.raises(UserError, match="step-00000001 is damaged .* and no other checkpoint is left"):
        load_latest(two, new_state())
    assert (two / "step-00000001").is_dir()


@pytest.mark.parametrize("layout", [FORMAT - 1, FORMAT + 1])
def test_another_layout_is_refused(two: Path, layout: int):
    rewrite(two / "step-00000002", lambda content: content.update(format=layout))
    with pytest.raises(UserError, match=rf"another version \(layout {layout}; this one reads {FORMAT}\)"):
        load_latest(two, new_state())


@pytest.mark.parametrize(
    ("name", "said"), [("samples", "4 training samples, but there are 5 now"), ("tokenizer", "another tokenizer")]
)
def test_other_data_is_refused(two: Path, name: str, said: str):
    rewrite(two / "step-00000002", lambda content: content["provenance"].update({name: 4}))
    with pytest.raises(UserError, match=said):
        load_latest(two, new_state())


def test_changed_data_is_said(two: Path, capsys: pytest.CaptureFixture[str]):
    rewrite(two / "step-00000002", lambda content: content["provenance"].update(data="other"))
    load_latest(two, new_state())
    assert "WARNING: The data has changed since the run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["queue.images", "bank.filled", "order"])
def test_a_forged_checkpoint_that_does_not_fit_is_refused(two: Path, name: str):
    from safetensors.torch import load_file, save_file

    from syncmask_fast.utils.files import sha256

    file = two / "step-00000002" / "memory.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name][:-1].contiguous() if name != "order" else torch.tensor([0, 1, 2, 3, 99])
    save_file(tensors, file)
    rewrite(
        two / "step-00000002",
        lambda content: content["files"].update({file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}}),
    )
    state = new_state()
    before = state.queue.images.clone()
    with pytest.raises(UserError, match="is not a checkpoint of this run"):
        load_checkpoint(two / "step-00000002", state)
    assert torch.equal(before, state.queue.images)


def test_partial_checkpoints_are_removed(two: Path):
    (two / ".step-00000099.partial").mkdir()
    state = new_state()
    state.step = 3
    save_checkpoint(two, state)
    assert sorted(path.name for path in two.iterdir()) == ["step-00000002", "step-00000003"]


def test_find_resume_path(two: Path, tmp_path: Path):
    """From another run's checkpoint only until it has its own, so that the same command can be started again."""
    config = small_config()
    other = tmp_path / "other" / "step-00000007"
    named = small_config(resume=str(other))
    assert find_resume_path(config, tmp_path) == two
    assert find_resume_path(named, tmp_path) == two
    assert find_resume_path(small_config(resume=str(two / "step-00000001")), tmp_path) == two / "step-00000001"
    shutil.rmtree(two)
    assert find_resume_path(named, tmp_path) == other
    assert find_resume_path(config, tmp_path) is None


# metrics.jsonl


def new_log(folder: Path, start: int) -> MetricsLog:
    return MetricsLog(small_config(out=folder, log_every=2), start, 100, torch.device("cpu"), 1.0)


def add(log: MetricsLog, *steps: int, loss: float = 1.0) -> None:
    for step in steps:
        row = {"step": step, "epoch": 0, "wait_seconds": 0.0, "lr": 0.1}
        log.log_step(row, {"total": torch.tensor(loss), "itc": torch.tensor(1.0)}, 4, None)


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "rest", [b"", b'{"step": 5, "lo', b'{"step": 5}\n{"step": 6}\n', b"\0" * 4096, b'{"step": 5}\n\xff\xfe\n']
)
def test_rows_beyond_the_checkpoint_are_cut(tmp_path: Path, rest: bytes):
    log = new_log(tmp_path, 0)
    add(log, 1, 2, 3, 4)
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(rest)
    log = new_log(tmp_path, 3)
    add(log, 4, 5)
    log.close()
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_rows_before_the_checkpoint_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnothing\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not a step"):
        new_log(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3  # untouched


def test_lost_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    new_log(tmp_path, 7).close()
    assert "ends at step 2, but the checkpoint is of step 7" in capsys.readouterr().err


def test_skipped_steps_are_counted_across_a_stop(tmp_path: Path):
    log = new_log(tmp_path, 0)
    add(log, 1)
    add(log, 2, 3, loss=torch.nan)
    assert log.consecutive_skips == 0  # the losses were not read yet
    log.flush()
    assert log.consecutive_skips == 2
    log.close()
    log = new_log(tmp_path, 3)
    assert log.consecutive_skips == 2
    add(log, 4)
    log.flush()
    assert log.consecutive_skips == 0
    log.close()


class FullDisk:
    """A file that takes `room` more bytes and then fails, as write(2) does on a full disk."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_rows_wait_while_the_disk_is_full(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A checkpoint must not know of steps that metrics.jsonl has not: it waits too.

    When there is room again nothing is missing.
    """
    log = new_log(tmp_path, 2)
    log.file = FullDisk(log.file, 150)
    add(log, 3, 4, 5)
    log.flush()
    assert "metrics.jsonl cannot be written (No space left on device)" in capsys.readouterr().err
    state = new_state()
    state.step = 5
    assert not save(tmp_path, state, log)
    assert "step-00000002 stays the latest, and training continues" in capsys.readouterr().err
    assert [path.name for path in checkpoints(two)] == ["step-00000001", "step-00000002"]
    log.file.room = 10**6
    assert save(tmp_path, state, log)
    log.close()
    assert steps_of(tmp_path) == [3, 4, 5]
    assert [path.name for path in checkpoints(two)] == ["step-00000002", "step-00000005"]
