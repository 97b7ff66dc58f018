"""Any table as a source: CSV, JSONL or Parquet, with a column of images, one of texts and perhaps one of product ids.

Images are paths, bytes, or Hugging Face's struct of `bytes` and `path`. A folder of Parquet files is one table. Paths
are relative to the table's folder (or --images) and may not lead out of it.
"""

from __future__ import annotations

import base64
import binascii
import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from syncmask_fast.sources.base import MAX_IMAGE_BYTES, Row, RowError, ShardSpec, Source, chunk
from syncmask_fast.sources.text_cleaning import clean
from syncmask_fast.utils.errors import UserError, one_line

KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
IMAGE_NAMES = ("image", "img", "jpg", "picture", "photo", "image_path", "path", "file_name", "filename", "filepath")
TEXT_NAMES = ("text", "caption", "description", "title", "txt")
GIVE = "Give a .csv, .tsv, .jsonl or .parquet file, or a folder of .parquet files."
LABELS = ("category", "subcategory", "view")
ONE_OBJECT = 'Write one object a line: {"image": ..., "text": ...}.'
MAX_LINE = 2 * MAX_IMAGE_BYTES
MAX_UNPACKED, MAX_RATIO = 2**30, 200  # a column of a row group beyond both was made to fill the memory
PARQUET_ROWS = 16  # read at once: images in bytes may be large
_ID = 2**63


@dataclass(frozen=True)
class TableSource(Source):
    """A table.

    image, text: names of columns; None: the first of the usual names that exists.
    product:     column of product ids; None: `product_id` if it exists, else each row is its own product.
    images:      folder that paths start from; None: the table's.
    """

    path: Path
    image: str | None = None
    text: str | None = None
    product: str | None = None
    images: Path | None = None

    def describe(self) -> dict[str, Any]:
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in self._files}
        columns = {"image": self.image, "text": self.text, "product": self.product}
        folders = {"source": str(self.path.resolve()), "images": str(self._root)}
        return {"kind": "table", **folders, "files": stats, "columns": columns}

    def shards(self, rows: int) -> list[ShardSpec]:
        found: list[ShardSpec] = []
        for number, path in enumerate(self._files):
            self._columns(path, self._names(path))
            if self._kind == "parquet":
                found += chunk(_parquet(path).metadata.num_rows, rows, file=number)
            else:
                found += self._chunk_lines(path, rows, number)
        return found

    def read(self, shard: ShardSpec) -> Iterator[Row]:
        path = self._files[shard.file]
        image, text, product = self._columns(path, self._names(path))
        prefix = f"{shard.file:05d}-" if len(self._files) > 1 else ""
        for number, values in enumerate(self._values(path, shard), shard.start):
            name = f"row {number}" + (f" of {path.name}" if prefix else "")
            record: dict[str, Any] = {}
            if product is not None and values.get(product) not in (None, ""):
                record["product_id"] = self._product(values[product], product, path, number)
            content = values.get(text)
            if content is not None and not isinstance(content, str):
                if not isinstance(content, list) or not all(isinstance(part, str) for part in content):
                    raise UserError(f"{path}: row {number}: {text} is {content!r:.60}. It should be a text.")
                content = " ".join(content)
            record["text"] = clean(content or "")
            named = {
                key: clean(values[key])
                for key in LABELS
                if key not in (image, text) and isinstance(values.get(key), str)
            }
            record |= {key: value for key, value in named.items() if value}
            yield Row(name, f"{prefix}{number:08d}", self._image(values.get(image), path, number), record)

    # The file

    @cached_property
    def _files(self) -> list[Path]:
        if self.path.is_dir():
            files = sorted(self.path.glob("*.parquet"))
            if not files:
                raise UserError(f"{self.path} has no .parquet files. {GIVE}")
            return files
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist. {GIVE}")
        if self.path.suffix.lower() not in KINDS:
            raise UserError(f"{self.path} is of no known kind. {GIVE}")
        return [self.path]

    @property
    def _kind(self) -> str:
        return KINDS[self._files[0].suffix.lower()]

    @cached_property
    def _root(self) -> Path:
        root = self.images or (self.path if self.path.is_dir() else self.path.parent)
        if not root.is_dir():
            raise UserError(f"{root} is not a folder. Give the folder that the table's paths start from by --images.")
        return root.resolve()

    def _names(self, path: Path) -> list[str]:
        if self._kind == "parquet":
            return _parquet(path).schema_arrow.names
        if self._kind == "csv":
            with open(path, "rb") as file:
                header = next(self._csv_rows(path, file), None)
            if header is None:
                raise UserError(f"{path} is empty. The first line should hold the names of the columns.")
            return header
        with open(path, "rb") as file:
            first = next(self._objects(path, file), {})
        return list(first)

    def _columns(self, path: Path, names: list[str]) -> tuple[str, str, str | None]:
        found = []
        for flag, chosen, usual in (("--image", self.image, IMAGE_NAMES), ("--text", self.text, TEXT_NAMES)):
            lower = {name.lower(): name for name in reversed(names)}
            name = chosen
            if name is None:
                name = next((lower[usual_name] for usual_name in usual if usual_name in lower), None)
            if name not in names and (name is None or names):
                wanted = repr(name) if name is not None else f"of a usual name ({', '.join(usual[:3])} ...)"
                raise UserError(
                    f"{path} has no column {wanted}. Name one by {flag}: {', '.join(names)[:300] or 'there is none'}."
                )
            found.append(name)
        if self._kind == "jsonl":  # any object may lack it
            return found[0], found[1], self.product or "product_id"
        product = self.product if self.product is not None else ("product_id" if "product_id" in names else None)
        if product is not None and product not in names:
            raise UserError(f"{path} has no column {product!r}. Name one by --product: {', '.join(names)[:300]}.")
        return found[0], found[1], product

    def _chunk_lines(self, path: Path, rows: int, number: int) -> list[ShardSpec]:
        """Divide a file of lines into shards that know where they begin. Reads the file once."""
        starts, count = [], 0
        with open(path, "rb") as file:
            lines = _Lines(path, file)
            found: Iterator[object] = self._csv_reader(lines) if self._kind == "csv" else lines
            if self._kind == "csv":
                self._next_row(path, found, lines)
            while True:
                place = lines.offset, lines.number + 1
                if self._next_row(path, found, lines) is None:
                    break
                if count % rows == 0:
                    starts.append(place)
                count += 1
        return [ShardSpec("", number, i * rows, min((i + 1) * rows, count), *start) for i, start in enumerate(starts)]

    def _values(self, path: Path, shard: ShardSpec) -> Iterator[dict[str, Any]]:
        """Yield the rows of a shard as column -> value."""
        if self._kind == "parquet":
            wanted = {*self._columns(path, self._names(path)), *LABELS}
            yield from _parquet_rows(path, shard, [name for name in self._names(path) if name in wanted])
            return
        with open(path, "rb") as file:
            file.seek(shard.offset)
            if self._kind == "jsonl":
                yield from itertools.islice(self._objects(path, file, shard.line), len(shard))
                return
            names = self._names(path)
            for number, row in enumerate(
                itertools.islice(self._csv_rows(path, file, shard.line), len(shard)), shard.start
            ):
                if len(row) != len(names):
                    raise UserError(
                        f"{path}: row {number} has {len(row)} columns. It should have {len(names)}, as the first line."
                    )
                yield dict(zip(names, row, strict=True))

    # CSV and JSONL

    def _csv_reader(self, lines: _Lines) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_LINE)
        return csv.reader(lines, delimiter="\t" if self.path.suffix.lower() == ".tsv" else ",", strict=True)

    def _next_row(self, path: Path, rows: Iterator[Any], lines: _Lines) -> Any:
        """The next row, of a CSV reader or of lines, that is not an empty line; None at the end."""
        try:
            return next((row for row in rows if (row.strip() if isinstance(row, str) else row)), None)
        except csv.Error as error:
            problem = f"{path}: line {lines.number} is not valid CSV ({error})"
            raise UserError(f'{problem}. Separate columns by commas and quote them by ".') from None

    def _csv_rows(self, path: Path, file: BinaryIO, first: int = 1) -> Iterator[list[str]]:
        lines = _Lines(path, file, first)
        reader = self._csv_reader(lines)
        while (row := self._next_row(path, reader, lines)) is not None:
            yield row

    def _objects(self, path: Path, file: BinaryIO, first: int = 1) -> Iterator[dict[str, Any]]:
        lines = _Lines(path, file, first)
        for line in lines:
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                known = isinstance(error, json.JSONDecodeError)
                reason = f"{error.msg} at column {error.colno}" if known else "nested too deeply"
                raise UserError(f"{path}: line {lines.number} is not valid JSON ({reason}). {ONE_OBJECT}") from None
            if not isinstance(found, dict):
                raise UserError(f"{path}: line {lines.number} is not an object. {ONE_OBJECT}")
            yield found

    # Values

    def _image(self, value: Any, path: Path, number: int) -> bytes | Path | RowError:
        if isinstance(value, dict):  # Hugging Face: bytes, or else a path
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
            if isinstance(value, str) and self._kind == "jsonl" and _is_base64(value):
                return base64.b64decode(value)
        if value is None or value == "" or value == b"":
            return RowError("there is no image")
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if not isinstance(value, str):
            raise UserError(f"{path}: row {number}: the image is {value!r:.60}. It should be a path or bytes.")
        if "\0" in value or len(value) > 4096:
            return RowError("the image's path is not a path", repr(value[:60]))
        target = (self._root / value).resolve()
        if not target.is_relative_to(self._root):
            problem = f"{path}: row {number}: the image {value!r:.200} is outside {self._root}"
            raise UserError(f"{problem}. Give the folder that holds all images by --images.")
        return target

    def _product(self, value: Any, column: str, path: Path, number: int) -> int | str:
        if isinstance(value, float) and value.is_integer():  # pandas writes integers with gaps as floats
            value = int(value)
        if isinstance(value, str) and value.isascii() and value.isdigit() and str(int(value[:20])) == value:
            value = int(value)
        if isinstance(value, bool) or not (isinstance(value, str) or (isinstance(value, int) and -_ID <= value < _ID)):
            problem = f"{path}: row {number}: {column} is {value!r:.60}"
            raise UserError(f"{problem}. It should be an integer below 2^63 or a text.")
        return value


class _Lines:
    """The lines of a file as text, with the number of the last one and the byte after it. errors: UserError."""

    def __init__(self, path: Path, file: BinaryIO, first: int = 1) -> None:
        self.path, self.file, self.number, self.offset = path, file, first - 1, file.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{self.path}: line {self.number} has more than {MAX_LINE >> 20} MB. Write one row a line.")
        at, self.offset = self.offset, self.offset + len(line)
        try:
            return line.decode("utf-8-sig" if at == 0 else "utf-8")
        except UnicodeDecodeError as error:
            problem = f"{self.path}: line {self.number} is not UTF-8 (byte {error.start})"
            raise UserError(f"{problem}. Save the table as UTF-8.") from None


def _is_base64(value: str) -> bool:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


# Parquet


def _parquet(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow. Run pip install 'syncmask_fast[parquet]'.") from None
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path} is not a complete Parquet file ({one_line(error)}). Write it again.") from None
    for group in range(file.metadata.num_row_groups):
        for number in range(file.metadata.num_columns):
            column = file.metadata.row_group(group).column(number)
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if unpacked > MAX_UNPACKED and unpacked > MAX_RATIO * packed:
                problem = f"{path}: column {column.path_in_schema} unpacks to {unpacked:,} bytes from {packed:,}"
                raise UserError(f"{problem}. Give a file with images and texts.")
    return file


def _parquet_rows(path: Path, shard: ShardSpec, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard from the row groups that hold them.

    A file with one large row group is read from its start for each shard.
    """
    import pyarrow

    file = _parquet(path)
    begin, groups, before = 0, [], 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if begin < shard.stop and begin + count > shard.start:
            groups.append(group)
            before = before if len(groups) > 1 else begin
        begin += count
    try:
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns, use_threads=False):
            low, high = max(shard.start - before, 0), min(shard.stop - before, len(batch))
            if low < high:
                yield from batch.slice(low, high - low).to_pylist()
            before += len(batch)
            if before >= shard.stop:
                return
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: rows from {before} cannot be read ({one_line(error)}). Write the file again."
        ) from None
