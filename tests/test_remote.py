"""Remote shards: fetched once, fetched again when they change, and one message when they cannot be."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from syncmask_fast.data import remote
from syncmask_fast.data.remote import fetch_if_remote
from syncmask_fast.data.shard_writer import ShardSetWriter
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.splits import open_evaluation, open_splits
from syncmask_fast.utils.errors import UserError
from tests.helpers import encoded_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_shards(folder: Path, samples: int, word: str = "coat") -> None:
    with ShardSetWriter(folder, samples_per_shard=4) as writer:
        for n in range(samples):
            writer.write(f"{n:04d}", encoded_image(n), {"text": f"{word} {n}", "product_id": n // 2})


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def upload(system: fsspec.AbstractFileSystem, folder: Path, target: str) -> None:
    for path in sorted(folder.rglob("*.tar")):
        system.pipe(f"{target}/{path.relative_to(folder)}", path.read_bytes())


def watch(system: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fetched from now on."""
    fetched: list[str] = []
    get = type(system).get_file

    def noting(self, source: str, *more: object, **options: object) -> None:
        fetched.append(source)
        get(self, source, *more, **options)

    monkeypatch.setattr(type(system), "get_file", noting)
    return fetched


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback, and writes down what was asked for."""

    def __init__(self, folder: Path, listing: bool = True) -> None:
        self.asked: list[str] = []
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                server.asked.append(self.path)
                super().do_GET()

            def list_directory(self, path: str):
                return super().list_directory(path) if listing else self.send_error(404)

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def test_a_folder_here_is_itself(tmp_path: Path):
    assert fetch_if_remote(tmp_path) == tmp_path
    assert fetch_if_remote("some/C:/folder") == Path("some/C:/folder")


def test_memory_with_splits(tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch):
    write_shards(tmp_path / "here" / "train", 10)
    write_shards(tmp_path / "here" / "eval", 5, "hat")
    upload(memory, tmp_path / "here", "/bucket/data")
    train, evaluation = open_splits("memory://bucket/data")
    assert list(train.index.texts) == [f"coat {n}" for n in range(10)]
    assert list(evaluation.index.texts) == [f"hat {n}" for n in range(5)]
    assert len(open_evaluation("memory://bucket/data/")) == 5
    fetched = watch(memory, monkeypatch)
    open_splits("memory://bucket/data")
    assert fetched == []  # all are there
    write_shards(tmp_path / "more", 3, "belt")
    memory.pipe("/bucket/data/train/00001.tar", (tmp_path / "more" / "00000.tar").read_bytes())
    memory.rm("/bucket/data/train/00002.tar")
    train, _ = open_splits("memory://bucket/data")
    assert fetched == ["/bucket/data/train/00001.tar"]
    assert list(train.index.texts) == [f"coat {n}" for n in range(4)] + [f"belt {n}" for n in range(3)]


@pytest.mark.parametrize("listing", [True, False])
def test_http(tmp_path: Path, listing: bool):
    pytest.importorskip("aiohttp")
    write_shards(tmp_path / "served" / "coats", 10)
    server = Server(tmp_path / "served", listing)
    try:
        address = f"{server.address}/coats" + ("" if listing else "/{00000..00002}.tar")
        index = ShardIndex.open(fetch_if_remote(address))
        assert list(index.texts) == [f"coat {n}" for n in range(10)]
        assert index.image_bytes(7) == encoded_image(7)
        asked = [path for path in server.asked if path.endswith(".tar")]
        assert sorted(asked) == [f"/coats/0000{n}.tar" for n in range(3)]
        fetch_if_remote(address)
        assert [path for path in server.asked if path.endswith(".tar")] == asked
        with pytest.raises(UserError, match="hats.* is not there"):
            fetch_if_remote(address.replace("coats", "hats"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match="the server does not answer|cannot be read"):
        fetch_if_remote(address)


def test_a_shard_that_ends_early_is_not_kept(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, own_cache: Path
):
    write_shards(tmp_path / "here", 10)
    upload(memory, tmp_path / "here", "/bucket")
    get = type(memory).get_file

    def cut(self, source: str, target: str, **options: object) -> None:
        get(self, source, target, **options)
        if source.endswith("00001.tar"):
            Path(target).write_bytes(Path(target).read_bytes()[:-600])

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", cut)
        with pytest.raises(UserError, match=r"00001\.tar ended after"):
            fetch_if_remote("memory://bucket")
    assert "00001.tar" not in {path.name for path in own_cache.rglob("*")}
    assert not list(own_cache.rglob("*.partial"))
    fetched = watch(memory, monkeypatch)
    assert len(ShardIndex.open(fetch_if_remote("memory://bucket"))) == 10
    assert fetched == ["/bucket/00001.tar"]  # what had come is kept


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("memory://nowhere", "is not there"),
        ("memory://bucket/{9..3}.tar", "does not rise"),
        ("memory://bucket/{0..9}/{0..9}.tar", "not the only range"),
        ("memory://bucket/{0..99999999}.tar", "at most 1,000,000 numbers"),
        ("nosuch://bucket", "cannot be read"),
        ("s3://bucket/data", r"syncmask_fast\[remote\]"),
    ],
)
def test_what_cannot_be_fetched(address: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UserError, match=expected) as error:
        fetch_if_remote(address)
    assert address in str(error.value)


def test_a_disk_that_is_too_small(tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch):
    write_shards(tmp_path / "here", 4)
    upload(memory, tmp_path / "here", "/bucket")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        fetch_if_remote("memory://bucket")
