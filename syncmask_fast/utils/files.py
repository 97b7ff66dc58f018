"""Files and folders that are complete or absent: written under another name, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def partial_path(path: Path) -> Path:
    """Return the name under which this process writes `path` until it is complete: `.NAME.PID.partial`, next to it."""
    return path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.partial")


@contextlib.contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends. An exception removes it.

    durable: sync the file and its name to disk; a cache can do without. errors: OSError.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically. errors: OSError."""
    text = json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # a lone surrogate, as in some file names: valid JSON too


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `target` when the block ends. An exception removes it.

    errors: OSError.
    """
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        # Files first, then their names: after a power loss the renamed folder must be complete.
        for path in (*partial.iterdir(), partial):
            fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync(target.parent)


def fsync(path: Path) -> None:
    """Sync a file, or the names in a folder, to disk. errors: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal. errors: OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def user_cache() -> Path:
    """Return the user's cache folder for this package (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncmask_fast"


def cache_candidates(folder: Path, name: str) -> list[Path]:
    """Return where `folder/name` may be cached: there, or in the user's cache folder if `folder` is read-only."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / name, user_cache() / f"{digest}-{name.lstrip('.')}"]


def atomic_folder(candidates: list[Path], write: Callable[[Path], None]) -> Path | None:
    """Let `write` fill a new folder, and rename it to the first candidate that can be written.

    Return that path, or None if there is none. A folder that another process put there meanwhile stays: it has the
    same content.
    """
    for target in candidates:
        partial = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".{target.name.lstrip('.')}."
            partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix, suffix=".partial"))
            partial.chmod(0o755)  # other users may share the dataset
            write(partial)
            try:
                partial.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
            return target
        except OSError:
            continue
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
    return None
