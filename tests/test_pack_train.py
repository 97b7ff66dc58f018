"""`tiny`, made small, trains on what every source was packed into, and on a plain WebDataset of others."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import fsspec
import pytest

from syncmask_fast.pack import fashiongen, fashioniq, table
from syncmask_fast.train import main
from tests.source_files import picture, write_fashiongen, write_fashioniq
from tests.test_train import SMALL


def write_plain(folder: Path, count: int = 60) -> None:
    """As img2dataset and many others write it: KEY.jpg, .png or .webp, and KEY.txt, or KEY.json with a caption; no product ids."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for n in range(count):
            kind, suffix = (("JPEG", "jpg"), ("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp"))[n % 4]
            caption = f"coat {n} with {n % 5} zips"
            texts = (
                {"txt": caption.encode()}
                if n % 2
                else {"json": json.dumps({"caption": caption, "url": "x", "width": 40}).encode()}
            )
            for ending, data in {suffix: picture(n, kind=kind), **texts}.items():
                entry = tarfile.TarInfo(f"{n:09d}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def make(kind: str, folder: Path) -> str:
    """Packed shards of a kind, or their address."""
    out = folder / "shards"
    if kind == "fashiongen":
        write_fashiongen(folder / "x.h5", 90)
        fashiongen(folder / "x.h5", out, workers=1)
    elif kind == "fashioniq":
        write_fashioniq(folder / "iq", 20)
        fashioniq(folder / "iq", out, workers=1)
    elif kind == "table":
        (folder / "p").mkdir()
        for n in range(60):
            (folder / "p" / f"{n}.jpg").write_bytes(picture(n))
        lines = [
            json.dumps({"image": f"p/{n}.jpg", "text": f"coat {n} with {n % 5} zips", "product_id": n // 2})
            for n in range(60)
        ]
        (folder / "t.jsonl").write_text("\n".join(lines))
        table(folder / "t.jsonl", out, workers=1)
    else:
        write_plain(out)
    if kind == "remote":
        fsspec.filesystem("memory").pipe("/plain/shards/00000.tar", (out / "00000.tar").read_bytes())
        return "memory://plain/shards"
    return str(out)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(kind, 2) for kind in ("fashiongen", "fashioniq", "table", "plain", "remote")]
    + [pytest.param(kind, 50, marks=pytest.mark.slow) for kind in ("fashiongen", "fashioniq", "table", "plain")],
)
def test_tiny_trains_on(kind: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = make(kind, tmp_path)
    out = tmp_path / "run"
    flags = ["--steps", str(steps), "--loss.itc-only", "0.5", "--save-every", "100", "--data", data, "--out", str(out)]
    main(["tiny", *SMALL, *flags])
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(found) == steps
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert "loss_mlm" in found[-1]
    assert (out / "report.html").is_file()
    assert json.loads((out / "config.json").read_text())["data"] == data
    if steps == 50:
        for name in (
            "loss_mim",
            "loss_presence",
        ):  # ITC's candidates grow with its queue, and sync masks choose harder words as they take over
            values = [row[name] for row in found if name in row]
            assert sum(values[-8:]) < sum(values[:8]), name
