"""FashionGen's HDF5 files (`fashiongen_256_256_train.h5`, `..._validation.h5`).

Datasets of N rows: `input_image` uint8 [N, H, W, 3]; texts as fixed-width ISO-8859-1 bytes [N, 1] or [N];
`input_productID` as integers of the same shape. Rows are read in blocks, so memory does not grow with the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np

from syncmask_fast.data.images import MAX_PIXELS
from syncmask_fast.sources.base import Row, RowError, ShardSpec, Source, chunk
from syncmask_fast.sources.text_cleaning import clean, decode_field, join, label
from syncmask_fast.utils.errors import UserError, one_line

IMAGES, PRODUCTS = "input_image", "input_productID"
LABELS = {"category": "input_category", "subcategory": "input_subcategory", "view": "input_pose"}
FACTS = ("brand", "composition", "department", "gender", "season")  # copied to the record if the file has them
BLOCK_BYTES = 16 * 2**20  # of pixels read at once ...
CHUNK_BYTES = 256 * 2**20  # ... unless the file is stored in larger pieces, up to this
MAX_FIELD = 2**20  # bytes of one text


@dataclass(frozen=True)
class FashionGen(Source):
    """A FashionGen file. `text` names the fields, without `input_`, that a text is made of, in this order."""

    path: Path
    text: tuple[str, ...] = ("name", "description")

    def describe(self) -> dict[str, Any]:
        stat = self._stat()
        file = {"source": str(self.path.resolve()), "bytes": stat.st_size, "changed": stat.st_mtime_ns}
        return {"kind": "fashiongen", **file, "text": self.text}

    def shards(self, rows: int) -> list[ShardSpec]:
        with self._open() as file:
            return chunk(self._check(file), rows)

    def read(self, shard: ShardSpec) -> Iterator[Row]:
        with self._open() as file:
            self._check(file)
            images = file[IMAGES]
            row_bytes = math.prod(images.shape[1:])
            stored = images.chunks[0] if images.chunks else 1
            step = max(1, BLOCK_BYTES // row_bytes)
            if stored * row_bytes <= CHUNK_BYTES:
                step = -(-step // stored) * stored  # complete chunks, so none is decompressed twice
            texts = {name: file[f"input_{name}"] for name in (*self.text, *FACTS) if f"input_{name}" in file}
            labels = {name: file[key] for name, key in LABELS.items() if key in file}
            start = shard.start
            while start < shard.stop:
                stop = min(shard.stop, (start // step + 1) * step)
                pixels, products = (self._block(file[key], start, stop) for key in (IMAGES, PRODUCTS))
                fields = {name: self._strings(data, start, stop) for name, data in texts.items()}
                named = {name: self._strings(data, start, stop) for name, data in labels.items()}
                for at in range(stop - start):
                    record = {
                        "product_id": int(products.reshape(-1)[at]),
                        "text": join([fields[name][at] for name in self.text]),
                    }
                    record |= {name: label(values[at]) for name, values in named.items() if values[at]}
                    record |= {name: fields[name][at] for name in FACTS if name in fields and fields[name][at]}
                    image: np.ndarray | RowError = pixels[at]
                    if not pixels[at, ::16].any() and not pixels[at].any():
                        image = RowError("the image is black throughout")
                    yield Row(f"row {start + at}", f"{start + at:08d}", image, record)
                start = stop

    def _stat(self):
        try:
            return self.path.stat()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}). Give FashionGen's .h5 file.") from None

    def _open(self) -> h5py.File:
        self._stat()
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise UserError(
                f"{self.path} is not a complete HDF5 file ({one_line(error)}). Copy FashionGen's .h5 again."
            ) from None

    def _check(self, file: h5py.File) -> int:
        """Check every dataset that is read, and return the number of rows. errors: UserError."""
        wanted = [IMAGES, PRODUCTS, *(f"input_{name}" for name in self.text)]
        optional = [
            key for key in (*LABELS.values(), *(f"input_{name}" for name in FACTS)) if key in file and key not in wanted
        ]
        for key in (*wanted, *optional):
            self._check_storage(file, key)
        images, products = file[IMAGES], file[PRODUCTS]
        of_bytes = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
        if not of_bytes or not 0 < math.prod(images.shape[1:3]) <= MAX_PIXELS:
            self._fail(IMAGES, f"is {images.dtype} of {_size(images.shape)}", "uint8 of rows x height x width x 3")
        if products.dtype.kind not in "iu":
            self._fail(PRODUCTS, f"is {products.dtype}", "a column of integers")
        for key in (PRODUCTS, *wanted[2:], *optional):
            data = file[key]
            if data.shape not in ((len(images),), (len(images), 1)):
                self._fail(key, f"has the shape {_size(data.shape)}", f"{len(images)} x 1, one value for each image")
            if key == PRODUCTS:
                continue
            if data.dtype.kind != "S" and h5py.check_string_dtype(data.dtype) is None:
                self._fail(key, f"is {data.dtype}", "a column of texts")
            if data.dtype.itemsize > MAX_FIELD:
                self._fail(key, f"has {data.dtype.itemsize:,} bytes for each text", f"at most {MAX_FIELD:,}")
        return len(images)

    def _check_storage(self, file: h5py.File, key: str) -> None:
        """Refuse a dataset that is missing, in another file (which its author would choose), or too large."""
        link = file.get(key, getlink=True)
        if link is None:
            there = ", ".join(list(file)[:20]) or "nothing"
            problem = f"{self.path} has no dataset {key}, only {there}"
            raise UserError(f"{problem}. Give FashionGen's .h5, or name the fields of the text by --text.")
        data = None if isinstance(link, h5py.ExternalLink) else file.get(key)
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external:
            self._fail(key, "is a link, a group or data of another file", "a dataset in this file")
        stored = math.prod(data.chunks) * data.dtype.itemsize if data.chunks else 0
        if stored > 2**30:
            self._fail(key, f"is stored in pieces of {stored:,} bytes", "at most 1 GB each")

    def _fail(self, key: str, found: str, expected: str) -> NoReturn:
        raise UserError(f"{self.path}: {key} {found}. Give a file with {expected}.")

    def _block(self, data: h5py.Dataset, start: int, stop: int) -> np.ndarray:
        try:
            return data[start:stop]
        except OSError as error:
            rows = f"rows {start} to {stop - 1} of {data.name[1:]}"
            raise UserError(f"{self.path}: {rows} cannot be read ({one_line(error)}). Copy the file again.") from None

    def _strings(self, data: h5py.Dataset, start: int, stop: int) -> list[str]:
        values = self._block(data, start, stop).reshape(-1)
        if data.dtype.kind == "S":  # numpy drops zero bytes at the end
            return [decode_field(bytes(value), data.dtype.itemsize) for value in values]
        return [clean(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)) for value in values]


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single value"
