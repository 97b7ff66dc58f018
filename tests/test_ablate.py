"""The ablation: a small grid from end to end, and its table and conclusions on made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from syncmask_fast import ablate, finetune, train
from syncmask_fast.ablate import Ablation, conclusions, table
from syncmask_fast.utils.errors import UserError
from tests.helpers import FLAGS


def cells_of(values: dict[tuple[str, str], list[float]]) -> ablate.Cells:
    return {
        (*group, seed): {"retrieval/t2i/full/R@10": value}
        for group, each in values.items()
        for seed, value in enumerate(each)
    }


def test_conclusions():
    """They agree with a t-test over seeds."""
    rng = np.random.default_rng(0)
    said = set()
    for shift in (0.0, 1.0, 3.0, -9.0):
        values = {
            (m, b): rng.normal(50 + (shift if m == "sync" else 0), 1, 3).tolist()
            for m in ("random", "sync")
            for b in ("random", "semi_hard")
        }
        [first, second] = conclusions(cells_of(values))
        each = np.mean([np.subtract(values["sync", b], values["random", b]) for b in ("random", "semi_hard")], axis=0)
        clear = ttest_1samp(each, 0).pvalue < 0.05
        assert f"{each.mean():+.2f}" in first
        assert ("no difference beyond" in first) == (not clear)
        assert not clear or (f": {'more' if each.mean() > 0 else 'less'} beyond" in first)
        assert second.startswith("Batching semi_hard against random")
        said.add(clear)
    assert said == {True, False}


def test_one_seed():
    [sentence] = conclusions(cells_of({("random", "random"): [10.0], ("sync", "random"): [90.0]}))
    assert "supports no conclusion" in sentence


def test_table():
    rows = table(cells_of({("random", "hard"): [10.0, 12.0, 14.0], ("sync", "hard"): [20.0]}))
    assert [row["text to image R@10, full gallery"] for row in rows] == ["12.00 ± 2.00", "20.00"]
    assert [row["seeds"] for row in rows] == ["3", "1"]


def test_image_gain():
    """The MLM loss with a mismatched image minus that with the right one."""
    name = "MLM nats saved by the image at visible tokens"
    losses = {"mlm/visible-tokens/nll": 2.5, "mlm/visible-tokens/nll-mismatched-image": 3.25}
    assert table({("random", "hard", 0): losses})[0][name] == "0.75"
    assert name not in table({("random", "hard", 0): {"mlm/visible-tokens/nll": 2.5}})[0]


def test_every_rule():
    grid = Ablation(every_rule=True)
    assert grid.maskings("random") == ["random", "sync"]
    assert len(grid.maskings("semi_hard")) == 2 + 3 + 3
    for name in ("sync:mass", "synch", "sync:mass/maximum", "random:mass/max"):
        with pytest.raises(UserError, match="--masking"):
            Ablation(masking=(name,)).check()


@pytest.mark.slow
def test_grid(lookbook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Two cells with a fine-tuning each; a further cell reuses them; other settings are refused."""
    out = tmp_path / "grid"
    flags = [
        "--out",
        str(out),
        "--data",
        str(lookbook),
        "--steps",
        "2",
        "--tuning-steps",
        "1",
        "--seeds",
        "0",
        "--tasks",
        "subcategory",
    ]
    more = ["--", *FLAGS, "--loss.itc-only", "0", "--mask.ramp", "0", "0"]
    monkeypatch.setitem(finetune.TINY, "batch_size", (8, "the test"))
    ablate.main([*flags, "--masking", "random", "sync:mass/max", "--batching", "semi_hard", *more])
    assert "supports no conclusion" in capsys.readouterr().out
    written = (out / "table.md").read_text()
    assert written.count("\n| ") == 2
    assert "subcategory accuracy, image" in written
    assert (out / "plot.png").stat().st_size > 5000
    assert len(json.loads((out / "table.json").read_text())) == 2
    assert not list(out.rglob("checkpoints"))

    ran = []
    monkeypatch.setattr(train, "main", lambda argv: ran.append(argv))
    with pytest.raises(FileNotFoundError):
        ablate.main([*flags, "--masking", "random", "sync:mass/max", "--batching", "semi_hard", "random", *more])
    assert len(ran) == 1  # only the new cell
    assert "random" in ran[0]
    with pytest.raises(UserError, match="steps"):
        ablate.main([*flags, "--steps", "3", *more])
