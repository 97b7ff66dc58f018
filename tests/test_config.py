"""Settings: presets that work, JSON there and back, and for each mistake a sentence that names the flag."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from syncmask_fast.config import PRESETS, ImageConfig, TrainConfig, from_json, to_json
from syncmask_fast.train import parse
from syncmask_fast.utils.errors import UserError


def changed(flag: str, value: Any) -> TrainConfig:
    """The tiny preset with one setting changed, named as on the command line."""
    config = PRESETS["tiny"][1]
    part, _, name = flag.removeprefix("--").replace("-", "_").rpartition(".")
    if not part:
        return dataclasses.replace(config, **{name: value})
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: value})})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_named(name: str):
    description, config = PRESETS[name]
    config.check()
    assert description
    assert config.preset == name
    assert (config.steps is None) != (config.epochs is None)


@pytest.mark.parametrize("name", PRESETS)
def test_json_there_and_back(name: str):
    config = dataclasses.replace(PRESETS[name][1], data="s3://some/shards", out=Path("runs/one"), seed=2**53 + 1)
    again = from_json(TrainConfig, json.loads(json.dumps(to_json(config))))
    assert again == config
    assert isinstance(again.mask.ramp, tuple)
    assert again.data == "s3://some/shards"
    assert isinstance(again.out, Path)
    assert from_json(TrainConfig, to_json(PRESETS[name][1])) == PRESETS[name][1]  # no data, no out
    assert from_json(TrainConfig, {}) == TrainConfig()  # what is missing takes its default


def test_unknown_setting_is_named():
    values = to_json(TrainConfig())
    values["speed"] = 11
    with pytest.raises(UserError, match="speed"):
        from_json(TrainConfig, values)
    values = to_json(TrainConfig())
    values["mask"]["color"] = "red"
    with pytest.raises(UserError, match="color"):
        from_json(TrainConfig, values)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(
            (flag, 0)
            for flag in (
                "--steps",
                "--save-every",
                "--log-every",
                "--batch-size",
                "--embed-dim",
                "--decode-threads",
                "--image.size",
                "--image.patch",
                "--text.vocab-size",
                "--text.width",
                "--text.heads",
                "--text.layers",
                "--text.fusion-layers",
                "--loss.temperature",
                "--optim.lr",
                "--optim.grad-clip",
                "--optim.grad-accum",
                "--eval.queries",
                "--eval.draws",
                "--batch.search-space",
            )
        ),
        *(
            (flag, value)
            for value in (-0.1, 1.1, float("nan"))
            for flag in (
                "--mask.token-ratio",
                "--mask.patch-ratio",
                "--loss.alpha",
                "--loss.itc-only",
                "--optim.warmup",
                "--optim.ema-decay",
                "--eval.holdout-fraction",
            )
        ),
        ("--steps", -5),
        ("--seed", -1),
        ("--batch-size", 1),
        ("--image.size", 100),
        ("--text.width", 129),
        ("--mask.layer", 0),
        ("--mask.layer", 7),
        ("--text.max-length", 2),
        ("--loss.queue", -1),
        ("--text.pretrain-steps", -1),
        ("--mask.ramp", (0.5, 0.2)),
        ("--mask.ramp", (-0.1, 0.2)),
        ("--mask.ramp", (0.5, 1.2)),
        ("--optim.lr", float("nan")),
    ],
)
def test_impossible_setting_is_named_with_its_value(flag: str, value: Any):
    with pytest.raises(UserError) as error:
        changed(flag, value).check()
    assert flag in str(error.value)
    numbers = value if isinstance(value, tuple) else (value,)
    assert all(str(number) in str(error.value) for number in numbers)
    assert "\n" not in str(error.value)


def test_steps_and_epochs_together():
    with pytest.raises(UserError, match=r"--steps.*--epochs"):
        dataclasses.replace(PRESETS["tiny"][1], steps=3, epochs=3).check()
    with pytest.raises(UserError, match=r"--steps.*--epochs"):
        parse(["tiny", "--steps", "3", "--epochs", "3"])


def test_command_line():
    assert parse([]) == PRESETS["tiny"][1]
    assert parse(["base"]) == PRESETS["base"][1]
    tiny = parse(
        [
            "tiny",
            "--epochs",
            "3",
            "--mask.ramp",
            "0",
            "0.5",
            "--masking",
            "random",
            "--text.fusion-layers",
            "5",
            "--data",
            "x/y",
        ]
    )
    assert (tiny.steps, tiny.epochs) == (None, 3)  # the preset's steps give way
    assert tiny.mask.ramp == (0.0, 0.5)
    assert tiny.masking == "random"
    assert tiny.text.fusion_layers == 5
    assert tiny.data == "x/y"
    base = parse(["base", "--steps=7"])
    assert (base.steps, base.epochs) == (7, None)


@pytest.mark.parametrize(
    "argv", [["huge"], ["tiny", "--no-such-flag", "1"], ["tiny", "--steps", "many"], ["tiny", "--masking", "all"]]
)
def test_what_the_command_line_does_not_know(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        parse(argv)
    assert left.value.code == 2
    assert argv[-1] in capsys.readouterr().err or argv[-2] in argv


def test_configurations_need_no_torch():
    code = "import sys, syncmask_fast.config; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ImageConfig().size = 3  # type: ignore[misc]
