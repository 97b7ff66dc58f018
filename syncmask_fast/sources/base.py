"""What every source gives: rows, each with an image and its record, or with the reason why it cannot be used."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from syncmask_fast.data.images import check_image, decode_image
from syncmask_fast.utils.errors import UserError

MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT = 100_000  # characters
_ORIENTATION = 0x0112  # EXIF


class RowError(Exception):
    """Why one row is dropped: a reason that many rows may share, and a detail of this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ShardSpec:
    """The rows that go into one shard: `start` to `stop` of the source's file number `file`."""

    folder: str  # subfolder of the output: "", "train" or "eval"
    file: int
    start: int
    stop: int
    offset: int = 0  # in files of lines: the byte and the line at which the first row begins
    line: int = 1

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Row:
    """One row of a source, or one more image of it.

    name:      for the report, such as "row 17".
    key:       of the sample: unique, and the same in every run.
    image:     an encoded image, a file, or pixels uint8 [H, W, 3]; or why there is none.
    continues: this is a further image of the row before it, and no new row.
    """

    name: str
    key: str
    image: bytes | Path | np.ndarray | RowError
    record: dict[str, Any]
    continues: bool = False


class Source:
    """A source of rows. It is sent to worker processes, so it holds settings and names, but no open file."""

    def describe(self) -> dict[str, Any]:
        """Return what the shards depend on, as JSON. "source" is its name for the user."""
        raise NotImplementedError

    def shards(self, rows: int) -> list[ShardSpec]:
        """Check the source and divide it into shards of at most `rows` rows. errors: UserError."""
        raise NotImplementedError

    def read(self, shard: ShardSpec) -> Iterator[Row]:
        """Yield the rows of a shard in order. errors: UserError if more than a single row is broken."""
        raise NotImplementedError

    def report_fields(self) -> dict[str, Any]:
        """Return what this source adds to the report."""
        return {}

    def extra_files(self, out: Path) -> dict[str, Any]:
        """Return further files for OUT, which has its shards: path within OUT to content as JSON."""
        return {}


@dataclass(frozen=True)
class Encoding:
    """How images are stored. errors: UserError for a bad number.

    quality:     of JPEGs, 1 to 100.
    size:        shorter side in pixels that larger images are reduced to; None: no limit.
    subsampling: of the colors of JPEGs. Drawn images keep full resolution by "4:4:4".
    """

    quality: int = 90
    size: int | None = None
    subsampling: str = "4:2:0"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality} is out of range. Give a number from 1 to 100.")
        if self.size is not None and not 16 <= self.size <= 8000:
            raise UserError(f"--size {self.size} is out of range. Give 16 to 8000 pixels.")

    def encode(self, image: bytes | Path | np.ndarray) -> bytes:
        """Return the bytes that are stored for an image. errors: RowError.

        Pixels become a JPEG. A JPEG, PNG or WebP is decoded once as a check and stored unchanged. It becomes a JPEG
        if it must be reduced, or turned because of its EXIF orientation.
        """
        if isinstance(image, np.ndarray):
            return self._jpeg(Image.fromarray(image))
        data = read_file(image) if isinstance(image, Path) else image
        if len(data) > MAX_IMAGE_BYTES:
            raise RowError(f"the image has more than {MAX_IMAGE_BYTES >> 20} MB", f"{len(data):,} bytes")
        try:
            width, height = check_image(data)
            pixels = decode_image(data)
        except ValueError as error:
            raise RowError("the image cannot be used", str(error)) from None
        orientation = exif_orientation(data)
        reduce = self.size is not None and min(width, height) > self.size
        if orientation == 1 and not reduce:
            return data
        upright = Image.fromarray(pixels)
        upright.getexif()[_ORIENTATION] = orientation
        upright = ImageOps.exif_transpose(upright)
        if reduce:
            scale = self.size / min(upright.size)
            upright = upright.resize([round(side * scale) for side in upright.size], Image.Resampling.LANCZOS)
        return self._jpeg(upright)

    def _jpeg(self, image: Image.Image) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.quality, subsampling=self.subsampling, exif=b"")
        return out.getvalue()


def exif_orientation(data: bytes) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) without a valid one."""
    try:
        found = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF makes Pillow raise many kinds
        return 1
    return found if found in range(1, 9) else 1


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file. errors: RowError."""
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise RowError("the image is not a file", str(path))
        if stat.st_size > MAX_IMAGE_BYTES:
            raise RowError(f"the image has more than {MAX_IMAGE_BYTES >> 20} MB", str(path))
        return path.read_bytes()
    except FileNotFoundError:
        raise RowError("the image is missing", str(path)) from None
    except OSError as error:
        raise RowError("the image cannot be read", f"{path}: {error.strerror or error}") from None


def validate_text(text: str) -> str:
    """Return the text if a model can be trained on it. errors: RowError."""
    if not text:
        raise RowError("the text is empty")
    if len(text) > MAX_TEXT:
        raise RowError(f"the text has more than {MAX_TEXT:,} characters", f"{len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("the text is not valid Unicode") from None
    return text


def round_up_fraction(part: int, whole: int) -> str:
    """Return part / whole, rounded up to three digits, as a flag takes it."""
    return f"{math.ceil(1000 * part / whole) / 1000:g}"


def chunk(count: int, rows: int, folder: str = "", file: int = 0) -> list[ShardSpec]:
    """Divide the rows 0 .. count - 1 into shards of at most `rows`."""
    return [ShardSpec(folder, file, start, min(start + rows, count)) for start in range(0, count, rows)]
