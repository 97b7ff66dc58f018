"""Sources to shards: every row is in the shards or the report, a killed pack resumes, bad input gets one sentence."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from syncmask_fast.data.images import decode_image
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.splits import open_splits
from syncmask_fast.pack import fashiongen, fashioniq, main, table
from syncmask_fast.sources import base as source_rows
from syncmask_fast.sources.base import Encoding, RowError
from syncmask_fast.sources.text_cleaning import clean, decode_field, join
from tests.helpers import encoded_image
from tests.sample_sources import ONLY_IN_VALIDATION, asin, write_fashiongen, write_fashioniq

ROOT = Path(__file__).parent.parent


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence that the command ends with, and its exit code 2."""
    with pytest.raises(SystemExit) as left:
        main([str(arg) for arg in args])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def write_csv(path: Path, rows: list[dict], **options: object) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


# Text


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("A  dress\t with<br>pockets<BR/>and <b>bows</b>.", "A dress with pockets and bows."),
        ("caf\xe9 &amp; &lt;b&gt; 5 &lt; 6", "caf\xe9 & <b> 5 < 6"),
        ("size < 6 and > 3", "size < 6 and > 3"),
        ("\x00\x85 \u200b ", ""),
        ("<p class='x'>One</p><p>Two</p>", "One Two"),
    ],
)
def test_clean(raw: str, text: str):
    assert clean(raw) == text


def test_fixed_width():
    assert decode_field(b"caf\xe9   \0\0\0", 10) == "café"
    full = b"A long text that is cut in the mid"
    assert decode_field(full, len(full)) == "A long text that is cut in the"
    assert decode_field(full, len(full) + 1) == full.decode()
    tag = b"A long text that is cut in the <b"
    assert decode_field(tag, len(tag)) == "A long text that is cut in the"
    assert decode_field(b"SS2015", 6) == "SS2015"  # a short code fills its field on purpose


def test_join():
    assert join(["Navy coat", "It is long.", "", "Navy coat"]) == "Navy coat. It is long."


# FashionGen


def test_fashiongen(tmp_path: Path):
    source, out = tmp_path / "train.h5", tmp_path / "data"
    write_fashiongen(source, 61, empty=(7,), chunks=(9, 32, 32, 3), compression="gzip")
    fashiongen(source, out / "train", workers=1, rows_per_shard=25, allow_dropped=0.05, quality=95)
    index = ShardIndex.open(out / "train")
    assert not index.warnings
    assert [path.name for path in sorted((out / "train").iterdir())][-4:] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "report.json",
    ]
    assert [index.key(i) for i in range(60)] == [f"{row:08d}" for row in range(61) if row != 7]
    with h5py.File(source) as file:
        for i in range(60):
            row = int(index.key(i))
            record = index.record(i)
            product = row // 3
            word = ["star", "moon", "sun"][product % 3]
            assert (
                record["text"]
                == f"NAVY COAT {product}. Slim-fit coat number {product} in café brown. Zip pocket & {word} print."
            )
            assert record["product_id"] == product + 4000
            assert record["category"] == ["tops", "jeans", "sweaters"][product % 3]
            assert record["subcategory"] == ["t-shirts", "slim jeans", "crewnecks"][product % 3]
            assert record["view"] == f"id_gridfs_{row % 3 + 1}"
            assert record["brand"] == "Maison Éclair"
            assert np.abs(decode_image(index.image_bytes(i)).astype(int) - file["input_image"][row]).mean() < 12
    found = report(out / "train")
    assert (found["rows"], found["samples"], found["products"], found["empty texts"]) == (61, 60, 21, 1)
    assert found["dropped"]["list"] == [{"row": "row 7", "reason": "the text is empty", "detail": ""}]
    assert found["category"] == {"tops": 20, "jeans": 18, "sweaters": 18} or sum(found["category"].values()) == 60
    assert found["bytes"] == sum(path.stat().st_size for path in (out / "train").glob("*.tar"))

    write_fashiongen(tmp_path / "validation.h5", 12, validation=True)
    fashiongen(tmp_path / "validation.h5", out / "eval", workers=1, text=("description",))
    train, evaluation = open_splits(out)
    only = set(evaluation.index.subcategory.names) - set(train.index.subcategory.names)
    assert only == {ONLY_IN_VALIDATION.lower()}
    assert evaluation.index.texts[0].startswith("Slim-fit coat")


def test_workers(tmp_path: Path):
    """Two workers write the same files as one."""
    write_fashiongen(tmp_path / "x.h5", 50)
    fashiongen(tmp_path / "x.h5", tmp_path / "one", workers=1, rows_per_shard=12)
    fashiongen(tmp_path / "x.h5", tmp_path / "two", workers=2, rows_per_shard=12)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_resume_after_kill(tmp_path: Path):
    """After SIGKILL of the main process its workers end, and the next run gives the bytes of an unbroken one."""
    source, out = tmp_path / "x.h5", tmp_path / "out"
    write_fashiongen(source, 1500, size=96)
    command = [
        sys.executable,
        "-m",
        "syncmask_fast.pack",
        "fashiongen",
        str(source),
        str(out),
        "--workers",
        "2",
        "--rows-per-shard",
        "40",
    ]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(list(out.glob(".pack/*.tar"))) < 3:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert workers
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not list(out.glob("*.tar"))  # nothing looks finished
    made = len(list(out.glob(".pack/*.tar")))
    assert 3 <= made < 38
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming: " in again.stdout
    fashiongen(source, tmp_path / "whole", workers=1, rows_per_shard=40)
    assert files(out) == files(tmp_path / "whole")


def test_complete_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A complete output stays as it is, and other settings or contents are refused."""
    source, out = tmp_path / "x.h5", tmp_path / "out"
    write_fashiongen(source, 20)
    fashiongen(source, out, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    fashiongen(source, out, workers=1)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    capsys.readouterr()
    assert "other settings (quality)" in refusal(capsys, "fashiongen", source, out, "--quality", "80")
    assert "other settings (text)" in refusal(capsys, "fashiongen", source, out, "--text", "name")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "is not empty" in refusal(capsys, "fashiongen", source, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    fashiongen(Path("x.h5"), Path("out"), workers=1)  # the same by another name
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def change(path: Path, key: str, value: object) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        if value is not None:
            file[key] = value


def change_to_group(path: Path, key: str) -> None:
    with h5py.File(path, "a") as file:
        file.create_group(key)


def allocate(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
    """Images that are declared and never written."""
    with h5py.File(path, "a") as file:
        del file["input_image"]
        file.create_dataset("input_image", shape, np.uint8, chunks=chunks)


BAD_FASHIONGEN = {
    "missing file": (lambda path: path.unlink(), "cannot be read"),
    "no HDF5": (lambda path: path.write_bytes(b"hello" * 100), "is not a complete HDF5 file"),
    "cut off": (lambda path: os.truncate(path, path.stat().st_size // 2), "is not a complete HDF5 file"),
    "no images": (lambda path: change(path, "input_image", None), "has no dataset input_image"),
    "no description": (lambda path: change(path, "input_description", None), "has no dataset input_description"),
    "images of floats": (
        lambda path: change(path, "input_image", np.zeros((20, 8, 8, 3))),
        "input_image is float64 of 20 x 8 x 8 x 3",
    ),
    "gray images": (
        lambda path: change(path, "input_image", np.zeros((20, 8, 8), np.uint8)),
        "uint8 of rows x height x width x 3",
    ),
    "fewer texts": (
        lambda path: change(path, "input_name", np.zeros((7, 1), "S9")),
        "input_name has the shape 7 x 1. Give a file with 20 x 1",
    ),
    "texts as numbers": (
        lambda path: change(path, "input_name", np.zeros((20, 1))),
        "input_name is float64. Give a file with a column of texts",
    ),
    "products as texts": (
        lambda path: change(path, "input_productID", np.zeros((20, 1), "S9")),
        "input_productID is |S9",
    ),
    "a link to another file": (
        lambda path: change(path, "input_name", h5py.ExternalLink("/etc/passwd", "/x")),
        "input_name is a link",
    ),
    "a group": (
        lambda path: (change(path, "input_name", None), change_to_group(path, "input_name")),
        "input_name is a link, a group",
    ),
    "images of absurd size": (
        lambda path: allocate(path, (20, 100_000, 100_000, 3), (1, 64, 64, 3)),
        "20 x 100000 x 100000 x 3",
    ),
    "pieces of absurd size": (
        lambda path: allocate(path, (20, 8000, 8000, 3), (20, 8000, 8000, 3)),
        "pieces of 3,840,000,000 bytes",
    ),
    "texts of absurd size": (
        lambda path: change(path, "input_name", np.zeros((20, 1), "S2000000")),
        "2,000,000 bytes for each text",
    ),
    "no rows": (lambda path: write_fashiongen(path, 0), "has no rows"),
    "too many empty texts": (lambda path: write_fashiongen(path, 20, empty=(3, 4)), "2 of 20 rows cannot be used"),
}


@pytest.mark.parametrize("name", BAD_FASHIONGEN)
def test_bad_fashiongen(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spoil, expected = BAD_FASHIONGEN[name]
    source = tmp_path / "x.h5"
    write_fashiongen(source, 20)
    spoil(source)
    sentence = refusal(capsys, "fashiongen", source, tmp_path / "out", "--workers", "1")
    assert str(source) in sentence
    assert expected in sentence
    assert not list((tmp_path / "out").glob("*.tar"))


def test_damaged_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Damaged rows are named in the message."""
    source = tmp_path / "x.h5"
    write_fashiongen(source, 20, chunks=(4, 32, 32, 3), compression="gzip")
    with h5py.File(source) as file:
        place = file["input_image"].id.get_chunk_info(2)
    content = bytearray(source.read_bytes())
    content[place.byte_offset + 20 : place.byte_offset + place.size] = bytes(place.size - 20)
    source.write_bytes(content)
    sentence = refusal(capsys, "fashiongen", source, tmp_path / "out", "--workers", "1")
    assert "of input_image cannot be read" in sentence
    assert "Copy the file again." in sentence


def test_allow_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A pack that was refused for dropped rows finishes when they are allowed."""
    source, out = tmp_path / "x.h5", tmp_path / "out"
    write_fashiongen(source, 20, empty=(3, 4))
    sentence = refusal(capsys, "fashiongen", source, out, "--workers", "1")
    assert "The first is row 3: the text is empty" in sentence
    assert sentence.rstrip().endswith("--allow-dropped 0.1.")
    listed = json.loads((out / ".pack" / "report.json").read_text())
    assert len(listed["dropped"]["list"]) == 2
    main(["fashiongen", str(source), str(out), "--workers", "1", "--allow-dropped", "0.1"])
    assert "resuming: 1 of 1" in capsys.readouterr().out
    assert report(out)["samples"] == 18
    assert not (out / ".pack").exists()


# FashionIQ


def test_fashioniq(tmp_path: Path):
    source, out = tmp_path / "iq", tmp_path / "out"
    write_fashioniq(source, 12)
    fashioniq(source, out, workers=1)
    train, evaluation = open_splits(out)
    assert len(train) == len(evaluation) == 36
    keys = {train.index.key(i): i for i in range(36)}
    first = train.index.record(keys[asin("dress", 5)])
    assert first == {
        "product_id": asin("dress", 5),
        "text": "dress: is more red than number 5 and has longer sleeves",
        "category": "dress",
    }
    assert train.index.texts[keys[asin("dress", 1)]].count("is more red") == 2  # the target of two triplets
    assert train.index.texts[keys[asin("toptee", 11)]] == "top or t-shirt"  # of none
    stored = train.index.image_bytes(keys[asin("shirt", 4)])
    assert stored == (source / "images" / f"{asin('shirt', 4)}.png").read_bytes()  # as it is
    triplets = json.loads((out / "eval" / "triplets.json").read_text())
    assert len(triplets) == 30
    assert triplets[0] == {
        "class": "dress",
        "candidate": asin("dress", 102),
        "target": asin("dress", 101),
        "captions": ["is more red than number 0", "has longer sleeves"],
    }
    galleries = json.loads((out / "eval" / "galleries.json").read_text())
    assert galleries["shirt"] == [asin("shirt", 100 + n) for n in range(12)]


def test_allow_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Missing and damaged images are counted together and reported."""
    source, out = tmp_path / "iq", tmp_path / "out"
    lost = (asin("dress", 3), asin("toptee", 111))
    write_fashioniq(source, 12, missing=lost)
    (source / "images" / f"{asin('shirt', 0)}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    sentence = refusal(capsys, "fashioniq", source, out, "--workers", "1")
    assert "2 of FashionIQ's 72 images are missing" in sentence
    assert lost[0] in sentence
    assert "--allow-missing 0.028" in sentence
    sentence = refusal(capsys, "fashioniq", source, out, "--workers", "1", "--allow-missing", "0.028")
    assert "3 of 72 rows cannot be used" in sentence  # the damaged one counts too
    main(["fashioniq", str(source), str(out), "--workers", "1", "--allow-missing", "0.05"])
    found = report(out)
    assert found["missing images"] == {"train": [lost[0]], "eval": [lost[1]]}
    assert found["dropped"]["reasons"] == {"the image is missing": 2, "the image cannot be used": 1}
    assert found["samples"] == 69
    assert not any(
        lost[0] in (t["candidate"], t["target"]) for t in json.loads((out / "train" / "triplets.json").read_text())
    )


BAD_FASHIONIQ = {
    "no annotation": ("captions/cap.shirt.train.json", None, "cannot be read"),
    "broken JSON": ("captions/cap.shirt.train.json", "[{", "is not valid JSON"),
    "an object": ("image_splits/split.dress.val.json", "{}", "is not a list"),
    "a caption as one text": (
        "captions/cap.shirt.val.json",
        '[{"candidate": "A", "target": "B", "captions": "red"}]',
        "is malformed",
    ),
    "a path for an ASIN": (
        "captions/cap.dress.val.json",
        '[{"candidate": "../../x", "target": "B", "captions": ["red"]}]',
        "names the image '../../x'. It should be",
    ),
    "a number for an ASIN": ("image_splits/split.dress.val.json", "[3]", "entry 0 names the image 3"),
}


@pytest.mark.parametrize("name", BAD_FASHIONIQ)
def test_bad_fashioniq(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, content, expected = BAD_FASHIONIQ[name]
    source = tmp_path / "iq"
    write_fashioniq(source, 4)
    if content is None:
        (source / file).unlink()
    else:
        (source / file).write_text(content)
    sentence = refusal(capsys, "fashioniq", source, tmp_path / "out", "--workers", "1")
    assert str(source / file) in sentence
    assert expected in sentence


def test_fashioniq_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_fashioniq(tmp_path / "iq", 4)
    (tmp_path / "empty").mkdir()
    assert "has no images" in refusal(
        capsys, "fashioniq", tmp_path / "iq", tmp_path / "out", "--images", tmp_path / "empty"
    )
    assert "--rows-per-shard 0 is out of range" in refusal(
        capsys, "fashioniq", tmp_path / "iq", tmp_path / "out", "--rows-per-shard", "0"
    )


# Tables


def catalogue(folder: Path, rows: int = 30) -> list[dict]:
    """Images in a folder, and a table of them with quotes, line breaks, commas and non-ASCII; one row has no text."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = []
    for row in range(rows):
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[row % 3]
        name = f"images/{row:03d}.{suffix}"
        (folder / name).write_bytes(encoded_image(row, kind=kind))
        text = "" if row == 5 else f'coat "number {row}", café brown\n<br>with {row % 4} zips'
        found.append({"image": name, "caption": text, "product_id": f"{row // 2}", "category": "Coats"})
    return found


def check_catalogue(out: Path, folder: Path, rows: int = 30) -> None:
    index = ShardIndex.open(out)
    assert not index.warnings
    assert [int(index.key(i)[-8:]) for i in range(len(index))] == [row for row in range(rows) if row != 5]
    for i in range(len(index)):
        row = int(index.key(i)[-8:])
        assert index.texts[i] == f'coat "number {row}", café brown with {row % 4} zips'
        assert index.product_ids[i] == row // 2
        assert index.image_bytes(i) == next((folder / "images").glob(f"{row:03d}.*")).read_bytes()
    assert index.category.names == ["Coats"]
    found = report(out)
    assert found["dropped"]["list"] == [{"row": "row 5", "reason": "the text is empty", "detail": ""}]
    assert (found["rows"], found["samples"], found["products"]) == (rows, rows - 1, rows // 2)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_table_paths(kind: str, tmp_path: Path):
    rows = catalogue(tmp_path)
    source = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        source.write_text("\n\n".join(json.dumps(row) for row in rows))  # blank lines are no rows
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source, row_group_size=11)
    else:
        write_csv(source, rows, delimiter="\t" if kind == "tsv" else ",")
        source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())  # as spreadsheets save it
    table(source, tmp_path / "out", workers=1, rows_per_shard=7, allow_dropped=0.1)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 5
    check_catalogue(tmp_path / "out", tmp_path)


@pytest.mark.parametrize("layout", ["struct", "binary", "folder", "jsonl"])
def test_table_bytes(layout: str, tmp_path: Path):
    """Hugging Face's struct of bytes and path, plain bytes, several files of one dataset, and base64 within JSON."""
    rows = catalogue(tmp_path)
    for row in rows:
        data = (tmp_path / row["image"]).read_bytes()
        row["image"] = data if layout == "binary" else {"bytes": data, "path": row["image"]}
    source = tmp_path / "data"
    if layout == "jsonl":
        source = tmp_path / "data.jsonl"
        lines = [{**row, "image": {"bytes": base64.b64encode(row["image"]["bytes"]).decode()}} for row in rows]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        source.mkdir()
        for number, part in enumerate([rows] if layout != "folder" else [rows[:30]]):
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(part), source / f"train-{number:05d}.parquet", row_group_size=8
            )
        source = source / "train-00000.parquet" if layout != "folder" else source
    table(source, tmp_path / "out", workers=1, rows_per_shard=9, allow_dropped=0.1)
    check_catalogue(tmp_path / "out", tmp_path)


def test_table_products(tmp_path: Path):
    """JSON objects may lack a product id; ids may be numbers or texts."""
    (tmp_path / "x.jpg").write_bytes(encoded_image(1))
    ids = [None, 7, 7.0, "7", "a", ""]  # the first has none at all; pandas writes 7 as 7.0 if there are gaps
    lines = [{"image": "x.jpg", "text": f"coat {n}", **({"sku": value} if n else {})} for n, value in enumerate(ids)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table(tmp_path / "t.jsonl", tmp_path / "out", product="sku", workers=1)
    found = ShardIndex.open(tmp_path / "out").product_ids.tolist()
    assert found[1] == found[2] == found[3]
    assert len(set(found)) == 4
    assert report(tmp_path / "out")["products"] == 4


def test_parquet_folder(tmp_path: Path):
    """Several Parquet files are one table."""
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for part in range(3):
        rows = [{"img": encoded_image(10 * part + n), "text": f"coat {part} {n}"} for n in range(5)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / f"{part}.parquet")
    table(tmp_path / "data", tmp_path / "out", workers=1)
    index = ShardIndex.open(tmp_path / "out")
    assert list(index.texts) == [f"coat {part} {n}" for part in range(3) for n in range(5)]
    assert len(set(index.product_ids.tolist())) == 15  # without ids each row is a product of its own
    assert report(tmp_path / "out")["products"] == 15


def test_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Images that cannot be used are dropped with a reason."""
    monkeypatch.setattr(source_rows, "MAX_IMAGE_BYTES", 100_000)
    bomb = io.BytesIO()
    Image.new("1", (9000, 8000)).save(bomb, "PNG")
    contents = {
        "good.jpg": encoded_image(1),
        "text.jpg": b"hello",
        "empty.jpg": b"",
        "cut.jpg": encoded_image(2)[:300],
        "bomb.png": bomb.getvalue(),
        "large.jpg": encoded_image(3) + bytes(200_000),
        "gif.gif": encoded_image(4, kind="GIF"),
        "named.png": encoded_image(5),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # without a writer, reading would never end
    names = [*contents, "folder.jpg", "nowhere.jpg", "", "a\0b.jpg", "pipe.jpg"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"image": name, "text": name or "x"}) for name in names))
    table(tmp_path / "t.jsonl", tmp_path / "out", workers=1, allow_dropped=1)
    assert list(ShardIndex.open(tmp_path / "out").texts) == [
        "good.jpg",
        "named.png",
    ]  # a JPEG that is called .png is a JPEG
    found = {item["row"]: f"{item['reason']}: {item['detail']}" for item in report(tmp_path / "out")["dropped"]["list"]}
    for row, reason in {
        1: "neither JPEG, PNG nor WebP",
        2: "the image is empty",
        3: "truncated",
        4: "9000 x 8000 pixels",
        5: "more than 0 MB",
        6: "neither JPEG",
        8: "is not a file",
        9: "missing",
        10: "there is no image",
        11: "not a path",
        12: "is not a file",
    }.items():
        assert reason in found[f"row {row}"]
    assert len(found) == 11


def test_bad_texts(tmp_path: Path):
    """Texts that cannot be used are dropped with a reason."""
    (tmp_path / "x.jpg").write_bytes(encoded_image(1))
    texts = ["good", "", "   ", "<br>", None, "\ud800", "x" * 200_000, ["several", "texts"]]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"image": "x.jpg", "text": text}) for text in texts))
    table(tmp_path / "t.jsonl", tmp_path / "out", workers=1, allow_dropped=1)
    assert list(ShardIndex.open(tmp_path / "out").texts) == ["good", "several texts"]
    reasons = report(tmp_path / "out")["dropped"]["reasons"]
    assert reasons == {
        "the text is empty": 4,
        "the text is not valid Unicode": 1,
        "the text has more than 100,000 characters": 1,
    }


def test_encode(tmp_path: Path):
    """Turned images are put upright, large ones reduced, all others stored unchanged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Encoding().encode(encoded_image(1, 40, 60, exif=exif))
    assert Image.open(io.BytesIO(turned)).size == (60, 40)
    small = Encoding(size=32).encode(encoded_image(2, 200, 100, kind="PNG"))
    assert Image.open(io.BytesIO(small)).size == (64, 32)
    kept = encoded_image(3, 40, 30)
    assert Encoding(size=32).encode(kept) is kept
    with pytest.raises(RowError):
        Encoding().encode(encoded_image(4)[:200])


BAD_TABLES = {
    "no file": ("t.csv", None, "does not exist"),
    "unknown kind": ("t.xlsx", b"PK", "is of no known kind"),
    "empty CSV": ("t.csv", b"", "is empty"),
    "header alone": ("t.csv", b"image,text\n", "has no rows"),
    "no image column": (
        "t.csv",
        b"a,text\nx.jpg,red\n",
        "has no column of a usual name (image, img, jpg ...). Name one by --image: a, text.",
    ),
    "no text column": ("t.csv", b"image,b\nx.jpg,red\n", "Name one by --text: image, b."),
    "a row with fewer columns": ("t.csv", b"image,text\nx.jpg,red\nx.jpg\n", "row 1 has 1 columns. It should have 2"),
    "an open quote": ("t.csv", b'image,text\nx.jpg,"red\n', "line 2 is not valid CSV"),
    "CSV not UTF-8": ("t.csv", b"image,text\nx.jpg,caf\xe9\n", "line 2 is not UTF-8"),
    "broken JSON": ("t.jsonl", b'{"image": "x.jpg", "text": "red"}\n\n{"image": \n', "line 3 is not valid JSON"),
    "deep JSON": ("t.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
    "a list": ("t.jsonl", b"[1]\n", "line 1 is not an object"),
    "text a number": ("t.jsonl", b'{"image": "x.jpg", "text": 3}\n', "row 0: text is 3. It should be a text."),
    "image a number": ("t.jsonl", b'{"image": 3, "text": "red"}\n', "row 0: the image is 3"),
    "product a list": (
        "t.jsonl",
        b'{"image": "x.jpg", "text": "red", "product_id": [1]}\n',
        "row 0: product_id is [1]",
    ),
    "product too large": (
        "t.jsonl",
        b'{"image": "x.jpg", "text": "red", "product_id": 99999999999999999999}\n',
        "product_id is 9999",
    ),
    "path to the outside": ("t.csv", b"image,text\n../secret.jpg,red\n", "row 0: the image '../secret.jpg' is outside"),
    "absolute path": ("t.csv", b"image,text\n/etc/passwd,red\n", "row 0: the image '/etc/passwd' is outside"),
    "link to the outside": ("t.csv", b"image,text\nlink.jpg,red\n", "'link.jpg' is outside"),
    "missing images": ("t.csv", b"image,text\nno.jpg,red\nx.jpg,blue\n", "The first is row 0: the image is missing"),
    "nothing usable": ("t.csv", b"image,text\nno.jpg,red\n", "1 of 1 rows cannot be used"),
    "no Parquet": ("t.parquet", b"PAR1 hello PAR1", "is not a complete Parquet file"),
    "Parquet cut off": ("t.parquet", "cut", "is not a complete Parquet file"),
    "Parquet damaged": ("t.parquet", "damaged", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, content, expected = BAD_TABLES[name]
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(encoded_image(0))
    (folder / "x.jpg").write_bytes(encoded_image(1))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    source = folder / file
    if file.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    if isinstance(content, str):
        rows = [{"image": encoded_image(n), "text": f"coat {n}"} for n in range(40)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source, compression="gzip")
        data = bytearray(source.read_bytes())
        if content == "cut":
            del data[len(data) // 2 :]
        else:
            data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
        content = bytes(data)
    if content is not None:
        source.write_bytes(content)
    sentence = refusal(capsys, "table", source, tmp_path / "out", "--workers", "1")
    assert str(source) in sentence
    assert expected in sentence
    assert not list((tmp_path / "out").glob("*.tar"))


def test_table_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Lines and columns that would fill the memory are refused."""
    from syncmask_fast.sources import table as module

    monkeypatch.setattr(module, "MAX_LINE", 1000)
    monkeypatch.setattr(module, "MAX_UNPACKED", 100_000)
    for name, content in (
        ("t.jsonl", '{"image": "x.jpg", "text": "' + "x" * 2000),
        ("t.csv", "image,text\nx.jpg," + "x" * 2000),
    ):
        (tmp_path / name).write_text(content)
        assert "has more than" in refusal(capsys, "table", tmp_path / name, tmp_path / "out")
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    bomb = pyarrow.table({"image": [bytes(10**6)], "text": ["coat"]})
    pyarrow.parquet.write_table(bomb, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    assert "unpacks to" in refusal(capsys, "table", tmp_path / "t.parquet", tmp_path / "out")


def test_no_pyarrow(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert "pip install 'syncmask_fast[parquet]'" in refusal(capsys, "table", tmp_path / "t.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--quality", "0"], "--quality 0 is out of range"),
        (["--workers", "0"], "--workers 0 is out of range"),
        (["--rows-per-shard", "0"], "--rows-per-shard 0 is out of range"),
        (["--allow-dropped", "2"], "--allow-dropped 2.0 is out of range"),
        (["--size", "3"], "--size 3 is out of range"),
        (["--images", "no/such"], "no/such is not a folder"),
        (["--product", "sku"], "has no column 'sku'"),
    ],
)
def test_bad_flags(flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.jpg").write_bytes(encoded_image(1))
    (tmp_path / "t.csv").write_text("image,text\nx.jpg,red\n")
    assert expected in refusal(capsys, "table", tmp_path / "t.csv", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A second packing process is refused."""
    import fcntl

    write_fashiongen(tmp_path / "x.h5", 4)
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    with open(tmp_path / "out" / ".pack" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is in use by another packing process" in refusal(
            capsys, "fashiongen", tmp_path / "x.h5", tmp_path / "out"
        )


# Looking at shards


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    write_fashiongen(tmp_path / "x.h5", 30)
    fashiongen(tmp_path / "x.h5", tmp_path / "data" / "train", workers=1)
    fashiongen(tmp_path / "x.h5", tmp_path / "data" / "eval", workers=1)
    capsys.readouterr()
    main(["inspect", str(tmp_path / "data"), "--sheet", str(tmp_path / "sheet.png"), "--samples", "7"])
    shown = capsys.readouterr().out
    for part in (
        "train",
        "eval",
        "samples",
        "30",
        "3 to 3, median 3",
        "3: ",
        "tops 12",
        "words per text",
        "32 x 32",
        "unreadable images",
    ):
        assert part in shown
    assert Image.open(tmp_path / "sheet.png").width > 1000
    assert "cannot be written" in refusal(capsys, "inspect", tmp_path / "data", "--sheet", tmp_path / "x.txt")
    assert "does not exist" in refusal(capsys, "inspect", tmp_path / "nowhere")
