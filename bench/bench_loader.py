"""The loader against PyTorch's DataLoader with Pillow and torchvision, and against decoding alone: 256 px in, crops of
224 px out.
"""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from syncmask_fast.data.augment import AugmentConfig
from syncmask_fast.data.decode.backends import make_decoder
from syncmask_fast.data.decode.transform import JpegDecoder
from syncmask_fast.data.images import PIXEL_MEAN, PIXEL_STD
from syncmask_fast.data.loader import Loader
from syncmask_fast.data.shard_writer import ShardSetWriter
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.utils.device import cpu_cores
from tests.helpers import WORDS, small_tokenizer

IMAGES, BATCH, SIDE, CROP = 1024, 64, 256, 224
AUGMENT = AugmentConfig(brightness=0, contrast=0, saturation=0)
THREADS = cpu_cores()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of quality 90 and about 25 KB: blurred colors under some noise."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    with ShardSetWriter(folder) as writer:
        for n in range(IMAGES):
            blurred = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(
                (SIDE, SIDE), Image.Resampling.BICUBIC
            )
            noisy = np.clip(np.asarray(blurred, np.int16) + rng.integers(-9, 10, (SIDE, SIDE, 3)), 0, 255).astype(
                np.uint8
            )
            buffer = io.BytesIO()
            Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
            writer.write(f"{n:06d}", buffer.getvalue(), {"product_id": n, "text": " ".join(rng.choice(WORDS, 20))})
    return folder


class Samples(torch.utils.data.Dataset):
    """What a map-style dataset does: read, decode with Pillow, crop, flip, normalize; one image at a time."""

    def __init__(self, tar: Path) -> None:
        with tarfile.open(tar) as archive:
            self.places = [(member.offset_data, member.size) for member in archive if member.name.endswith(".jpg")]
        self.tar = tar
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(CROP, AUGMENT.scale, AUGMENT.ratio),
                v2.RandomHorizontalFlip(AUGMENT.flip),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(PIXEL_MEAN, PIXEL_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> torch.Tensor:
        offset, size = self.places[i]
        with open(self.tar, "rb") as file:
            file.seek(offset)
            return self.transform(Image.open(io.BytesIO(file.read(size))).convert("RGB"))


def delivering(loader: Loader):
    """A function that delivers one epoch in a random order; the order is another one each time."""
    rng, epoch = np.random.default_rng(0), iter(range(10**9))

    def deliver() -> None:
        for batch in loader.epoch(rng.permutation(IMAGES), next(epoch)):
            assert batch.pixels.shape == (BATCH, 3, CROP, CROP)

    return deliver


@pytest.mark.parametrize("provider", ["ours", "ours-dali", "ours-torchvision", "dataloader", "decode"])
def test_loader(provider, device, shards, benchmark, measured):
    measured.require_green("loader")
    index = ShardIndex.open(shards)
    opened = None
    if provider.startswith("ours"):
        tokens = TokenCache.open(shards, small_tokenizer(), index.texts, 64)
        backend = provider.removeprefix("ours").removeprefix("-") or "auto"
        decoder = make_decoder(backend, batch_size=BATCH, size=CROP, device=device, jitter=AUGMENT.changes_colors)
        opened = Loader(index, tokens, decoder, AUGMENT)
        function = delivering(opened)
    elif provider == "dataloader":
        workers = torch.utils.data.DataLoader(
            Samples(next(shards.glob("*.tar"))),
            BATCH,
            shuffle=True,
            num_workers=THREADS,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

        def function() -> None:
            for pixels in workers:
                pixels.to(device, non_blocking=True)
    else:  # the ceiling: nothing but decoding, as the compiled way does it
        encoded, pool, decode = (
            [index.image_bytes(i) for i in range(IMAGES)],
            ThreadPoolExecutor(THREADS),
            JpegDecoder(),
        )

        def function() -> None:
            for _ in pool.map(decode, encoded):
                pass

    measured.measure_whole(
        benchmark,
        operator="loader",
        provider=provider,
        device=device,
        dtype=torch.float32,
        case=dict(images=IMAGES, px=SIDE, crop=CROP, batch=BATCH),
        function=function,
        items=IMAGES,
        rounds=5,
    )
    if opened is not None:
        opened.close()
