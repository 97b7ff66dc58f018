"""Shards: random access to image-text samples in WebDataset tars.

A dataset is a folder of `*.tar`. One sample is the members of one key: `KEY.jpg` (or .jpeg, .png, .webp) and
`KEY.json` or `KEY.txt`, as in any image-text WebDataset. The JSON holds

    text        string; without it the text of KEY.txt, and without that the JSON's `caption`
    product_id  integer or string; without it the sample is its own product
    category, subcategory, view     optional strings
    attributes  optional: [{"span": [start, end] in characters of the text,
                            "box": [x0, y0, x1, y1] in pixels of the stored image, or null: not visible}]

and anything else, which `ShardIndex.record` returns. `shard_writer.py` writes such shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from syncmask_fast.data.shard_index import IndexArrays, load_or_build
from syncmask_fast.data.strings import UniqueStrings
from syncmask_fast.utils.errors import UserError

MAX_OPEN_SHARDS = 256


class ShardIndex:
    """Random access to the samples 0 .. N - 1 of a folder's shards, by shard name, then by position in the shard.

    product_ids: int64 [N]; the records' ids if all are integers, otherwise numbered by first appearance.
    texts:       a read-only sequence of N str; `texts.unique` holds each different text once.
    category, subcategory, view: Labels(codes int32 [N], sorted names); code -1 where the record has none.
    warnings:    one line for each shard or sample that was left out.

    Threads may share an index.
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
        """Open a folder of shards. The first call reads all headers and records, and caches them.

        The cache is `.syncmask-index.npz` in the folder, or in the user's cache folder if that is read-only. It is
        rebuilt when a shard's name, size or modification time differs. Processes may open a folder at the same time.
        errors: UserError for no folder, no shard, no usable sample, or a larger fraction of bad samples than `max_bad`.
        """
        folder = Path(folder)
        return cls(folder, load_or_build(folder, max_bad))

    def __len__(self) -> int:
        return len(self.product_ids)

    def __repr__(self) -> str:
        return f"ShardIndex({str(self.folder)!r}, samples={len(self)}, shards={len(self.shards)})"

    def fingerprint(self) -> str:
        """Return the SHA-256 of keys, texts, products and image sizes. It does not depend on the shards' location."""
        arrays = self._arrays
        digest = hashlib.sha256()
        for strings in (arrays.keys, arrays.texts.unique):
            digest.update(np.ascontiguousarray(strings.data))
            digest.update(np.ascontiguousarray(strings.offsets))
        for column in (arrays.texts.index, arrays.product_ids, arrays.image_bytes):
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()

    def image_bytes(self, i: int) -> bytes:
        """Return the encoded image of sample i."""
        arrays = self._arrays
        return self._read(int(arrays.shard[i]), int(arrays.image_offset[i]), int(arrays.image_bytes[i]))

    def record(self, i: int) -> dict[str, Any]:
        """Return the JSON record of sample i, with `text` even where that came from a .txt member."""
        arrays = self._arrays
        size = int(arrays.json_bytes[i])
        try:
            record = json.loads(self._read(int(arrays.shard[i]), int(arrays.json_offset[i]), size)) if size else {}
            return record | {"text": self.texts[i]}
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.shard_path(i)}: the record of {self.key(i)!a} does not match the index ({error}). "
                "Delete the cached index and start again."
            ) from None

    def key(self, i: int) -> str:
        """Return the key of sample i: its members' name without extension."""
        return self._arrays.keys[i]

    def shard_path(self, i: int) -> Path:
        """Return the shard that holds sample i."""
        return self.shards[int(self._arrays.shard[i])]

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """errors: UserError if the shard has changed since it was indexed; OSError if the disk fails twice."""
        # pread, not mmap: other threads run during a slow read, and a file that shrinks
        # gives fewer bytes instead of ending the process by SIGBUS.
        for last in (False, True):
            file = self._files.get(shard) or self._open_shard(shard)
            try:
                data = os.pread(file.descriptor, size, offset)
                stat = os.fstat(file.descriptor)
            except OSError:  # a network file system may have given the file a new handle
                if last:
                    raise
                self._files.pop(shard, None)
            else:
                break
        if len(data) != size or [stat.st_size, stat.st_mtime_ns] != self._arrays.shard_states[shard]:
            raise UserError(
                f"{self.shards[shard]} was changed while the run read it. Stop what writes there and start again."
            )
        return data

    def _open_shard(self, shard: int) -> _OpenFile:
        with self._opening:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.pop(next(iter(self._files)))  # closed when its last reader drops it
            try:
                file = self._files[shard] = _OpenFile(self.shards[shard])
            except OSError as error:
                raise UserError(
                    f"{self.shards[shard]} can no longer be opened ({error.strerror}). Restore it and start again."
                ) from None
            return file


class _OpenFile:
    """A file open for `os.pread`. It is closed with its last reference, so no thread closes what another one reads."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
