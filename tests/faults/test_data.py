"""Shards that vanish, change or cannot be read, dying workers and DALI pipelines, and oversized images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from syncmask_fast.data.decode import transform as render
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.utils.errors import UserError
from tests.helpers import encoded_image
from tests.loader_data import GOOD, by_sample, dataset, every_backend, needs_dali, open_loader


@pytest.fixture
def data(tmp_path: Path):
    return dataset(tmp_path, [encoded_image(n, 60 + n, 50) for n in range(12)])


def all_batches(data, **options) -> tuple[dict[int, torch.Tensor], dict[int, str]]:
    with open_loader(data, batch_size=4, **options) as loader:
        return by_sample(list(loader.epoch(np.arange(len(data[0])), 0))), dict(loader.skipped)


def test_shard_that_vanishes(data, tmp_path: Path):
    (tmp_path / "0.tar").unlink()
    with pytest.raises(UserError, match=r"0\.tar can no longer be opened .* Restore it and start again"):
        all_batches(data)


@pytest.mark.parametrize("change", ["rewritten in place", "cut", "grown"])
def test_shard_that_changes_under_the_run(data, tmp_path: Path, change: str):
    """The same length, but other images under the old captions: only this check notices it."""
    shard = tmp_path / "0.tar"
    with open_loader(data, batch_size=4) as loader:
        assert len(list(loader.epoch(np.arange(12), 0))) == 3
        content = shard.read_bytes()
        if change == "rewritten in place":
            with open(shard, "r+b") as file:
                file.write(content[::-1])
        else:
            os.truncate(shard, len(content) // 2 if change == "cut" else 2 * len(content))
        with pytest.raises(UserError, match=r"0\.tar was changed while the run read it"):
            list(loader.epoch(np.arange(12), 1))


def test_shard_that_is_replaced_by_a_new_one_is_read_to_its_end(data, tmp_path: Path):
    """As rsync and packing do it: the open file stays what it was."""
    before, _ = all_batches(data)
    with open_loader(data, batch_size=4) as loader:
        batches = loader.epoch(np.arange(12), 0)
        first = next(batches)
        (tmp_path / "new").write_bytes(b"something else")
        os.replace(tmp_path / "new", tmp_path / "0.tar")
        after = by_sample([first, *batches])
    assert all(torch.equal(before[n], after[n]) for n in range(12))


def test_disk_that_fails_once_and_for_good(data, monkeypatch: pytest.MonkeyPatch):
    """One failure reopens the file; a lasting one skips the sample with a warning."""
    before, _ = all_batches(data)
    real, failed = os.pread, []
    index = data[0]
    bad = int(index._arrays.image_offset[5])

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if offset == bad or (offset == int(index._arrays.image_offset[2]) and not failed):
            failed.append(offset)
            raise OSError(5, "Input/output error")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    after, skipped = all_batches(data)
    assert after.keys() == before.keys() - {5}
    assert all(torch.equal(before[n], after[n]) for n in after)
    assert list(skipped) == [5]
    assert "Input/output error" in skipped[5]


def test_worker_that_dies_costs_its_image(data, monkeypatch: pytest.MonkeyPatch):
    before, _ = all_batches(data)
    real = render.decode_image
    index = data[0]

    def dying(encoded: bytes) -> np.ndarray:
        if encoded == index.image_bytes(7):
            raise MemoryError
        return real(encoded)

    monkeypatch.setattr(render, "decode_image", dying)
    after, skipped = all_batches(data)
    assert after.keys() == before.keys() - {7}
    assert all(torch.equal(before[n], after[n]) for n in after)
    assert skipped == {7: "MemoryError"}


@needs_dali
def test_dali_pipeline_that_dies_is_rebuilt(data, monkeypatch: pytest.MonkeyPatch):
    """Nothing is wrong with the images: not one of them is lost, and not one bit of their pixels."""
    from syncmask_fast.data.decode.dali import DaliDecoder

    before, _ = all_batches(data, backend="dali")
    real, calls = DaliDecoder._outputs, []

    def dying(self):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the pipeline died")
        return real(self)

    monkeypatch.setattr(DaliDecoder, "_outputs", dying)
    after, skipped = all_batches(data, backend="dali")
    assert skipped == {}
    assert all(torch.equal(before[n], after[n]) for n in range(12))


@needs_dali
def test_dali_pipeline_that_keeps_dying_is_a_sentence(data, monkeypatch: pytest.MonkeyPatch):
    from syncmask_fast.data.decode.dali import DaliDecoder

    monkeypatch.setattr(DaliDecoder, "_outputs", lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(UserError, match=r"DALI failed .* CUDA error. Choose --decoder torchvision"):
        all_batches(data, backend="dali")


@needs_dali
def test_what_dali_cannot_read_has_the_same_pixels_in_any_company(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pillow reads it in its place, it alone, whichever batch meets it first: else a run that is resumed would see
    other pixels.
    """
    from syncmask_fast.data.decode.dali import DaliDecoder

    data = dataset(tmp_path, [encoded_image(n, 60 + n, 50) for n in range(12)])
    before, _ = all_batches(data, backend="dali")
    real = DaliDecoder._next_inputs
    odd = data[0].image_bytes(6)

    def unreadable(self):
        encoded, *others = real(self)
        return [image[:300] if image.tobytes() == odd else image for image in encoded], *others

    monkeypatch.setattr(DaliDecoder, "_next_inputs", unreadable)
    found = []
    for order in (np.arange(12), np.array([6, 11, 10, 9, 8, 7, 5, 4, 3, 2, 1, 0])):
        with open_loader(data, batch_size=4, backend="dali", augment=None) as loader:
            found.append(by_sample(list(loader.epoch(order, 0))))
            assert loader.decoder._recode == {6}
            assert loader.skipped == []
    assert all(torch.equal(found[0][n], found[1][n]) for n in range(12))
    assert before.keys() == found[0].keys()


@every_backend
def test_images_of_20_000_pixels(tmp_path: Path, backend: str):
    """A strip of 20,000 is read; a square would take 1.2 GB and is skipped before it is decoded."""
    images = [GOOD, encoded_image(0, 20_000, 30), huge_square(), GOOD]
    pixels, skipped = all_batches(dataset(tmp_path, images), backend=backend)
    assert sorted(pixels) == [0, 1, 3]
    assert skipped == {2: "the image has 20000 x 20000 pixels, more than 64,000,000"}


def huge_square() -> bytes:
    """A JPEG whose header says 20,000 x 20,000; nobody may come to the rest."""
    data = bytearray(GOOD)
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = (20_000).to_bytes(2, "big") * 2
    return bytes(data)


@every_backend
def test_image_smaller_than_its_header(tmp_path: Path, backend: str):
    """A second frame header: the crop is drawn for the first size, the decoder gives the other."""
    small = encoded_image(0, 40, 30)
    frame = bytearray(small[small.index(b"\xff\xc0") :][:19])
    frame[5:9] = (200).to_bytes(2, "big") * 2
    lying = small[:2] + b"\xff\xc1" + bytes(frame[2:]) + small[2:]
    data = dataset(tmp_path, [GOOD, lying, GOOD])
    pixels, skipped = all_batches(data, backend=backend)
    assert {0, 2} <= pixels.keys()
    assert pixels.keys() | skipped.keys() == {0, 1, 2}


def test_missing_shard_ends_a_resume_with_a_sentence(tmp_path: Path):
    """`fingerprint` and the number of samples tell a run that data is gone or another; see `test_resume.py`."""
    marks = []
    for count in (12, 11):
        marks.append(
            dataset(tmp_path / str(count), [encoded_image(n, 60 + n, 50) for n in range(count)])[0].fingerprint()
        )
    again = ShardIndex.open(tmp_path / "12").fingerprint()
    assert marks[0] == again != marks[1]
