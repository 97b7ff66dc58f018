"""Writing shards: image-text samples as WebDataset tars, complete or absent."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from syncmask_fast.data.images import image_format
from syncmask_fast.utils.errors import UserError
from syncmask_fast.utils.files import partial_path


class ShardWriter:
    """Write one shard. It gets its name when it is complete and on disk; without samples there is no file.

    A context manager: an exception removes the partial file. The same samples give the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._partial = partial_path(path)
        self._file = open(self._partial, "wb")

    def write(self, key: str, image: bytes, record: dict[str, Any]) -> None:
        """Add one sample; see `ShardSetWriter.write`. The caller must not repeat a key."""
        if not key or key != key.strip("/ ") or "." in key or "\0" in key:
            raise ValueError(f"a key must be non-empty without dots or outer slashes, not {key!r}")
        extension = image_format(image)
        if extension is None:
            raise ValueError(f"the image of key {key!r} is neither JPEG, PNG nor WebP")
        text = _JSON.encode(record)
        self._add(f"{key}.{extension}", image)
        self._add(f"{key}.json", text.encode())
        self.count += 1

    def finish(self) -> None:
        """End the archive, sync it to disk and rename it."""
        if self.count == 0:
            self.discard()
            return
        try:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))  # a tar's end mark
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove the partial file."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def _add(self, name: str, data: bytes) -> None:
        self._file.write(_header(name, len(data)))
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))


class ShardSetWriter:
    """Write samples into `folder/PREFIX00000.tar`, `PREFIX00001.tar`, ..., each by a `ShardWriter`.

    A context manager: an exception removes the unfinished shard; earlier shards stay.
    errors: UserError if the folder already holds shards of this prefix, or cannot be created.
    """

    def __init__(self, folder: Path | str, samples_per_shard: int = 2000, prefix: str = "") -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.prefix = prefix
        self.count = 0
        self._keys: set[str] = set()
        self._shard: ShardWriter | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be created ({error.strerror}). Choose another output folder."
            ) from None
        old = sorted(self.folder.glob(f"{prefix}[0-9][0-9][0-9][0-9][0-9].tar"))
        if old:
            raise UserError(f"{old[0]} already exists. Delete it or choose another output folder.")

    def write(self, key: str, image: bytes, record: dict[str, Any]) -> None:
        """Add one sample.

        key:    names the two members; no dot, no space at its ends, never twice in one writer.
        image:  an encoded JPEG, PNG or WebP; its format gives the member's extension.
        record: the content of KEY.json; numpy numbers are accepted, NaN is not.
        errors: ValueError for a bad or repeated key, an unknown image format, or NaN.
        """
        if key in self._keys:
            raise ValueError(f"key {key!r} was written before")
        if self._shard is None:
            self._shard = ShardWriter(self.folder / f"{self.prefix}{self.count // self.samples_per_shard:05d}.tar")
        self._shard.write(key, image, record)
        self._keys.add(key)
        self.count += 1
        if self.count % self.samples_per_shard == 0:
            self.close()

    def close(self) -> None:
        """Finish the current shard, if there is one."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.finish()

    def __enter__(self) -> ShardSetWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.discard()


def _header(name: str, size: int) -> bytes:
    """Return the header that `tarfile` writes. A short name is filled into a template, in a tenth of tarfile's time."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.GNU_FORMAT)
    header = bytearray(_TEMPLATE)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum counts itself as blanks
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.GNU_FORMAT)


def _from_numpy(value: object) -> int | float | list:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be stored in JSON")


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_from_numpy)
