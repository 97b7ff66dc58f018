"""FashionIQ: `captions/cap.CLASS.SPLIT.json`, `image_splits/split.CLASS.SPLIT.json` and images named by ASIN.

A sample is one image. Its text (our choice) is the class and all captions of which the image is the target, such as
"dress: is black and has long sleeves"; an image that is never a target has only the class. The triplets and galleries
for composed retrieval are next to the shards. The targets of the test split were never published, so it is skipped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from syncmask_fast.sources.base import Row, RowError, ShardSpec, Source, chunk, round_up_fraction
from syncmask_fast.sources.text_cleaning import clean
from syncmask_fast.utils.errors import UserError

CLASSES = ("dress", "shirt", "toptee")
SPLITS = {"train": "train", "eval": "val"}  # folder of the output, FashionIQ's name
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MAX_JSON = 256 * 2**20  # bytes of one file
_FORM = '{"candidate": ASIN, "target": ASIN, "captions": [two texts]}'
DOWNLOAD = "Download it again from FashionIQ's repository."
_ASIN = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class AnnotatedImage:
    """One image of a split, as the annotation has it."""

    asin: str
    classes: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def text(self) -> str:
        kind = "top or t-shirt" if self.classes[0] == "toptee" else self.classes[0]
        return f"{kind}: {' and '.join(self.captions)}" if self.captions else kind


@dataclass(frozen=True)
class FashionIQ(Source):
    """A folder with `captions` and `image_splits`. The images are in `images` or below; None: in `folder`/images."""

    folder: Path
    images: Path | None = None

    def describe(self) -> dict[str, Any]:
        parts = sorted(path for name in ("captions", "image_splits") for path in (self.folder / name).glob("*.json"))
        changed = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in parts}
        folders = {"source": str(self.folder.resolve()), "images": str(self._images.resolve())}
        return {"kind": "fashioniq", **folders, "annotation": changed}

    def shards(self, rows: int) -> list[ShardSpec]:
        return [shard for split in SPLITS for shard in chunk(len(self._annotated[split]), rows, split)]

    def read(self, shard: ShardSpec) -> Iterator[Row]:
        for item in self._annotated[shard.folder][shard.start : shard.stop]:
            missing = RowError("the image is missing", f"{item.asin} is not in {self._images}")
            record = {"product_id": item.asin, "text": item.text, "category": item.classes[0]}
            yield Row(f"{shard.folder}/{item.asin}", item.asin, self._files.get(item.asin, missing), record)

    def missing(self) -> dict[str, list[str]]:
        """Return the ASINs of each split that have no image."""
        return {split: [i.asin for i in items if i.asin not in self._files] for split, items in self._annotated.items()}

    def refuse_missing(self, allowed: float) -> None:
        """Raise UserError if more than the fraction `allowed` of the images is missing."""
        if not self._files:
            raise UserError(f"{self._images} has no images. Give the folder of ASIN.jpg or ASIN.png by --images.")
        lost = [asin for names in self.missing().values() for asin in names]
        count = sum(map(len, self._annotated.values()))
        if len(lost) > allowed * count:
            named = ", ".join(lost[:3]) + (" ..." if len(lost) > 3 else "")
            raise UserError(
                f"{self._images}: {len(lost):,} of FashionIQ's {count:,} images are missing, more than "
                f"--allow-missing {allowed:g} ({named}). "
                f"Add them, or pack without them by --allow-missing {round_up_fraction(len(lost), count)}."
            )

    def report_fields(self) -> dict[str, Any]:
        lost = {split: set(names) for split, names in self.missing().items()}
        triplets = {
            split: {
                "all": len(self._triplets[split]),
                "with both images": sum(not {t["candidate"], t["target"]} & lost[split] for t in self._triplets[split]),
            }
            for split in SPLITS
        }
        bare = {split: sum(not item.captions for item in items) for split, items in self._annotated.items()}
        counts = {"triplets": triplets, "images without captions": bare}
        return {"missing images": self.missing(), **counts, "skipped": "the test split"}

    def extra_files(self, out: Path) -> dict[str, Any]:
        found = {}
        for split, name in SPLITS.items():
            lost = set(self.missing()[split])
            found[f"{split}/triplets.json"] = [
                t for t in self._triplets[split] if not {t["candidate"], t["target"]} & lost
            ]
            found[f"{split}/galleries.json"] = {
                kind: [a for a in self._gallery(kind, name) if a not in lost] for kind in CLASSES
            }
        return found

    @property
    def _images(self) -> Path:
        return self.images or self.folder / "images"

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Image files by ASIN. Names in the annotation are looked up here and never become a path."""
        found: dict[str, Path] = {}
        for folder, _, names in sorted(os.walk(self._images)):
            for name in sorted(names):
                stem, extension = os.path.splitext(name)
                if extension.lower() in EXTENSIONS:
                    found.setdefault(stem, Path(folder, name))
        return found

    @cached_property
    def _triplets(self) -> dict[str, list[dict[str, Any]]]:
        """Each split's triplets: class, candidate, target, captions."""
        found: dict[str, list[dict[str, Any]]] = {}
        for split, name in SPLITS.items():
            found[split] = []
            for kind in CLASSES:
                path = self.folder / "captions" / f"cap.{kind}.{name}.json"
                for number, item in enumerate(self._load(path)):
                    captions = item.get("captions") if isinstance(item, dict) else None
                    names = [item.get("candidate"), item.get("target")] if isinstance(item, dict) else []
                    if not (isinstance(captions, list) and captions and all(isinstance(c, str) for c in captions)):
                        raise UserError(f"{path}: entry {number} is malformed. It should be {_FORM}.")
                    for asin in names:
                        _check_asin(asin, path, number)
                    kept = [text for text in (clean(caption).rstrip(". ") for caption in captions) if text]
                    found[split].append({"class": kind, "candidate": names[0], "target": names[1], "captions": kept})
        return found

    @cached_property
    def _annotated(self) -> dict[str, list[AnnotatedImage]]:
        """Each split's images in the order of the annotation: the galleries, then those only in triplets."""
        found = {}
        for split, name in SPLITS.items():
            classes: dict[str, dict[str, None]] = {}
            captions: dict[str, dict[str, None]] = {}
            for kind in CLASSES:
                for asin in self._gallery(kind, name):
                    classes.setdefault(asin, {})[kind] = None
            for triplet in self._triplets[split]:
                for asin in (triplet["candidate"], triplet["target"]):
                    classes.setdefault(asin, {})[triplet["class"]] = None
                captions.setdefault(triplet["target"], {}).update(dict.fromkeys(triplet["captions"]))
            found[split] = [
                AnnotatedImage(asin, tuple(kinds), tuple(captions.get(asin, ()))) for asin, kinds in classes.items()
            ]
        return found

    def _gallery(self, kind: str, split: str) -> list[str]:
        path = self.folder / "image_splits" / f"split.{kind}.{split}.json"
        names = self._load(path)
        for number, asin in enumerate(names):
            _check_asin(asin, path, number)
        return names

    def _load(self, path: Path) -> list[Any]:
        try:
            if path.stat().st_size > MAX_JSON:
                raise UserError(f"{path} has more than {MAX_JSON >> 20} MB. Give FashionIQ's original file.")
            found = json.loads(path.read_bytes())
        except OSError as error:
            fix = "Give a folder with FashionIQ's captions and image_splits."
            raise UserError(f"{path} cannot be read ({error.strerror}). {fix}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not valid JSON ({error}). Download it again from FashionIQ's repository."
            ) from None
        if not isinstance(found, list):
            raise UserError(f"{path} is not a list. {DOWNLOAD}")
        return found


def _check_asin(asin: Any, path: Path, number: int) -> None:
    if not isinstance(asin, str) or not _ASIN.fullmatch(asin):
        raise UserError(f"{path}: entry {number} names the image {asin!r}. It should be an ASIN of letters and digits.")
