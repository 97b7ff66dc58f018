"""Files that are there whole or not at all, also when the machine stops in between."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file aside, has the disk keep it, then renames it. errors: OSError."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_folder(aside: Path, target: Path) -> None:
    """Puts a finished folder of files in its place, after the disk has kept every file of it. errors: OSError."""
    for path in (*aside.iterdir(), aside):
        sync(path)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Waits until the disk has kept a file, or the names in a folder. errors: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. errors: OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
