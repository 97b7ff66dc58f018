"""Any table as a source: CSV, JSONL or Parquet, with pictures as paths or bytes, a column of texts and, where there is one, of product ids.

Hugging Face datasets store a picture as a struct of `bytes` and `path`; Parquet columns of bytes do as well. A folder of Parquet files is one
table. Paths are relative to the table's folder (or --images) and may not lead out of it.
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

from syncmask_fast.sources.base import MAX_IMAGE_BYTES, Row, RowError, Unit, cut
from syncmask_fast.sources.text_cleaning import clean
from syncmask_fast.utils.errors import UserError

KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
IMAGE_NAMES = ("image", "img", "jpg", "picture", "photo", "image_path", "path", "file_name", "filename", "filepath")
TEXT_NAMES = ("text", "caption", "description", "title", "txt")
LABELS = ("category", "subcategory", "view")
MAX_LINE = 2 * MAX_IMAGE_BYTES
MAX_UNPACKED, MAX_RATIO = 2**30, 200  # a column of a row group beyond both was made to fill the memory
PARQUET_ROWS = 16  # read at once: pictures in bytes may be large
_ID = 2**63


@dataclass(frozen=True)
class TableSource:
    """A table.

    image, text: names of columns; None takes the first of the usual names that is there.
    product:     name of the column of product ids; None takes `product_id` where it is there, else each row is its own product.
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
        return {
            "source": str(self.path.resolve()),
            "kind": "table",
            "files": stats,
            "columns": columns,
            "images": str(self._root),
        }

    def units(self, rows: int) -> list[Unit]:
        found: list[Unit] = []
        for number, path in enumerate(self._files):
            self._columns(path, self._names(path))
            if self._kind == "parquet":
                found += cut(_parquet(path).metadata.num_rows, rows, file=number)
            else:
                found += self._cut_lines(path, rows, number)
        return found

    def read(self, unit: Unit) -> Iterator[Row]:
        path = self._files[unit.file]
        image, text, product = self._columns(path, self._names(path))
        prefix = f"{unit.file:05d}-" if len(self._files) > 1 else ""
        for number, values in enumerate(self._values(path, unit), unit.start):
            name = f"row {number}" + (f" of {path.name}" if prefix else "")
            record: dict[str, Any] = {}
            if product is not None and values.get(product) not in (None, ""):
                record["product_id"] = self._product(values[product], product, path, number)
            content = values.get(text)
            if content is not None and not isinstance(content, str):
                content = (
                    " ".join(content)
                    if isinstance(content, list) and all(isinstance(c, str) for c in content)
                    else None
                )
                if content is None:
                    raise UserError(f"{path}: row {number}: {text} is {values[text]!r:.60}, where a text was expected")
            record["text"] = clean(content or "")
            named = {
                key: clean(values[key])
                for key in LABELS
                if key not in (image, text) and isinstance(values.get(key), str)
            }
            record |= {key: value for key, value in named.items() if value}
            yield Row(name, f"{prefix}{number:08d}", self._picture(values.get(image), path, number), record)

    def notes(self) -> dict[str, Any]:
        return {}

    def companions(self) -> dict[str, Any]:
        return {}

    # The file ---------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def _files(self) -> list[Path]:
        if self.path.is_dir():
            files = sorted(self.path.glob("*.parquet"))
            if not files:
                raise UserError(
                    f"{self.path} holds no .parquet files; give a .csv, .jsonl or .parquet file, or a folder of .parquet files"
                )
            return files
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist; give a .csv, .jsonl or .parquet file")
        if self.path.suffix.lower() not in KINDS:
            raise UserError(f"{self.path} is of no known kind; a .csv, .tsv, .jsonl or .parquet file was expected")
        return [self.path]

    @property
    def _kind(self) -> str:
        return KINDS[self._files[0].suffix.lower()]

    @cached_property
    def _root(self) -> Path:
        root = self.images or (self.path if self.path.is_dir() else self.path.parent)
        if not root.is_dir():
            raise UserError(f"{root} is not a folder; --images takes the folder that the table's paths start from")
        return root.resolve()

    def _names(self, path: Path) -> list[str]:
        if self._kind == "parquet":
            return _parquet(path).schema_arrow.names
        if self._kind == "csv":
            with open(path, "rb") as file:
                header = next(self._csv_rows(path, file), None)
            if header is None:
                raise UserError(f"{path} is empty, where a first line with the names of the columns was expected")
            return header
        with open(path, "rb") as file:
            first = next(self._objects(path, file), {})
        return list(first)

    def _columns(self, path: Path, names: list[str]) -> tuple[str, str, str | None]:
        found = []
        for flag, chosen, usual in (("--image", self.image, IMAGE_NAMES), ("--text", self.text, TEXT_NAMES)):
            lower = {name.lower(): name for name in reversed(names)}
            name = (
                chosen
                if chosen is not None
                else next((lower[usual_name] for usual_name in usual if usual_name in lower), None)
            )
            if name not in names and (name is None or names):
                asked = (
                    f"column {name!r}" if name is not None else f"column of a usual name ({', '.join(usual[:3])} ...)"
                )
                raise UserError(f"{path} has no {asked}; name one by {flag} of: {', '.join(names)[:300] or 'none'}")
            found.append(name)
        if self._kind == "jsonl":  # any object may lack it
            return found[0], found[1], self.product or "product_id"
        product = self.product if self.product is not None else ("product_id" if "product_id" in names else None)
        if product is not None and product not in names:
            raise UserError(f"{path} has no column {product!r}; name one by --product of: {', '.join(names)[:300]}")
        return found[0], found[1], product

    def _cut_lines(self, path: Path, rows: int, number: int) -> list[Unit]:
        """Units of a file of lines, each with the place at which it begins; reads the file once."""
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
        return [Unit("", number, i * rows, min((i + 1) * rows, count), *start) for i, start in enumerate(starts)]

    def _values(self, path: Path, unit: Unit) -> Iterator[dict[str, Any]]:
        """The rows of a unit as column -> value."""
        if self._kind == "parquet":
            wanted = {*self._columns(path, self._names(path)), *LABELS}
            yield from _parquet_rows(path, unit, [name for name in self._names(path) if name in wanted])
            return
        with open(path, "rb") as file:
            file.seek(unit.offset)
            if self._kind == "jsonl":
                yield from itertools.islice(self._objects(path, file, unit.line), len(unit))
                return
            names = self._names(path)
            for number, row in enumerate(
                itertools.islice(self._csv_rows(path, file, unit.line), len(unit)), unit.start
            ):
                if len(row) != len(names):
                    raise UserError(
                        f"{path}: row {number} has {len(row)} columns, where {len(names)} were expected, as in the first line"
                    )
                yield dict(zip(names, row, strict=True))

    # CSV and JSONL ----------------------------------------------------------------------------------------------------------------------

    def _csv_reader(self, lines: _Lines) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_LINE)
        return csv.reader(lines, delimiter="\t" if self.path.suffix.lower() == ".tsv" else ",", strict=True)

    def _next_row(self, path: Path, rows: Iterator[Any], lines: _Lines) -> Any:
        """The next row, of a CSV reader or of lines, that is not an empty line; None at the end."""
        try:
            return next((row for row in rows if (row.strip() if isinstance(row, str) else row)), None)
        except csv.Error as error:
            raise UserError(
                f'{path}: line {lines.number} is not valid CSV ({error}); columns between commas, quoted by ", were expected'
            ) from None

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
                reason = (
                    f"{error.msg} at column {error.colno}"
                    if isinstance(error, json.JSONDecodeError)
                    else "nested too deeply"
                )
                raise UserError(
                    f"{path}: line {lines.number} is not valid JSON ({reason}); one object on each line was expected"
                ) from None
            if not isinstance(found, dict):
                raise UserError(
                    f'{path}: line {lines.number} is not an object, where {{"image": ..., "text": ...}} was expected'
                )
            yield found

    # Values -----------------------------------------------------------------------------------------------------------------------------

    def _picture(self, value: Any, path: Path, number: int) -> bytes | Path | RowError:
        if isinstance(value, dict):  # Hugging Face: bytes, or else a path
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
            if isinstance(value, str) and self._kind == "jsonl" and _is_base64(value):
                return base64.b64decode(value)
        if value is None or value == "" or value == b"":
            return RowError("there is no picture")
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if not isinstance(value, str):
            raise UserError(f"{path}: row {number}: the picture is {value!r:.60}, where a path or bytes were expected")
        if "\0" in value or len(value) > 4096:
            return RowError("the picture's path is no path", repr(value[:60]))
        target = (self._root / value).resolve()
        if not target.is_relative_to(self._root):
            where = f"{path}: row {number}: the picture {value!r:.200} lies outside {self._root}"
            raise UserError(f"{where}; give the folder that holds all of them by --images")
        return target

    def _product(self, value: Any, column: str, path: Path, number: int) -> int | str:
        if isinstance(value, float) and value.is_integer():  # what pandas makes of integers beside gaps
            value = int(value)
        if isinstance(value, str) and value.isascii() and value.isdigit() and str(int(value[:20])) == value:
            value = int(value)
        if isinstance(value, bool) or not (isinstance(value, str) or (isinstance(value, int) and -_ID <= value < _ID)):
            raise UserError(
                f"{path}: row {number}: {column} is {value!r:.60}, where an integer below 2^63 or a text was expected"
            )
        return value


class _Lines:
    """The lines of a file as text, with the number of the last one and the byte after it. errors: UserError for what is no text."""

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
            raise UserError(
                f"{self.path}: line {self.number} has more than {MAX_LINE >> 20} MB, where one row was expected"
            )
        at, self.offset = self.offset, self.offset + len(line)
        try:
            return line.decode("utf-8-sig" if at == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: line {self.number} is not UTF-8 (byte {error.start}); save the table as UTF-8"
            ) from None


def _is_base64(value: str) -> bool:
    try:
        base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


# Parquet --------------------------------------------------------------------------------------------------------------------------------


def _parquet(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow to be read: pip install 'syncmask_fast[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path} is not a whole Parquet file ({_one_line(error)}); write it anew") from None
    for group in range(file.metadata.num_row_groups):
        for number in range(file.metadata.num_columns):
            column = file.metadata.row_group(group).column(number)
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
            if unpacked > MAX_UNPACKED and unpacked > MAX_RATIO * packed:
                raise UserError(
                    f"{path}: column {column.path_in_schema} unpacks to {unpacked:,} bytes from {packed:,}, as no pictures or texts do"
                )
    return file


def _parquet_rows(path: Path, unit: Unit, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a unit, from the row groups that hold them. (A file with one large row group is read up to the unit each time.)"""
    import pyarrow

    file = _parquet(path)
    begin, groups, before = 0, [], 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if begin < unit.stop and begin + count > unit.start:
            groups.append(group)
            before = before if len(groups) > 1 else begin
        begin += count
    try:
        for batch in file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns, use_threads=False):
            low, high = max(unit.start - before, 0), min(unit.stop - before, len(batch))
            if low < high:
                yield from batch.slice(low, high - low).to_pylist()
            before += len(batch)
            if before >= unit.stop:
                return
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path}: rows from {before} on cannot be read ({_one_line(error)}); the file is damaged: write it anew"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
