"""Training on packed shards learns, and a run reads shards of others from an address."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fsspec
import pytest

from syncmask_fast.pack import table
from syncmask_fast.train import main
from tests.helpers import FLAGS, encoded_image, run_rows, write_plain


def train(data: str, steps: int, folder: Path) -> list[dict[str, float]]:
    """Train `tiny`, made small; return the rows of metrics.jsonl."""
    out = folder / "run"
    flags = ["--steps", str(steps), "--loss.itc-only", "0.5", "--save-every", "100", "--data", data, "--out", str(out)]
    main(["tiny", *FLAGS, *flags])
    assert (out / "report.html").is_file()
    assert json.loads((out / "config.json").read_text())["data"] == data
    rows = run_rows(out)
    assert len(rows) == steps
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows


def test_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run reads a plain WebDataset from an address, with images of all kinds and texts of both."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_plain(tmp_path / "shards", 60)
    fsspec.filesystem("memory").pipe("/plain/shards/00000.tar", (tmp_path / "shards/00000.tar").read_bytes())
    rows = train("memory://plain/shards", 2, tmp_path)
    assert "loss_mlm" in rows[-1]


@pytest.mark.slow
def test_learning(tmp_path: Path):
    """50 steps on a packed table lower the losses whose task stays the same.

    ITC's candidates grow with its queue, and sync masks choose harder words as they take over.
    """
    (tmp_path / "images").mkdir()
    for n in range(60):
        (tmp_path / f"images/{n}.jpg").write_bytes(encoded_image(n))
    lines = [
        {"image": f"images/{n}.jpg", "text": f"coat {n} with {n % 5} zips", "product_id": n // 2} for n in range(60)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table(tmp_path / "t.jsonl", tmp_path / "shards", workers=1)
    rows = train(str(tmp_path / "shards"), 50, tmp_path)
    for name in ("loss_mim", "loss_presence"):
        values = [row[name] for row in rows if name in row]
        assert sum(values[-8:]) < sum(values[:8]), name
