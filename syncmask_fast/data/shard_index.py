"""The index of a folder of shards: built from headers and records, cached in one file of numpy arrays and JSON."""

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
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError)  # of np.load
_LOAD_ERRORS += (MemoryError, RecursionError, zipfile.BadZipFile)

Members = dict[str, tuple[int, int]]  # of one sample: "image", "json", "txt" -> offset, bytes
State = list[list]  # name, size and modification time (ns) of each shard; a cache must match it


class Labels(NamedTuple):
    """One label per sample: `names[codes[i]]`, or none where codes[i] is -1."""

    codes: np.ndarray
    """int32 [N]."""
    names: list[str]
    """Sorted."""


@dataclass(frozen=True)
class IndexArrays:
    """N samples without their images and records. Offsets and sizes are in bytes of the shard's file."""

    shard_names: list[str]
    """File names."""
    shard_states: list[list[int]]
    """Size and modification time (ns) of each shard when it was indexed."""
    shard: np.ndarray
    """int32 [N], number of the shard in `shard_names`."""
    image_offset: np.ndarray
    """int64 [N]."""
    image_bytes: np.ndarray
    """int64 [N], size of the encoded image."""
    json_offset: np.ndarray
    """int64 [N]."""
    json_bytes: np.ndarray
    """int64 [N], size of the JSON member; 0 if there is none."""
    product_ids: np.ndarray
    """int64 [N], see `encode_product_ids`."""
    keys: StringArray
    """N names of members, without extension."""
    texts: UniqueStrings
    """N texts."""
    labels: dict[str, Labels]
    """By the names in LABELS."""
    warnings: list[str]
    """One line for each shard or sample that was left out."""


class BadSample(Exception):
    """A sample cannot be used; the message is the reason."""


def load_or_build(folder: Path, max_bad: float) -> IndexArrays:
    """Return the arrays of all shards in `folder`, from the cache if it matches them. See `ShardIndex.open`."""
    shards = _find_shards(folder)
    state = _state(shards)
    caches = cache_candidates(folder, CACHE_NAME)
    loaded = next(filter(None, (_load(cache, state) for cache in caches)), None)
    if loaded is None:
        loaded = _build(shards, state)
        if _state(shards) == state:  # otherwise a shard was rewritten meanwhile
            any(_save(cache, state, *loaded) for cache in caches)
    arrays, bad = loaded
    count = len(arrays.product_ids)
    if count == 0 or bad > max_bad * (count + bad):
        examples = "; ".join([*arrays.warnings[:3], *(["..."] if len(arrays.warnings) > 3 else [])])
        raise UserError(
            f"{folder} has {bad} bad and {count} good samples{f' ({examples})' if examples else ''}. "
            "Repair or repack the shards."
        )
    return arrays


def _find_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}. Give the folder of the .tar shards.")
    shards = sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not shards:
        compressed = next(iter([*folder.glob("*.tar.*"), *folder.glob("*.tgz")]), None)
        inner = next(iter(sorted(folder.glob("*/*.tar"))), None)
        fix = "Give the folder of the .tar shards"
        if compressed is not None:
            fix = f"Decompress {compressed.name} and the other archives first"
        elif inner is not None:
            fix = f"Give one of its folders, such as {inner.parent}"
        raise UserError(f"{folder} contains no .tar shards. {fix}.")
    return shards


def _state(shards: list[Path]) -> State:
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in shards]


def _build(shards: list[Path], state: State) -> tuple[IndexArrays, int]:
    """Read all shards. Return their arrays and the number of bad samples."""
    columns: dict[str, list] = {name: [] for name in (*_ARRAYS, "keys", "texts", *LABELS)}
    warnings: list[str] = []
    bad = 0
    for number, path in enumerate(shards):
        archive = _ShardBytes(path)
        samples, problems, lost = _group_members(archive)
        warnings += [f"{path.name}: {problem}" for problem in problems]
        bad += lost
        for key, members in samples.items():
            try:
                row = _read_sample(archive, members)
            except BadSample as error:
                warnings.append(f"{path.name}: member {key}: {error}")
                bad += 1
                continue
            for name, value in {"shard": number, "keys": key, **row}.items():
                columns[name].append(value)
    offsets = [name for name in _ARRAYS if name not in ("shard", "product_ids")]
    arrays = IndexArrays(
        shard_names=[path.name for path in shards],
        shard_states=[known[1:] for known in state],
        shard=np.array(columns["shard"], np.int32),
        **{name: np.array(columns[name], np.int64) for name in offsets},
        product_ids=encode_product_ids(columns["product_ids"]),
        keys=StringArray.of(columns["keys"]),
        texts=UniqueStrings.of(columns["texts"]),
        labels={name: _encode_labels(columns[name]) for name in LABELS},
        warnings=warnings,
    )
    return arrays, bad


class _ShardBytes:
    """A shard's bytes by slices. Not a memory map: a file that shrinks would end the process by SIGBUS."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: slice) -> bytes:
        return os.pread(self._file.fileno(), min(key.stop, self._size) - key.start, key.start)


def _group_members(archive: Buffer) -> tuple[dict[str, Members], list[str], int]:
    """Return members by key in order of first appearance, the problems found, and how many samples they cost."""
    samples: dict[str, Members] = {}
    repeated: dict[str, None] = {}
    problems: list[str] = []
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
        problems.append(str(error))
        if error.costs_a_sample:
            lost += 1
            if "image" not in samples.get(key, {}) or len(samples[key]) < 2:
                samples.pop(key, None)  # the incomplete sample before the cut is the lost one
    problems += [f"member {key}: appears twice; the first is used" for key in repeated]
    return samples, problems, lost + len(repeated)


def _read_sample(archive: Buffer, members: Members) -> dict[str, Any]:
    """Return one row of the columns. errors: BadSample."""
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
    """Check a record against the contract of `shards.py`. errors: BadSample."""
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
    """Return int64 [N]: the ids if all that are present are integers, else numbers by first appearance.

    None is a new product. "7" and 7 are the same product.
    """
    present = [value for value in ids if value is not None]
    as_they_are = all(map(_is_int, present)) and max(present, default=0) + len(ids) < 2**63
    next_id = max(present, default=-1) + 1 if as_they_are else 0
    by_name: dict[str, int] = {}
    encoded = np.empty(len(ids), np.int64)
    for i, value in enumerate(ids):
        if value is not None and as_they_are:
            encoded[i] = value
        elif value is not None and str(value) in by_name:
            encoded[i] = by_name[str(value)]
        else:
            encoded[i] = next_id
            next_id += 1
            if value is not None:
                by_name[str(value)] = int(encoded[i])
    return encoded


def _encode_labels(values: Iterable[object]) -> Labels:
    values = [str(value) if isinstance(value, str) or _is_int(value) else None for value in values]
    names = sorted({value for value in values if value is not None})
    codes = {name: code for code, name in enumerate(names)}
    return Labels(np.array([codes.get(value, -1) for value in values], np.int32), names)


def _load(cache: Path, state: State) -> tuple[IndexArrays, int] | None:
    try:
        with open(cache, "rb") as stored, np.load(stored, allow_pickle=False) as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.zip.infolist()):
                return None  # ours are not compressed: a small file must not expand to fill the memory
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
                warnings=[str(warning) for warning in meta["warnings"]],
            )
            _check(arrays)
            return arrays, int(meta["bad"])
    except _LOAD_ERRORS:
        return None  # missing, of another format, or damaged


_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
)


def _check(arrays: IndexArrays) -> None:
    """Check that arrays of a cache match each other and the shards, whoever wrote them. errors: ValueError."""
    count = len(arrays.product_ids)
    columns = {name: getattr(arrays, name) for name in _ARRAYS} | {
        name: labels.codes for name, labels in arrays.labels.items()
    }
    columns["text_index"] = arrays.texts.index
    for name, column in columns.items():
        if column.shape != (count,) or column.dtype.kind != "i":
            raise ValueError(f"{name} is {column.dtype} {column.shape}")
    for strings in (arrays.keys, arrays.texts.unique):
        strings.check()
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
            raise ValueError(f"{kind} members are outside the shards")


def _save(cache: Path, state: State, arrays: IndexArrays, bad: int) -> bool:
    """Write the cache atomically. Return False if the folder cannot be written."""
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
