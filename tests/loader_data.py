"""Encoded images and small shards for tests of the loader and of what goes wrong under it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from syncmask_fast.data.augment import AugmentConfig
from syncmask_fast.data.decode.backends import make_decoder, why_unavailable
from syncmask_fast.data.loader import Batch, Loader
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.data.tokenizer import train_tokenizer
from tests.helpers import encoded_image

needs_dali = pytest.mark.skipif(why_unavailable("dali") is not None, reason=f"no DALI: {why_unavailable('dali')}")
needs_cpp = pytest.mark.skipif(why_unavailable("cpp") is not None, reason=f"not built: {why_unavailable('cpp')}")

every_backend = pytest.mark.parametrize(
    "backend", ["torchvision", pytest.param("cpp", marks=needs_cpp), pytest.param("dali", marks=needs_dali)]
)

GOOD = encoded_image(0, 90, 120)


def dataset(folder: Path, images: list[bytes]) -> tuple[ShardIndex, TokenCache]:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, image in enumerate(images):
            text = f"a dress number {i // 2} " + "with stripes " * (i % 3)
            for name, data in (
                (f"s{i:03d}.jpg", image),
                (f"s{i:03d}.json", json.dumps({"product_id": 100 + i // 2, "text": text}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index = ShardIndex.open(folder)
    return index, TokenCache.open(folder, train_tokenizer(index.texts, 300), index.texts, 32)


def open_loader(data: tuple[ShardIndex, TokenCache], **options) -> Loader:
    """Return a loader; options of the loader, the others of its decoder."""
    loading = {"augment": AugmentConfig(), "seed": 7}
    decoding = {"backend": "torchvision", "batch_size": 8, "size": 32, "threads": 2}
    for name, value in options.items():
        (loading if name in ("augment", "seed", "drop_last", "prefetch") else decoding)[name] = value
    return Loader(*data, make_decoder(**decoding), **loading)


def by_sample(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {
        sample: pixels
        for batch in batches
        for sample, pixels in zip(batch.sample_ids.tolist(), batch.pixels, strict=True)
    }
