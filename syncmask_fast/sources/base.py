"""What every source gives: rows, each a picture with its record, or the reason why it cannot be used."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from syncmask_fast.data.images import check_image, decode_image
from syncmask_fast.utils.errors import UserError

MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT = 100_000  # characters
_ORIENTATION = 0x0112  # EXIF


class RowError(Exception):
    """Why one row is left out: a reason that many rows may share, and what is particular to this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Unit:
    """The rows that go into one shard: `start` to `stop` of the source's file number `file`."""

    folder: str  # of the output that the shard goes to: "", "train" or "eval"
    file: int
    start: int
    stop: int
    offset: int = 0  # in files of lines: the byte and the line at which the first row begins
    line: int = 1

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Row:
    """One row of a source.

    name:  what the report calls it, such as "row 17".
    key:   of the sample, the same in every run and no other row's.
    image: an encoded picture, a file, or pixels uint8 [H, W, 3]; or why there is none.
    """

    name: str
    key: str
    image: bytes | Path | np.ndarray | RowError
    record: dict[str, Any]


class Source(Protocol):
    """A source of rows. It is sent to worker processes, so that it holds settings and names, no open file."""

    def describe(self) -> dict[str, Any]:
        """What the shards depend on, as JSON: another description means other shards."""

    def units(self, rows: int) -> list[Unit]:
        """Checks the source and cuts it into units of at most `rows` rows. errors: UserError."""

    def read(self, unit: Unit) -> Iterator[Row]:
        """The rows of a unit, in order. errors: UserError where the source is broken beyond a single row."""

    def notes(self) -> dict[str, Any]:
        """What this source adds to the report."""

    def companions(self) -> dict[str, Any]:
        """Further files beside the shards: path within the output, content as JSON."""


@dataclass(frozen=True)
class Encoding:
    """How pictures are stored."""

    quality: int = 90
    size: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality must be between 1 and 100, not {self.quality}")
        if self.size is not None and not 16 <= self.size <= 8000:
            raise UserError(f"--size must be between 16 and 8000 pixels, not {self.size}")

    def stored(self, image: bytes | Path | np.ndarray) -> bytes:
        """The bytes that are stored for a picture.

        Pixels become a JPEG. A JPEG, PNG or WebP is decoded once, to see that it can be, and stored as it is, unless it is to be made smaller or its
        EXIF mark says that it lies on its side: then it becomes a JPEG too.
        errors: RowError.
        """
        if isinstance(image, np.ndarray):
            return self._jpeg(Image.fromarray(image))
        data = read_file(image) if isinstance(image, Path) else image
        if len(data) > MAX_IMAGE_BYTES:
            raise RowError(f"the picture has more than {MAX_IMAGE_BYTES >> 20} MB", f"{len(data):,} bytes")
        try:
            width, height = check_image(data)
            pixels = decode_image(data)
        except ValueError as error:
            raise RowError("the picture cannot be used", str(error)) from None
        orientation = exif_orientation(data)
        smaller = self.size is not None and min(width, height) > self.size
        if orientation == 1 and not smaller:
            return data
        picture = Image.fromarray(pixels)
        picture.getexif()[_ORIENTATION] = orientation
        picture = ImageOps.exif_transpose(picture)
        if smaller:
            scale = self.size / min(picture.size)
            picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
        return self._jpeg(picture)

    def _jpeg(self, picture: Image.Image) -> bytes:
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=self.quality, exif=b"")
        return out.getvalue()


def exif_orientation(data: bytes) -> int:
    """1 to 8 as EXIF has it; 1, upright, where there is no sound mark."""
    try:
        found = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF makes Pillow raise many kinds
        return 1
    return found if found in range(1, 9) else 1


def read_file(path: Path) -> bytes:
    """A picture's file. errors: RowError."""
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise RowError("the picture is no file", str(path))
        if stat.st_size > MAX_IMAGE_BYTES:
            raise RowError(f"the picture has more than {MAX_IMAGE_BYTES >> 20} MB", str(path))
        return path.read_bytes()
    except FileNotFoundError:
        raise RowError("the picture is missing", str(path)) from None
    except OSError as error:
        raise RowError("the picture cannot be read", f"{path}: {error.strerror or error}") from None


def validate_text(text: str) -> str:
    """The text, if it can be trained on. errors: RowError."""
    if not text:
        raise RowError("the text is empty")
    if len(text) > MAX_TEXT:
        raise RowError(f"the text has more than {MAX_TEXT:,} characters", f"{len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("the text is not valid Unicode") from None
    return text


def share(part: int, whole: int) -> str:
    """part / whole, rounded up, as a flag takes it."""
    return f"{math.ceil(1000 * part / whole) / 1000:g}"


def cut(count: int, rows: int, folder: str = "", file: int = 0) -> list[Unit]:
    """Units of at most `rows` rows over 0 .. count - 1."""
    return [Unit(folder, file, start, min(start + rows, count)) for start in range(0, count, rows)]
