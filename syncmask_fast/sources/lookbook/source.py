"""The lookbook as a source: product numbers to rows, and two ways to start drawing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.triplets import GALLERIES, TRIPLETS
from syncmask_fast.sources.base import Encoding, Row, ShardSpec, Source, chunk
from syncmask_fast.sources.lookbook.captions import describe, facts
from syncmask_fast.sources.lookbook.catalogue import sample_product, stream
from syncmask_fast.sources.lookbook.drawing import render
from syncmask_fast.sources.lookbook.triplets import make_triplets
from syncmask_fast.sources.packing import pack
from syncmask_fast.utils.errors import UserError

VERSION = 6  # of the drawings: raise it when the same settings give other images, texts or boxes
PRODUCTS_PER_SHARD = 64  # about 250 images: small shards keep all workers busy
LIMITS = dict(products=(1, 10**7), eval_products=(1, 10**7), size=(32, 1024), seed=(0, 2**63 - 1))


@dataclass(frozen=True)
class Lookbook(Source):
    """Products of two splits. The same settings give the same images and texts. errors: UserError for a bad number.

    products:      train products, of 3 to 5 images each. Product number i of a split does not depend on the count.
    eval_products: the same for eval. Their product ids follow those of train.
    size:          width and height of the images in pixels.
    seed:          other seeds give other products.
    """

    products: int = 2000
    eval_products: int = 400
    size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            if not least <= getattr(self, name) <= most:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, name)} is out of range. Give a number from {least} to {most}.")

    def describe(self) -> dict[str, Any]:
        return {"source": "the lookbook", "kind": "lookbook", "version": VERSION, **asdict(self)}

    def shards(self, rows: int) -> list[ShardSpec]:
        return [*chunk(self.products, rows, "train"), *chunk(self.eval_products, rows, "eval")]

    def read(self, shard: ShardSpec) -> Iterator[Row]:
        for number in range(shard.start, shard.stop):
            yield from self.product_rows(shard.folder, number)

    def extra_files(self, out: Path) -> dict[str, Any]:
        found = {}
        for split in ("train", "eval"):
            index = ShardIndex.open(out / split)
            triplets, galleries = make_triplets((index.key(i), index.record(i)) for i in range(len(index)))
            found |= {f"{split}/{TRIPLETS}": triplets, f"{split}/{GALLERIES}": galleries}
        return found

    def product_rows(self, split: str, number: int) -> Iterator[Row]:
        """Draw one product: a row for each of its views."""
        product = sample_product(self.seed, split, number)
        text, mentions = describe(product, stream(self.seed, split, number, "text"))
        first_id = 0 if split == "train" else self.products
        for index, name in enumerate(product.views):
            view = render(product, index, self.size, self.seed, split)
            record = {
                "product_id": first_id + number,
                "text": text,
                "category": product.category,
                "subcategory": product.subcategory,
                "view": name,
                "attributes": [
                    {"name": m.name, "value": m.value, "span": [m.start, m.end], "box": _rounded(view.boxes[m.name])}
                    for m in mentions
                ],
                "facts": facts(product),
            }
            if product.sibling_of is not None:
                record["sibling_of"] = first_id + product.sibling_of
            key = f"{first_id + number:07d}_{index}_{name}"
            yield Row(f"{split} product {number}", key, np.asarray(view.image), record, continues=index > 0)


def _rounded(box: list[float] | None) -> list[float] | None:
    return None if box is None else [round(value, 2) for value in box]


def draw_lookbook(
    out: Path,
    products: int = 2000,
    eval_products: int = 400,
    size: int = 96,
    seed: int = 0,
    quality: int = 90,
    workers: int | None = None,
) -> dict[str, Any]:
    """Draw OUT/train and OUT/eval with triplets.json and galleries.json, and return the report.

    Arguments as in `Lookbook`, `Encoding` and `pack`, whose errors they raise. A complete OUT stays as it is.
    """
    source = Lookbook(products, eval_products, size, seed)
    encoding = Encoding(quality, subsampling="4:4:4")
    return pack(source, out, encoding, PRODUCTS_PER_SHARD, workers, allow_dropped=0.0)


def draw_in_child(out: Path, *, size: int) -> None:
    """Draw the lookbook with the packing command, whose workers import no torch.

    errors: SystemExit with the command's exit code. The command itself prints what is wrong.
    """
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "syncmask_fast.pack", "lookbook", str(out), "--size", str(size)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})  # noqa: S603 (this package's own command)
    if done.returncode:
        raise SystemExit(done.returncode)
