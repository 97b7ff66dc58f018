"""Shards: what is written is read back; what is damaged is named, counted and left out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from syncmask_fast.data import shard_index, shard_writer
from syncmask_fast.data.shard_writer import ShardSetWriter
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.tar import tar_members
from syncmask_fast.utils.errors import UserError


def jpeg(size: int = 8, fmt: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 60)).save(out, fmt)
    return out.getvalue()


JPEG = jpeg()


def record(product: object, text: str = "a red dress", **more: object) -> bytes:
    return json.dumps({"product_id": product, "text": text, **more}).encode()


def make_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    pairs = ([(f"s{i:04d}.jpg", JPEG), (f"s{i:04d}.json", record(i))] for i in range(first, first + count))
    return [member for pair in pairs for member in pair]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_round_trip(tmp_path):
    span = {"name": "pocket", "value": "patch", "span": [2, 5], "box": [0, np.float32(1.5), 7, np.int64(8)]}
    with ShardSetWriter(tmp_path, samples_per_shard=3) as writer:
        for i in range(7):
            more = {
                "category": "dress",
                "subcategory": f"kind {i % 2}",
                "view": ("front", "back")[i % 2],
                "attributes": [span],
            }
            writer.write(f"p{i:03d}", jpeg(8 + i), {"product_id": i // 2, "text": f"a dress {i // 2} é", **more})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    index = ShardIndex.open(tmp_path)
    assert len(index) == 7
    assert not index.warnings
    assert index.image_bytes(6) == jpeg(14)
    assert index.key(4) == "p004"
    assert index.shard_path(3).name == "00001.tar"
    assert index.record(5)["attributes"] == [{**span, "box": [0, 1.5, 7, 8]}]
    assert list(index.texts) == [f"a dress {i // 2} é" for i in range(7)]
    assert len(index.texts.unique) == 4
    assert index.texts[1:3] == ["a dress 0 é", "a dress 1 é"]
    assert index.product_ids.dtype == np.int64
    assert index.product_ids.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert index.view.names == ["back", "front"]
    assert index.view.codes.tolist() == [1, 0] * 3 + [1]
    assert index.subcategory.names == ["kind 0", "kind 1"]


def test_same_samples_same_bytes(tmp_path):
    for name in ("a", "b"):
        with ShardSetWriter(tmp_path / name) as writer:
            writer.write("k", JPEG, {"text": "a dress"})
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()


def test_tarfile_reads_what_is_written(tmp_path):
    long_key = "folder/" + "x" * 150  # longer than a tar header's name field
    with ShardSetWriter(tmp_path, prefix="part-") as writer:
        writer.write(long_key, jpeg(fmt="PNG"), {"text": "a dress"})
    with tarfile.open(tmp_path / "part-00000.tar") as tar:
        assert tar.getnames() == [f"{long_key}.png", f"{long_key}.json"]
    assert ShardIndex.open(tmp_path).key(0) == long_key


def test_exception_leaves_whole_shards_only(tmp_path):
    def write_three() -> None:
        with ShardSetWriter(tmp_path, samples_per_shard=2) as writer:
            for i in range(3):
                writer.write(f"k{i}", JPEG, {"text": "a dress"})
            raise KeyError("the source broke")

    with pytest.raises(KeyError):
        write_three()
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]
    assert len(ShardIndex.open(tmp_path)) == 2


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a ", "a\0"])
def test_writer_refuses_keys(tmp_path, key):
    with ShardSetWriter(tmp_path) as writer, pytest.raises(ValueError, match="key"):
        writer.write(key, JPEG, {"text": "x"})


def test_writer_refuses_misuse(tmp_path):
    with ShardSetWriter(tmp_path) as writer:
        writer.write("a", JPEG, {"text": "x"})
        with pytest.raises(ValueError, match="written before"):
            writer.write("a", JPEG, {"text": "x"})
        with pytest.raises(ValueError, match="neither JPEG"):
            writer.write("b", b"no image", {"text": "x"})
        with pytest.raises(ValueError, match="JSON"):
            writer.write("c", JPEG, {"text": "x", "facts": float("nan")})
    assert len(ShardIndex.open(tmp_path)) == 1
    with pytest.raises(UserError, match="already exists"):
        ShardSetWriter(tmp_path)


@pytest.mark.parametrize("name", ["a.jpg", "x" * 100, "x" * 101, "ü" * 50, "ü" * 51, "folder/b.json"])
@pytest.mark.parametrize("size", [0, 1, 511, 8**11 - 1, 8**11])
def test_written_headers_are_tarfiles_own(name, size):
    member = tarfile.TarInfo(name)
    member.size = size
    assert shard_writer._header(name, size) == member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_equal_tarfile(tmp_path, tar_format):
    long = ("d" * 60 + "/") * 2 + "n" * 90  # ustar: prefix; GNU: long name; pax: path
    names = ["a.jpg", "ordner/ü.json" if tar_format != tarfile.USTAR_FORMAT else "b.json", long]
    path = tmp_path / "x.tar"
    make_tar(path, [(name, b"x" * (i * 700)) for i, name in enumerate(names)], tar_format)
    with tarfile.open(path, "a", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("last.txt"))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert list(tar_members(path.read_bytes())) == expected
    assert len(expected) == 4


def with_box(box: list[float]) -> bytes:
    return record(1, attributes=[{"span": [0, 1], "box": box}])


GOOD_IMAGE = ("bad.jpg", JPEG)
BAD_SAMPLES = {
    "no image": ([("bad.json", record(1))], "no image"),
    "no record": ([("bad.jpg", JPEG)], "no .json or .txt"),
    "broken JSON": ([GOOD_IMAGE, ("bad.json", b'{"text": ')], "JSON cannot be read"),
    "not UTF-8": ([GOOD_IMAGE, ("bad.json", b'{"text": "\xff"}')], "JSON cannot be read"),
    "deep JSON": ([GOOD_IMAGE, ("bad.json", b"[" * 100_000)], "JSON cannot be read"),
    "a list": ([GOOD_IMAGE, ("bad.json", b"[]")], "not an object"),
    "no text": ([GOOD_IMAGE, ("bad.json", b"{}")], "no text"),
    "text a number": ([GOOD_IMAGE, ("bad.json", b'{"text": 3}')], "no text"),
    "empty text": ([GOOD_IMAGE, ("bad.json", b'{"text": " "}')], "text is empty"),
    "half a surrogate": ([GOOD_IMAGE, ("bad.json", b'{"text": "\\ud800"}')], "Unicode"),
    "product a float": ([GOOD_IMAGE, ("bad.json", record(1.5))], "product_id"),
    "product too large": ([GOOD_IMAGE, ("bad.json", record(2**70))], "product_id"),
    "span beyond": ([GOOD_IMAGE, ("bad.json", record(1, attributes=[{"span": [0, 99]}]))], "attributes"),
    "box of three": ([GOOD_IMAGE, ("bad.json", with_box([1, 2, 3]))], "attributes"),
    "box NaN": ([GOOD_IMAGE, ("bad.json", with_box([1, 2, 3, float("nan")]))], "attributes"),
    "attributes a dict": ([GOOD_IMAGE, ("bad.json", record(1, attributes={}))], "attributes"),
    "no image bytes": ([("bad.jpg", b""), ("bad.json", record(1))], "image is empty"),
    "a text as image": ([("bad.jpg", b"hello"), ("bad.json", record(1))], "neither JPEG"),
    "twice": ([GOOD_IMAGE, ("bad.json", record(1)), GOOD_IMAGE, ("bad.json", record(2))], "appears twice"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_sample_is_named_and_left_out(tmp_path, name):
    members, reason = BAD_SAMPLES[name]
    make_tar(tmp_path / "x.tar", samples(60) + members + samples(60, 60))
    index = ShardIndex.open(tmp_path)
    assert len(index.warnings) == 1
    assert index.warnings[0].startswith("x.tar: member bad: ")
    assert reason in index.warnings[0]
    assert len(index) == (121 if name == "twice" else 120)
    assert index.texts[119] == "a red dress"
    make_tar(tmp_path / "x.tar", samples(20) + members)  # now 1 of 21: too many
    with pytest.raises(UserError, match=r"x\.tar: member bad"):
        ShardIndex.open(tmp_path)


@pytest.mark.parametrize("cut", [100, 512 + 200, 512 * 3 + 17])
def test_truncated_tar(tmp_path, cut):
    make_tar(tmp_path / "00.tar", samples(150))
    make_tar(tmp_path / "01.tar", samples(3, 150))
    whole = (tmp_path / "01.tar").read_bytes()
    (tmp_path / "01.tar").write_bytes(whole[:cut])
    index = ShardIndex.open(tmp_path)
    assert len(index) == 150
    assert len(index.warnings) == 1
    assert index.warnings[0].startswith("01.tar: the file ends inside")


def test_not_a_tar_and_missing_end(tmp_path):
    make_tar(tmp_path / "00.tar", samples(200))
    (tmp_path / "01.tar").write_bytes(b"this is no archive. " * 100)
    make_tar(tmp_path / "02.tar", samples(1, 200))
    whole = (tmp_path / "02.tar").read_bytes()
    (tmp_path / "02.tar").write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512))
    index = ShardIndex.open(tmp_path)
    assert len(index) == 201
    assert "01.tar" in index.warnings[0]
    assert "end of the archive is missing" in index.warnings[1]


def test_plain_webdataset(tmp_path):
    members = [
        ("./a/0.TXT", b" a red dress \n"),
        ("./a/0.PNG", jpeg(fmt="PNG")),
        ("./a/0.seg.png", b"ignored"),
        ("readme", b"x"),
    ]
    make_tar(
        tmp_path / "x.tar",
        members + [("b.webp", jpeg(fmt="WEBP")), ("b.json", b'{"text": "blue", "product_id": null}')],
    )
    make_tar(tmp_path / "._x.tar", [])  # what macOS leaves beside files
    index = ShardIndex.open(tmp_path)
    assert list(index.texts) == ["a red dress", "blue"]
    assert index.record(0) == {"text": "a red dress"}
    assert index.key(0) == "a/0"
    assert index.product_ids.tolist() == [0, 1]
    assert index.category.codes.tolist() == [-1, -1]
    assert index.image_bytes(0) == jpeg(fmt="PNG")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 5, 900], [5, 5, 900]),
        ([5, None, 900, None], [5, 901, 900, 902]),
        (["x", "y", "x", None], [0, 1, 0, 2]),
        (["7", 7, None, "a"], [0, 0, 1, 2]),
        ([2**63 - 1, None], [0, 1]),
        ([None, None], [0, 1]),
        ([-3, None], [-3, -2]),
    ],
)
def test_product_numbers(ids, expected):
    assert shard_index.encode_product_ids(ids).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=3)), max_size=20))
def test_product_numbers_tell_products_apart(ids):
    numbers = shard_index.encode_product_ids(ids).tolist()
    for i, a in enumerate(ids):
        for j, b in enumerate(ids):
            same = i == j or (a is not None and b is not None and str(a) == str(b))
            assert (numbers[i] == numbers[j]) == same


def test_cache_is_used_and_renewed(tmp_path, monkeypatch):
    make_tar(tmp_path / "x.tar", samples(3))
    first = ShardIndex.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "_build", lambda *_: pytest.fail("the cache was not used"))
        again = ShardIndex.open(tmp_path)
    assert list(again.texts) == list(first.texts)
    assert again.record(2) == first.record(2)
    assert again.image_bytes(1) == first.image_bytes(1)
    make_tar(tmp_path / "y.tar", samples(2, 3))
    assert len(ShardIndex.open(tmp_path)) == 5
    os.utime(tmp_path / "y.tar", ns=(1, 1))
    built = []
    build = shard_index._build
    monkeypatch.setattr(shard_index, "_build", lambda *shards: built.append(1) or build(*shards))
    ShardIndex.open(tmp_path)
    assert built == [1]
    cache = tmp_path / shard_index.CACHE_NAME
    cache.write_bytes(cache.read_bytes()[:-300])  # damaged
    assert len(ShardIndex.open(tmp_path)) == 5
    assert built == [1, 1]


def test_read_only_folder_uses_the_users_cache(tmp_path, monkeypatch):
    make_tar(tmp_path / "x.tar", samples(3))
    user = Path(os.environ["XDG_CACHE_HOME"]) / "syncmask_fast"
    real = shard_index.atomic_file

    def refuse(path, durable):  # root may write anywhere, so file modes cannot test this
        if path.parent == tmp_path:
            raise PermissionError("read-only")
        return real(path, durable)

    monkeypatch.setattr(shard_index, "atomic_file", refuse)
    assert len(ShardIndex.open(tmp_path)) == 3
    assert len(list(user.iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]
    monkeypatch.setattr(shard_index, "_build", lambda *_: pytest.fail("the cache was not used"))
    assert len(ShardIndex.open(tmp_path)) == 3


def test_processes_build_at_once(tmp_path):
    make_tar(tmp_path / "x.tar", samples(300))
    code = f"from syncmask_fast.data.shards import ShardIndex; print(len(ShardIndex.open({str(tmp_path)!r})))"
    root = Path(__file__).parents[1]
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["300"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [shard_index.CACHE_NAME, "x.tar"]


def test_errors_name_folder_and_fix(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ShardIndex.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"contains no \.tar shards"):
        ShardIndex.open(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"Decompress a\.tar\.gz"):
        ShardIndex.open(tmp_path)
    (tmp_path / "a.tar.gz").unlink()
    make_tar(tmp_path / "train/x.tar", samples(1))
    with pytest.raises(UserError, match="train"):
        ShardIndex.open(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        ShardIndex.open(tmp_path / "train/x.tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/x.tar").write_bytes(b"")
    with pytest.raises(UserError, match="and 0 good"):
        ShardIndex.open(tmp_path / "empty")


def test_shard_that_shrinks_is_a_user_error(tmp_path):
    make_tar(tmp_path / "x.tar", samples(3))
    index = ShardIndex.open(tmp_path)
    os.truncate(tmp_path / "x.tar", 600)
    with pytest.raises(UserError, match="was changed while the run read it"):
        index.image_bytes(2)


def test_many_shards_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("syncmask_fast.data.shards.MAX_OPEN_SHARDS", 2)
    with ShardSetWriter(tmp_path, samples_per_shard=1) as writer:
        for i in range(6):
            writer.write(f"k{i}", jpeg(8 + i), {"text": "a dress"})
    index = ShardIndex.open(tmp_path)
    for i in [0, 5, 1, 4, 0, 3, 2]:
        assert index.image_bytes(i) == jpeg(8 + i)
    assert len(index._files) == 2
