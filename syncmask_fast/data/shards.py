"""Shards: image-text samples in WebDataset tars, written atomically and read at random.

A dataset is a folder of `*.tar`. One sample is the members of one key: `KEY.jpg` (or .jpeg, .png, .webp) and
`KEY.json` or `KEY.txt`, as in anyone's image-text WebDataset. The JSON holds

    text        string; without it the text is that of KEY.txt, and without that the JSON's `caption`
    product_id  integer or string, or none: then the sample is a product of its own
    category, subcategory, view     strings, where known
    attributes  where known: [{"span": [start, end] in characters of the text,
                               "box": [x0, y0, x1, y1] in pixels of the stored image, or null: not visible}]

and anything else, which `ShardIndex.record` gives back.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from syncmask_fast.data.images import image_format
from syncmask_fast.data.shard_index import IndexArrays, Labels, load_or_build
from syncmask_fast.data.strings import UniqueStrings
from syncmask_fast.utils.errors import UserError

__all__ = ["Labels", "ShardFile", "ShardIndex", "ShardWriter"]

MAX_OPEN_SHARDS = 256


class ShardFile:
    """Writes one shard: as `.NAME.PID.partial` beside its place, flushed to disk and renamed when it is whole.

    A context manager: an exception removes what was written. The same samples give the same bytes; without any sample there is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._file = open(self._partial, "wb")

    def write(self, key: str, image: bytes, record: dict[str, Any]) -> None:
        """Adds one sample; see `ShardWriter.write`. Keys that repeat are the caller's to avoid."""
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
        """Puts the shard in its place."""
        if self.count == 0:
            self.abandon()
            return
        try:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))  # the mark at the end of an archive
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self.path)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Removes what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def _add(self, name: str, data: bytes) -> None:
        self._file.write(_header(name, len(data)))
        self._file.write(data)
        self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))


class ShardWriter:
    """Writes samples into `folder/PREFIX00000.tar`, `PREFIX00001.tar`, ...: each appears whole or not at all.

    If the `with` block ends by an exception the shard in work is removed; earlier shards stay. The same
    samples give the same bytes.

    errors: UserError if the folder already holds shards of this prefix (old and new samples would mix) or
            cannot be written.
    """

    def __init__(self, folder: Path | str, samples_per_shard: int = 2000, prefix: str = "") -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, not {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.prefix = prefix
        self.count = 0
        self._keys: set[str] = set()
        self._shard: ShardFile | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be made ({error.strerror}); choose another output folder") from None
        old = sorted(self.folder.glob(f"{prefix}[0-9][0-9][0-9][0-9][0-9].tar"))
        if old:
            raise UserError(f"{old[0]} already exists; delete it or choose another output folder")

    def write(self, key: str, jpeg: bytes, record: dict[str, Any]) -> None:
        """Adds one sample.

        key:    names the two members; no dot, no space at its ends, never the same twice in one writer.
        jpeg:   an encoded JPEG (or PNG or WebP, which then get their own extension).
        record: what goes into KEY.json; numpy numbers are accepted, NaN is not.
        errors: ValueError for a bad key, a repeated key, bytes of no known image format.
        """
        if key in self._keys:
            raise ValueError(f"key {key!r} was written before")
        if self._shard is None:
            self._shard = ShardFile(self.folder / f"{self.prefix}{self.count // self.samples_per_shard:05d}.tar")
        self._shard.write(key, jpeg, record)
        self._keys.add(key)
        self.count += 1
        if self.count % self.samples_per_shard == 0:
            self.close()

    def close(self) -> None:
        """Finishes the shard in work, if there is one."""
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.abandon()


class ShardIndex:
    """Random access to the samples 0 .. len-1 of all shards of one folder, by shard name, then by place in
    the shard.

    product_ids:   int64 [N]; the ids of the records where all are integers, otherwise numbered by first
                   appearance. A sample without an id is a product of its own.
    texts:         UniqueStrings, a read-only sequence of N str; `texts.unique` holds each different text once.
    category, subcategory, view: Labels(codes int32 [N], names); code -1 where the record has none; names are
                                 sorted.
    warnings:      one line for each shard or sample that was left out.

    Methods may be called from several threads at once.
    """

    def __init__(self, folder: Path, arrays: IndexArrays) -> None:
        self.folder = folder
        self.shards = [folder / name for name in arrays.shard_names]
        self.warnings = arrays.warnings
        self.product_ids = arrays.product_ids
        self.texts: UniqueStrings = arrays.texts
        self.category, self.subcategory, self.view = (
            arrays.labels[name] for name in ("category", "subcategory", "view")
        )
        self._arrays = arrays
        self._files: dict[int, _OpenFile] = {}
        self._opening = threading.Lock()

    @classmethod
    def open(cls, folder: Path | str, max_bad: float = 0.01) -> ShardIndex:
        """Opens a folder of shards, reading each shard's headers and records once and keeping the result in a
        cache file.

        The cache lies beside the shards (`.syncmask-index.npz`), or in the user's cache folder where that
        cannot be written. It is rebuilt when a shard's name, size or time of change differs. Several
        processes may open the same folder at once.

        errors: UserError if there is no folder, no shard, no usable sample, or more than the share `max_bad`
                of bad samples.
        """
        folder = Path(folder)
        return cls(folder, load_or_build(folder, max_bad))

    def __len__(self) -> int:
        return len(self.product_ids)

    def __repr__(self) -> str:
        return f"ShardIndex({str(self.folder)!r}, samples={len(self)}, shards={len(self.shards)})"

    def fingerprint(self) -> str:
        """A mark of keys, texts, products and sizes of images: the same wherever the shards lie, another when they are made anew otherwise."""
        arrays = self._arrays
        digest = hashlib.sha256()
        texts = arrays.texts.unique
        for part in (
            arrays.keys.data,
            arrays.keys.offsets,
            texts.data,
            texts.offsets,
            arrays.texts.index,
            arrays.product_ids,
            arrays.image_bytes,
        ):
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i, as stored."""
        arrays = self._arrays
        return self._read(int(arrays.shard[i]), int(arrays.image_offset[i]), int(arrays.image_bytes[i]))

    def record(self, i: int) -> dict[str, Any]:
        """The JSON record of sample i as stored; `text` is there too where it came from a .txt member."""
        arrays = self._arrays
        size = int(arrays.json_bytes[i])
        try:
            record = json.loads(self._read(int(arrays.shard[i]), int(arrays.json_offset[i]), size)) if size else {}
            return record | {"text": self.texts[i]}
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.shard_path(i)}: the record of {self.key(i)!a} is no longer what was indexed ({error}): delete the cached index and start again"
            ) from None

    def key(self, i: int) -> str:
        """The key of sample i: its members' name without extension."""
        return self._arrays.keys[i]

    def shard_path(self, i: int) -> Path:
        """The shard that holds sample i."""
        return self.shards[int(self._arrays.shard[i])]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """errors: UserError where the shard is no longer what was indexed; OSError where the disk fails twice."""
        # pread, not mmap: it lets other threads run while the disk is slow, and where a file shrinks it
        # gives less instead of ending the process by SIGBUS.
        for last in (False, True):
            file = self._files.get(shard) or self._open_shard(shard)
            try:
                data = os.pread(file.descriptor, size, offset)
                now = os.fstat(file.descriptor)
            except OSError:  # a network file system may have given the file a new handle
                if last:
                    raise
                self._files.pop(shard, None)
            else:
                break
        if len(data) != size or [now.st_size, now.st_mtime_ns] != self._arrays.shard_states[shard]:
            raise UserError(
                f"{self.shards[shard]} was changed while the run read it: let nothing write there, and start again"
            )
        return data

    def _open_shard(self, shard: int) -> _OpenFile:
        with self._opening:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.pop(next(iter(self._files)))  # closed when its last reader lets go
            try:
                file = self._files[shard] = _OpenFile(self.shards[shard])
            except OSError as error:
                raise UserError(
                    f"{self.shards[shard]} cannot be opened any more ({error.strerror}): put it back and start again"
                ) from None
            return file


class _OpenFile:
    """A file open for `os.pread`, closed when nobody holds it: no thread closes what another one reads."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _header(name: str, size: int) -> bytes:
    """What `tarfile` writes before a member, for a short name by filling in a form, which takes a tenth of its time."""
    short = name.encode()
    if len(short) > 100 or size >= 8**11:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.GNU_FORMAT)
    header = bytearray(_FORM)
    header[: len(short)] = short
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8  # the checksum counts itself as blanks
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


_FORM = tarfile.TarInfo("").tobuf(tarfile.GNU_FORMAT)


def _plain_number(value: object) -> int | float | list:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be stored in JSON")


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain_number)
