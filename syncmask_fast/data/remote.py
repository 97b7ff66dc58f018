"""Remote shards (s3://, gs://, https:// ...): fetched once through fsspec into the user's cache folder.

An address is a folder of shards, one with `train` and `eval` inside, or names with a range as in WebDataset:
`shards/{00000..00129}.tar`, for web servers that do not list folders. A shard is fetched again if the server reports
another size or date.
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
# Names that file systems give to a file's date or hash.
_VERSION = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created")
_STATE = ".remote.json"


def fetch_if_remote(data: str | Path) -> Path:
    """Return the local folder of `data`; if that is an address, fetch the missing shards first.

    errors: UserError if nothing is there, the server does not answer, its protocol's library is missing, or the disk is
            too small.
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
        _fetch(system, address, shards, folder)
    except ImportError as error:
        raise UserError(
            f"{address} needs another package ({one_line(error)}). Run pip install 'syncmask_fast[remote]'."
        ) from None
    except FileNotFoundError as error:
        raise UserError(
            f"{address}: {one_line(error)} is not there, or the server does not answer. "
            "Check the address and the network."
        ) from None
    except UserError:
        raise
    except Exception as error:  # each protocol's library raises other kinds
        raise UserError(
            f"{address} cannot be read ({one_line(error)}). Check the address, the credentials and the network."
        ) from None
    return folder


def _find(system: Any, address: str, root: str) -> dict[str, str]:
    """Return the shards: name in the cache folder -> path for the file system."""
    numbers = _RANGE.search(address)
    if numbers:
        first, last = numbers[1], numbers[2]
        if not 0 <= int(last) - int(first) < MAX_SHARDS or _RANGE.search(address, numbers.end()):
            raise UserError(
                f"{address}: {numbers[0]} is not the only range, or does not rise by at most {MAX_SHARDS:,} numbers. "
                "Write one, such as {00000..00129}."
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
        raise UserError(f"{address} lists no .tar shards. Name them with a range: {address}/{{00000..00099}}.tar.")
    return dict(sorted(shards.items()))


def _fetch(system: Any, address: str, shards: dict[str, str], folder: Path) -> None:
    """Fetch the shards that are missing or have changed, and delete those that the address no longer has."""
    infos = {name: system.info(path) for name, path in shards.items()}
    state = {
        name: [info.get("size"), *(str(info[key]) for key in _VERSION if key in info)] for name, info in infos.items()
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
    total = sum(infos[name].get("size") or 0 for name in wanted)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        need = f"{address} has {total / 1e9:.1f} GB to fetch, but {folder} has room for {free / 1e9:.1f}."
        raise UserError(f"{need} Point XDG_CACHE_HOME to a larger disk.")
    columns = (
        TextColumn(f"fetching {len(wanted)} shards"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    lock = threading.Lock()
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
                size = infos[name].get("size")
                if size is not None and partial.stat().st_size != size:
                    raise UserError(
                        f"{shards[name]} ended after {partial.stat().st_size:,} of {size:,} bytes. Start again."
                    )
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
            with lock:  # after each shard, so an interrupted fetch can be resumed
                known[name] = state[name]
                write_json(folder / _STATE, known)
            progress.advance(task, infos[name].get("size") or 0)

        list(pool.map(fetch, wanted))
