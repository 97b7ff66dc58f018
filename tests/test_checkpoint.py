"""Checkpoints bring back every bit, and say what is wrong with those that cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.memory import FeatureBank, Features
from syncmask_fast.training.checkpoint import TrainState, checkpoints, load_checkpoint, save_checkpoint
from syncmask_fast.utils.errors import UserError
from tests.helpers import small_config, small_tokenizer

SAMPLES = 11
NUMBERS = ("step", "epoch", "samples_done", "batches_done")


def new_state(seed: int, **changes) -> TrainState:
    config = small_config(**changes)
    torch.manual_seed(seed)
    return TrainState.create(
        SyncMaskModel(config, small_tokenizer()), config, {"samples": SAMPLES, "data": "x", "tokenizer": "y"}
    )


def random_step(state: TrainState, seed: int) -> None:
    """An optimizer step with random gradients; the temperature gets none, as a parameter may."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in state.model.named_parameters():
        parameter.grad = None if name == "log_temperature" else torch.randn(parameter.shape, generator=generator)
    state.optimizer.step()


def used_state(**changes) -> TrainState:
    """Nothing in it is as it was at the start."""
    state = new_state(0, **changes)
    for seed in (1, 2):
        random_step(state, seed)
    for parameter in state.teacher.parameters():
        parameter.data.add_(0.25)
    width = state.queue.images.shape[1]
    state.queue.enqueue(Features(*torch.randn(2, 7, width)), torch.arange(7), 0, 7)
    state.bank.update(torch.tensor([3, 0, 9]), Features(*torch.randn(2, 3, width)))
    state.order = torch.randperm(SAMPLES)
    state.step, state.epoch, state.samples_done, state.batches_done = 12, 3, 8, 24
    return state


def assert_same(a: TrainState, b: TrainState) -> None:
    for part in ("model", "teacher"):
        ours, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for (p, first), (q, second) in zip(a.optimizer.parameter_states(), b.optimizer.parameter_states(), strict=True):
        assert torch.equal(p, q)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    assert all(torch.equal(x, y) for x, y in zip(a.queue, b.queue, strict=True))
    assert all(torch.equal(getattr(a.bank, name), getattr(b.bank, name)) for name in ("images", "texts", "filled"))
    assert torch.equal(a.order, b.order)
    assert a.order.dtype == b.order.dtype
    assert [getattr(a, name) for name in NUMBERS] == [getattr(b, name) for name in NUMBERS]


@pytest.mark.parametrize("muon_lr", [None, 0.01])
def test_there_and_back(tmp_path: Path, muon_lr: float | None):
    optim = dataclasses.replace(small_config().optim, muon_lr=muon_lr)
    saved, loaded = used_state(optim=optim), new_state(5, optim=optim)
    path = save_checkpoint(tmp_path / "checkpoints", saved)
    queue = loaded.queue.images
    load_checkpoint(path, loaded)
    assert_same(saved, loaded)
    assert loaded.queue.images is queue  # filled in place
    assert (
        sum(bool(kept) for _, kept in loaded.optimizer.parameter_states()) == len(list(loaded.model.parameters())) - 1
    )  # the temperature had no step yet
    # And both continue alike, which needs the moments and the step count.
    for state in (saved, loaded):
        random_step(state, 3)
    assert_same(saved, loaded)


def test_the_last_two_are_kept(tmp_path: Path):
    state = used_state()
    for step in (3, 99, 100, 12):
        state.step = step
        save_checkpoint(tmp_path, state)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000099", "step-00000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000099", "step-00000100"]
    state.step = 100
    state.epoch = 77
    assert json.loads((save_checkpoint(tmp_path, state) / "state.json").read_text())["epoch"] == 77  # written again
    assert checkpoints(tmp_path / "nowhere") == []


def test_half_written_checkpoint_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = used_state()
    save_checkpoint(tmp_path, state)
    state.step += 1
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="space"):
            save_checkpoint(tmp_path, state)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000012"]
    save_checkpoint(tmp_path, state)  # what lay there half is no hindrance
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000012", "step-00000013"]
    assert not list(tmp_path.glob(".*"))


FILES = ["state.json", "model.safetensors", "teacher.safetensors", "optimizer.safetensors", "memory.safetensors"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_damaged_checkpoint_is_named(tmp_path: Path, file: str, damage: str):
    path = save_checkpoint(tmp_path, used_state())
    if damage == "missing":
        (path / file).unlink()
    elif damage == "cut":
        (path / file).write_bytes((path / file).read_bytes()[:-5])
    else:
        (path / file).write_bytes(b"\xff garbage")
    with pytest.raises(UserError) as error:
        load_checkpoint(path, new_state(1))
    assert str(path) in str(error.value)
    assert "--resume" in str(error.value)


def test_other_version_and_other_model(tmp_path: Path):
    path = save_checkpoint(tmp_path, used_state())
    other = dataclasses.replace(small_config().text, layers=2)
    with pytest.raises(UserError, match=path.name):
        load_checkpoint(path, new_state(1, text=other))
    numbers = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(numbers | {"format": 99}))
    with pytest.raises(UserError, match="another version"):
        load_checkpoint(path, new_state(1))


def test_no_such_checkpoint(tmp_path: Path):
    with pytest.raises(UserError, match="nothing-here"):
        load_checkpoint(tmp_path / "nothing-here", new_state(1))


def test_feature_bank():
    bank = FeatureBank.empty(6, 2, torch.device("cpu"))
    assert not bank.filled.any()
    features = Features(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6], [7, 8]]))
    bank.update(torch.tensor([4, 1]), features)
    assert bank.filled.tolist() == [False, True, False, False, True, False]
    assert bank.images[4].tolist() == [1, 2]
    assert bank.texts[1].tolist() == [7, 8]
