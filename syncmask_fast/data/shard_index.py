"""Builds the index of a folder of shards, and keeps it in one cache file (numpy arrays and JSON, never
pickle)."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from syncmask_fast.data.images import image_format
from syncmask_fast.data.strings import StringArray, UniqueStrings
from syncmask_fast.data.tar import BrokenTar, Buffer, tar_members
from syncmask_fast.utils.errors import UserError
from syncmask_fast.utils.files import atomic_file, cache_candidates

FORMAT = 2
CACHE_NAME = ".syncmask-index.npz"
LABELS = ("category", "subcategory", "view")
_KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "json": "json", "txt": "txt"}
_ARRAYS = ("shard", "image_offset", "image_bytes", "json_offset", "json_bytes", "product_ids")
_NUMBERS = frozenset((int, float))


class Labels(NamedTuple):
    """One label per sample: `names[codes[i]]`, or none where codes[i] is -1. codes int32 [N]; names
    sorted."""

    codes: np.ndarray
    names: list[str]


@dataclass(frozen=True)
class IndexArrays:
    """All that is known of N samples without opening a shard. Offsets and sizes are in bytes of the shard's
    file."""

    shard_names: list[str]
    shard_states: list[list[int]]  # size and time of change (ns) of each shard when it was indexed
    shard: np.ndarray  # int32 [N], place in shard_names
    image_offset: np.ndarray  # int64 [N]
    image_bytes: np.ndarray  # int64 [N]
    json_offset: np.ndarray  # int64 [N]
    json_bytes: np.ndarray  # int64 [N], 0 where the sample has no JSON member
    product_ids: np.ndarray  # int64 [N]
    keys: StringArray
    texts: UniqueStrings
    labels: dict[str, Labels]
    warnings: list[str]


class BadSample(Exception):
    """Why one sample cannot be used."""


def load_or_build(folder: Path, max_bad: float) -> IndexArrays:
    """The arrays of all shards in `folder`, from the cache if it fits the shards as they are. See
    `ShardIndex.open`."""
    shards = _find_shards(folder)
    state = _state(shards)
    caches = cache_candidates(folder, CACHE_NAME)
    for cache in caches:
        loaded = _load(cache, state)
        if loaded is not None:
            arrays, bad = loaded
            break
    else:
        arrays, bad = _build(shards, state)
        if _state(shards) == state:  # else a shard was rewritten meanwhile
            any(_save(cache, state, arrays, bad) for cache in caches)
    count = len(arrays.product_ids)
    if count == 0 or bad > max_bad * (count + bad):
        shown = "; ".join(arrays.warnings[:3]) + ("; ..." if len(arrays.warnings) > 3 else "")
        raise UserError(
            f"{folder} has {bad} bad samples beside {count} good ones, which is too many to train on; "
            "repair or repack the shards" + (f" ({shown})" if shown else "")
        )
    return arrays


def _find_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder that holds the .tar shards")
    shards = sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not shards:
        compressed = next(iter([*folder.glob("*.tar.*"), *folder.glob("*.tgz")]), None)
        inner = next(iter(sorted(folder.glob("*/*.tar"))), None)
        mend = "give the folder that holds them"
        if compressed is not None:
            mend = f"decompress {compressed.name} and its like first"
        elif inner is not None:
            mend = f"give one of its folders, such as {inner.parent}"
        raise UserError(f"{folder} holds no .tar shards; {mend}")
    return shards


def _state(shards: list[Path]) -> list[list]:
    """Name, size and time of change of each shard: what a cache must agree with."""
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in shards]


# Building


def _build(shards: list[Path], state: list[list]) -> tuple[IndexArrays, int]:
    columns: dict[str, list] = {name: [] for name in (*_ARRAYS, "keys", "texts", *LABELS)}
    problems: list[str] = []
    bad = 0
    for number, path in enumerate(shards):
        archive = _ShardBytes(path)
        samples, faults, lost = _group_members(archive)
        problems += [f"{path.name}: {fault}" for fault in faults]
        bad += lost
        for key, members in samples.items():
            try:
                row = _read_sample(archive, members)
            except BadSample as error:
                problems.append(f"{path.name}: member {key}: {error}")
                bad += 1
                continue
            columns["shard"].append(number)
            columns["keys"].append(key)
            for name, value in row.items():
                columns[name].append(value)
    product_ids = encode_product_ids(columns["product_ids"])
    arrays = IndexArrays(
        shard_names=[path.name for path in shards],
        shard_states=[known[1:] for known in state],
        shard=np.array(columns["shard"], np.int32),
        **{name: np.array(columns[name], np.int64) for name in _ARRAYS if name not in ("shard", "product_ids")},
        product_ids=product_ids,
        keys=StringArray.of(columns["keys"]),
        texts=UniqueStrings.of(columns["texts"]),
        labels={name: _number_labels(columns[name]) for name in LABELS},
        warnings=problems,
    )
    return arrays, bad


class _ShardBytes:
    """A shard's bytes by slices. Not a memory map: a file that shrinks meanwhile gives fewer bytes instead of ending the process by SIGBUS."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        return os.pread(self._file.fileno(), min(part.stop, self._size) - part.start, part.start)


Members = dict[str, tuple[int, int]]  # "image", "json", "txt" -> offset, bytes


def _group_members(archive: Buffer) -> tuple[dict[str, Members], list[str], int]:
    """Members by key in order of first appearance, faults found on the way, and how many samples they
    cost."""
    samples: dict[str, Members] = {}
    repeated: dict[str, None] = {}
    faults: list[str] = []
    lost = 0
    key = ""
    try:
        for name, offset, size in tar_members(archive):
            folder, slash, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            kind = _KINDS.get(extension.lower())
            if kind is None or not stem:
                continue
            key = (folder + slash + stem).removeprefix("./")
            members = samples.setdefault(key, {})
            if kind in members:
                repeated[key] = None
            else:
                members[kind] = offset, size
    except BrokenTar as error:
        faults.append(str(error))
        if error.costs_a_sample:
            lost += 1
            if "image" not in samples.get(key, {}) or len(samples[key]) < 2:
                samples.pop(key, None)  # the half sample before the cut is the one that is lost
    faults += [f"member {key}: appears twice; the first was kept" for key in repeated]
    return samples, faults, lost + len(repeated)


def _read_sample(archive: Buffer, members: Members) -> dict[str, Any]:
    """One row of the columns. errors: BadSample."""
    if "image" not in members:
        raise BadSample("has no image (.jpg, .jpeg, .png or .webp)")
    if "json" not in members and "txt" not in members:
        raise BadSample("has no .json or .txt")
    image_offset, image_bytes = members["image"]
    if image_format(archive[image_offset : image_offset + 12]) is None:
        raise BadSample("the image is empty" if image_bytes == 0 else "the image is neither JPEG, PNG nor WebP")
    json_offset, json_bytes = members.get("json", (0, 0))
    record = {}
    if "json" in members:
        try:
            record = json.loads(archive[json_offset : json_offset + json_bytes])
        except (ValueError, RecursionError) as error:
            raise BadSample(f"the JSON cannot be read ({error})") from None
        if not isinstance(record, dict):
            raise BadSample("the JSON is not an object")
    if "text" not in record and "txt" in members:
        offset, size = members["txt"]
        try:
            record["text"] = archive[offset : offset + size].decode().strip()
        except UnicodeDecodeError:
            raise BadSample("the text is not UTF-8") from None
    elif "text" not in record and "caption" in record:
        record["text"] = record["caption"]
    check_record(record)
    return {
        "image_offset": image_offset,
        "image_bytes": image_bytes,
        "json_offset": json_offset,
        "json_bytes": json_bytes,
        "product_ids": record.get("product_id"),
        "texts": record["text"],
        **{name: record.get(name) for name in LABELS},
    }


def check_record(record: dict[str, Any]) -> None:
    """Raises BadSample where a record breaks the contract of `shards.py` in a way that would fail
    later."""
    text = record.get("text")
    if not isinstance(text, str):
        raise BadSample("has no text")
    if not text.strip():
        raise BadSample("the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("the text is not valid Unicode") from None
    product = record.get("product_id")
    if not (product is None or isinstance(product, str) or (_is_int(product) and -(2**63) <= product < 2**63)):
        raise BadSample("product_id is neither an integer nor a string")
    attributes = record.get("attributes")
    if attributes is not None and not (
        isinstance(attributes, list) and all(_good_attribute(item, len(text)) for item in attributes)
    ):
        raise BadSample(
            'attributes are not a list of {"span": [start, end] in the text, "box": [x0, y0, x1, y1] or null}'
        )


def _good_attribute(attribute: object, length: int) -> bool:
    try:
        (start, end), box = attribute["span"], attribute.get("box")
        if not (type(start) is int and type(end) is int and 0 <= start <= end <= length):
            return False
        return box is None or (
            type(box) is list and len(box) == 4 and _NUMBERS.issuperset(map(type, box)) and all(map(math.isfinite, box))
        )
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def encode_product_ids(ids: list[int | str | None]) -> np.ndarray:
    """int64 [N]: integers as they are if all present ids are integers, else numbers by first appearance; None
    is a new product."""
    present = [value for value in ids if value is not None]
    keep = all(map(_is_int, present)) and max(present, default=0) + len(ids) < 2**63
    free = max(present, default=-1) + 1 if keep else 0
    seen: dict[str, int] = {}
    numbers = np.empty(len(ids), np.int64)
    for i, value in enumerate(ids):
        if value is None:
            numbers[i] = free
            free += 1
        elif keep:
            numbers[i] = value
        else:  # "7" and 7 are taken for the same product
            name = str(value)
            if name not in seen:
                seen[name] = free
                free += 1
            numbers[i] = seen[name]
    return numbers


def _number_labels(values: Iterable[object]) -> Labels:
    values = [str(value) if isinstance(value, str) or _is_int(value) else None for value in values]
    names = sorted({value for value in values if value is not None})
    codes = {name: code for code, name in enumerate(names)}
    return Labels(np.array([codes.get(value, -1) for value in values], np.int32), names)


# Cache


def _load(cache: Path, state: list[list]) -> tuple[IndexArrays, int] | None:
    try:
        with open(cache, "rb") as stored, np.load(stored, allow_pickle=False) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.zip.infolist()):
                return None  # ours are not compressed, so that they never need more memory than they have bytes
            meta = json.loads(file["meta"].tobytes())
            if meta["format"] != FORMAT or meta["shards"] != state:
                return None
            arrays = IndexArrays(
                shard_names=[name for name, _, _ in state],
                shard_states=[known[1:] for known in state],
                **{name: file[name] for name in _ARRAYS},
                keys=StringArray(file["key_data"], file["key_offsets"]),
                texts=UniqueStrings(StringArray(file["text_data"], file["text_offsets"]), file["text_index"]),
                labels={name: Labels(file[name], meta["labels"][name]) for name in LABELS},
                warnings=[str(problem) for problem in meta["warnings"]],
            )
            _check(arrays)
            return arrays, int(meta["bad"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        MemoryError,
        RecursionError,
        NotImplementedError,
        zipfile.BadZipFile,
    ):
        return None  # absent, of an older format or damaged: build anew


def _check(arrays: IndexArrays) -> None:
    """Raises ValueError where arrays of a cache do not fit one another or the shards, whoever wrote it."""
    count = len(arrays.product_ids)
    columns = {name: getattr(arrays, name) for name in _ARRAYS} | {
        name: labels.codes for name, labels in arrays.labels.items()
    }
    columns["text_index"] = arrays.texts.index
    for name, column in columns.items():
        if column.shape != (count,) or column.dtype.kind != "i":
            raise ValueError(f"{name} is {column.dtype} {column.shape}")
    for table in (arrays.keys, arrays.texts.unique):
        table.check()
    if len(arrays.keys) != count:
        raise ValueError(f"{len(arrays.keys)} keys for {count} samples")
    names = {name: len(labels.names) for name, labels in arrays.labels.items()}
    if not all(isinstance(name, str) for labels in arrays.labels.values() for name in labels.names):
        raise ValueError("labels are not strings")
    ends = {"shard": len(arrays.shard_names), "text_index": len(arrays.texts.unique), **names}
    for name, end in ends.items():
        if count and not (columns[name].min() >= (-1 if name in names else 0) and columns[name].max() < end):
            raise ValueError(f"{name} has values outside 0 to {end - 1}")
    sizes = np.array([size for size, _ in arrays.shard_states], np.int64)[arrays.shard]
    for kind in ("image", "json"):
        offset, length = columns[f"{kind}_offset"], columns[f"{kind}_bytes"]
        if count and not (
            offset.min() >= 0 and length.min() >= 0 and (length <= sizes).all() and (offset <= sizes - length).all()
        ):
            raise ValueError(f"{kind} members lie outside the shards")


def _save(cache: Path, state: list[list], arrays: IndexArrays, bad: int) -> bool:
    """Writes the cache aside and renames it, so that no process ever sees half of it. False where the folder
    cannot be written."""
    meta = {
        "format": FORMAT,
        "shards": state,
        "bad": bad,
        "warnings": arrays.warnings,
        "labels": {name: labels.names for name, labels in arrays.labels.items()},
    }
    columns = {name: getattr(arrays, name) for name in _ARRAYS}
    columns |= {name: labels.codes for name, labels in arrays.labels.items()}
    columns |= {"key_data": arrays.keys.data, "key_offsets": arrays.keys.offsets}
    columns |= {
        "text_data": arrays.texts.unique.data,
        "text_offsets": arrays.texts.unique.offsets,
        "text_index": arrays.texts.index,
    }
    columns["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache, durable=False) as file:
            np.savez(file, **columns)
    except OSError:
        return False
    return True
