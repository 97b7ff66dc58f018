"""A step whose loss or gradients are not finite changes nothing, is counted, and after too many in a row ends the run
with the batch saved.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from syncmask_fast import train
from syncmask_fast.objective import pretraining as step
from syncmask_fast.train import main
from syncmask_fast.training import step as training_step
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.optimizer import make_optimizer
from syncmask_fast.utils.errors import UserError
from tests.faults.kills import arguments
from tests.helpers import STEP_CASES, NoHostReads, run_rows, small_batch, small_state, step_config, take_step


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Everything in a state that a step may change, copied."""
    found = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    found |= {f"teacher.{name}": value for name, value in state.teacher.state_dict().items()}
    for number, (_, kept) in enumerate(state.optimizer.parameter_states()):
        found |= {f"optimizer.{number}.{name}": value for name, value in kept.items()}
    found |= {f"queue.{name}": value for name, value in state.queue._asdict().items()}
    found |= {f"bank.{name}": getattr(state.bank, name) for name in ("images", "texts", "filled")}
    return {name: value.clone() for name, value in found.items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(("masking", "presence", "stem", "mim_input"), STEP_CASES)
@pytest.mark.parametrize("bad", ["nan", "inf", "huge"])
def test_a_step_that_is_not_finite_changes_nothing(
    masking: str, presence: float, stem: str, mim_input: str, bad: str, monkeypatch: pytest.MonkeyPatch
):
    """Not finite from the image on, or only in the gradient; as on CUDA, without a host sync."""
    monkeypatch.setattr(step, "uses_varlen", lambda device: True)
    config = step_config(masking, presence, stem, mim_input)
    state = small_state(config)
    take_step(config, state, iter([small_batch(config, seed=3)]))  # the optimizer gets a state
    poisoned = small_batch(config, seed=4)
    poisoned.pixels[1] *= {"nan": torch.nan, "inf": torch.inf, "huge": 1e38}[bad]
    before = tensors_of(state)
    with NoHostReads():
        losses = take_step(config, state, iter([poisoned])).losses
    assert losses["total"].isnan()
    assert_same(before, tensors_of(state))
    losses = take_step(config, state, iter([small_batch(config, seed=5)])).losses
    assert losses["total"].isfinite()
    assert any(
        not torch.equal(before[name], value) for name, value in tensors_of(state).items() if name.startswith("model")
    )


def test_the_first_step_of_all():
    """The optimizer has no earlier state: it is as if the run began one step later."""
    config = step_config("random", 0.0, "patch", "mask-tokens")
    skipped, clean = (small_state(config) for _ in range(2))
    poisoned = small_batch(config, seed=4)
    poisoned.pixels[:] = torch.nan
    take_step(config, skipped, iter([poisoned]))
    for state in (skipped, clean):
        take_step(config, state, iter([small_batch(config, seed=5)]))
    clean_tensors, found = tensors_of(clean), tensors_of(skipped)
    moved = {name for name in found if name.startswith("queue")}  # whose counter advanced
    assert_same(
        *({name: value for name, value in each.items() if name not in moved} for each in (clean_tensors, found))
    )


def test_one_bad_part_of_an_accumulated_step_skips_it_all():
    config = step_config("random", 0.0, "patch", "mask-tokens")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, grad_accum=3))
    state = small_state(config)
    batches = [small_batch(config, seed=n) for n in range(3)]
    batches[1].pixels[0] = torch.nan
    before = tensors_of(state)
    losses = take_step(config, state, iter(batches)).losses
    assert losses["total"].isnan()
    after = tensors_of(state)
    assert_same(before, {name: after[name] for name in before})
    assert all(
        (value == 0).all() for name, value in after.items() if name not in before
    )  # the optimizer's state begins at zero


def test_a_good_step_is_the_one_of_before():
    """The guard costs not a bit: the same as without it."""
    config = step_config("sync", 0.0, "patch", "mask-tokens")
    guarded = small_state(config)
    plain = copy.deepcopy(guarded)
    plain.optimizer = make_optimizer(plain.model, config.optim)
    for seed in (1, 2):
        take_step(config, guarded, iter([small_batch(config, seed=seed)]))
    update, teach = type(plain.optimizer).step, training_step.update_teacher
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(plain.optimizer), "step", lambda self, finite: update(self))
        patch.setattr(training_step, "update_teacher", lambda *arguments: teach(*arguments[:4]))
        for seed in (1, 2):
            take_step(config, plain, iter([small_batch(config, seed=seed)]))
    assert_same(tensors_of(plain), tensors_of(guarded))


# Whole runs


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Batches of these steps, counted from 1, get an image of NaN."""
    real = train.epoch_batches

    def batches(config, state, *more):
        for batch in real(config, state, *more):
            if state.step + 1 in steps:
                batch.pixels[3] = torch.nan
            yield batch

    monkeypatch.setattr(train, "epoch_batches", batches)


def test_a_run_skips_and_counts(
    lookbook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    poison(monkeypatch, {2, 3, 5})
    main([*arguments(lookbook, tmp_path / "run", 6), "--decoder", "torchvision"])
    found = run_rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found if row.get("skipped")] == [2, 3, 5]
    assert all(("loss" in row) == (not row.get("skipped")) for row in found)
    assert "not finite in step 5, which changed nothing" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_stops_after_too_many_in_a_row(lookbook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, set(range(3, 100)))
    out = tmp_path / "run"
    argv = [*arguments(lookbook, out, 20), "--decoder", "torchvision"]
    for _ in range(2):  # started again without a change it stops again, and says the same
        with pytest.raises(
            UserError,
            match=r"in a row up to step \d+ had a loss or gradient that is not finite \(--max-skipped-steps 4\)",
        ):
            main([*argv, "--max-skipped-steps", "4"])
    (saved, *_) = sorted(out.glob("not-finite-step-*.safetensors"))
    with safe_open(saved, "pt") as file:
        assert file.get_tensor("pixels")[3].isnan().all()
        assert file.get_tensor("pixels")[2].isfinite().all()
        assert len(json.loads(file.metadata()["samples"])) == 16
    assert [row["step"] for row in run_rows(out) if row.get("skipped")][:4] == [3, 4, 5, 6]
    monkeypatch.undo()
    main([*argv, "--max-skipped-steps", "50"])  # a higher limit lets the run continue
    assert run_rows(out)[-1]["step"] == 20
