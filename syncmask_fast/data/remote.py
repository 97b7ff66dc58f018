"""Shards that lie elsewhere (s3://, gs://, https:// ...): fetched once through fsspec into the user's cache folder, then read as local files.

An address is a folder of shards, one with `train` and `eval` inside, or names with a range as WebDataset writes it: `shards/{00000..00129}.tar`,
for web servers that list no folders. A shard is fetched anew where its size or its date, as far as the server tells, has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from syncmask_fast.utils.errors import UserError, one_line
from syncmask_fast.utils.files import partial_path, user_cache, write_json

THREADS = 8
MAX_SHARDS = 1_000_000
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHANGE = (
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)  # what file systems call the date or hash
_STATE = ".remote.json"


def fetch_if_remote(data: str | Path) -> Path:
    """The folder on this machine that holds the shards of `data`, after fetching those that are missing where `data` is an address.

    errors: UserError where nothing is there, the server does not answer, a library for its protocol is missing, or the disk is too small.
    """
    if not _ADDRESS.match(str(data)):
        return Path(data)
    address = str(data).rstrip("/")
    folder = user_cache() / "shards" / hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(_RANGE.sub(r"\1", address))
        system.invalidate_cache()
        shards = _find(system, address, root)
        found = {name: system.info(path) for name, path in shards.items()}
        _fetch(system, address, shards, found, folder)
    except ImportError as error:
        raise UserError(
            f"{address}: this protocol needs another package ({error}); pip install 'syncmask_fast[remote]'"
        ) from None
    except FileNotFoundError as error:
        raise UserError(
            f"{address}: {error} is not there, or the server does not answer; check the address and the network"
        ) from None
    except UserError:
        raise
    except Exception as error:  # each protocol's library raises its own kinds
        raise UserError(
            f"{address} cannot be read ({one_line(error)}); check the address, the credentials and the network"
        ) from None
    return folder


def _find(system: Any, address: str, root: str) -> dict[str, str]:
    """The shards: name in the cache folder -> path for the file system."""
    numbers = _RANGE.search(address)
    if numbers:
        first, last = numbers[1], numbers[2]
        if not 0 <= int(last) - int(first) < MAX_SHARDS or _RANGE.search(address, numbers.end()):
            raise UserError(
                f"{address}: {numbers[0]} is no rising range of at most {MAX_SHARDS:,} numbers, or not the only one"
            )
        each = (
            address[: numbers.start()] + f"{n:0{len(first)}d}" + address[numbers.end() :]
            for n in range(int(first), int(last) + 1)
        )
        return {path.rpartition("/")[2]: system._strip_protocol(path) for path in each}
    if address.endswith(".tar"):
        return {address.rpartition("/")[2]: root}
    names = {path.rstrip("/").rpartition("/")[2]: path for path in system.ls(root, detail=False)}
    folders = [name for name in ("train", "eval") if name in names]
    if len(folders) == 2:
        inner = {f"{name}/": system.ls(names[name].rstrip("/"), detail=False) for name in folders}
    else:
        inner = {"": names.values()}
    shards = {
        prefix + path.rpartition("/")[2]: path
        for prefix, paths in inner.items()
        for path in paths
        if path.endswith(".tar")
    }
    if not shards:
        raise UserError(f"{address} lists no .tar shards; name them with a range, as in {address}/{{00000..00099}}.tar")
    return dict(sorted(shards.items()))


def _fetch(system: Any, address: str, shards: dict[str, str], found: dict[str, dict[str, Any]], folder: Path) -> None:
    state = {
        name: [info.get("size"), *(str(info[key]) for key in _CHANGE if key in info)] for name, info in found.items()
    }
    try:
        known = json.loads((folder / _STATE).read_text())
    except (OSError, ValueError):
        known = {}
    wanted = [name for name in shards if known.get(name) != state[name] or not (folder / name).is_file()]
    for old in {str(path.relative_to(folder)) for path in folder.rglob("*.tar")} - shards.keys():
        (folder / old).unlink()
    if not wanted:
        return
    total = sum(found[name].get("size") or 0 for name in wanted)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        need = f"{address} has {total / 1e9:.1f} GB to fetch, but {folder} has room for {free / 1e9:.1f}"
        raise UserError(f"{need}; point XDG_CACHE_HOME to a larger disk")
    columns = (
        TextColumn(f"fetching {len(wanted)} shards"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    noting = threading.Lock()
    with (
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        task = progress.add_task("", total=total)

        def fetch(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = partial_path(target)
            try:
                system.get_file(shards[name], str(partial))
                size = found[name].get("size")
                if size is not None and partial.stat().st_size != size:
                    raise UserError(
                        f"{shards[name]} ended after {partial.stat().st_size:,} of {size:,} bytes; start again"
                    )
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
            with noting:  # after each shard, so that a fetch that was cut off goes on
                known[name] = state[name]
                write_json(folder / _STATE, known)
            progress.advance(task, found[name].get("size") or 0)

        list(pool.map(fetch, wanted))
