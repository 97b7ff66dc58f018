"""Where derived data (indexes, token ids) is kept, and how it is written so that no process ever sees half of
it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def user_cache() -> Path:
    """The user's cache folder for this package (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncmask_fast"


def cache_candidates(folder: Path, name: str) -> list[Path]:
    """Where `folder/name` may be cached: there, or in the user's cache folder where `folder` is read-only."""
    mark = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return [folder / name, user_cache() / f"{mark}-{name.lstrip('.')}"]


def atomic_folder(places: list[Path], write: Callable[[Path], None]) -> Path | None:
    """Has `write` fill a new folder, which is then renamed to the first place that can be written.

    A place that another process filled meanwhile is left as it is: its content is the same. returns the
    place, or None if there is none.
    """
    for place in places:
        aside = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name.lstrip('.')}-"))
            aside.chmod(0o755)
            write(aside)
            try:
                aside.rename(place)
            except OSError:
                if not place.is_dir():
                    raise
            return place
        except OSError:
            continue
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
    return None
