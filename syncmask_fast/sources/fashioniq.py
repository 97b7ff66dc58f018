"""FashionIQ: `captions/cap.CLASS.SPLIT.json`, `image_splits/split.CLASS.SPLIT.json` and pictures named by ASIN.

A sample is one picture. Its text (our choice) is the class and all captions of which the picture is the target: "dress: is black and has long
sleeves". A picture that is nobody's target has the class alone. The triplets and the galleries that composed retrieval needs lie beside the
shards. The test split's targets were never published, so it is left out.
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

from syncmask_fast.sources.base import Row, RowError, Unit, cut, share
from syncmask_fast.sources.text_cleaning import clean
from syncmask_fast.utils.errors import UserError

CLASSES = ("dress", "shirt", "toptee")
SPLITS = {"train": "train", "eval": "val"}  # folder of the output, FashionIQ's name
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MAX_JSON = 256 * 2**20  # bytes of one file
_FORM = '{"candidate": ASIN, "target": ASIN, "captions": [two texts]}'
_ASIN = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class Picture:
    """What the annotation says of one picture of a split."""

    asin: str
    classes: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def text(self) -> str:
        kind = "top or t-shirt" if self.classes[0] == "toptee" else self.classes[0]
        return f"{kind}: {' and '.join(self.captions)}" if self.captions else kind


@dataclass(frozen=True)
class FashionIQ:
    """A folder with `captions`, `image_splits` and the pictures.

    images: where the pictures are, in folders within it too; None: `folder`/images.
    """

    folder: Path
    images: Path | None = None

    def describe(self) -> dict[str, Any]:
        parts = sorted(path for name in ("captions", "image_splits") for path in (self.folder / name).glob("*.json"))
        changed = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in parts}
        return {
            "source": str(self.folder.resolve()),
            "kind": "fashioniq",
            "images": str(self._images.resolve()),
            "annotation": changed,
        }

    def units(self, rows: int) -> list[Unit]:
        return [unit for split in SPLITS for unit in cut(len(self._pictures[split]), rows, split)]

    def read(self, unit: Unit) -> Iterator[Row]:
        for picture in self._pictures[unit.folder][unit.start : unit.stop]:
            path = self._files.get(picture.asin)
            image = (
                path
                if path is not None
                else RowError("the picture is missing", f"{picture.asin} is not in {self._images}")
            )
            record = {"product_id": picture.asin, "text": picture.text, "category": picture.classes[0]}
            yield Row(f"{unit.folder}/{picture.asin}", picture.asin, image, record)

    def missing(self) -> dict[str, list[str]]:
        """The ASINs of each split that have no picture."""
        return {
            split: [p.asin for p in pictures if p.asin not in self._files] for split, pictures in self._pictures.items()
        }

    def refuse_missing(self, allowed: float) -> None:
        """UserError if more than the share `allowed` of the pictures is missing."""
        if not self._files:
            raise UserError(
                f"{self._images} holds no pictures; ASIN.jpg or ASIN.png were expected: give their folder by --images"
            )
        lost = [asin for names in self.missing().values() for asin in names]
        count = sum(map(len, self._pictures.values()))
        if len(lost) > allowed * count:
            named = ", ".join(lost[:3]) + (" ..." if len(lost) > 3 else "")
            raise UserError(
                f"{self._images}: {len(lost):,} of FashionIQ's {count:,} pictures are missing, more than --allow-missing {allowed:g} lets go "
                f"({named}); add them, or pack without them by --allow-missing {share(len(lost), count)}"
            )

    def notes(self) -> dict[str, Any]:
        lost = {split: set(names) for split, names in self.missing().items()}
        triplets = {
            split: {
                "all": len(self._triplets[split]),
                "with both pictures": sum(
                    not {t["candidate"], t["target"]} & lost[split] for t in self._triplets[split]
                ),
            }
            for split in SPLITS
        }
        bare = {split: sum(not p.captions for p in pictures) for split, pictures in self._pictures.items()}
        return {
            "missing pictures": self.missing(),
            "triplets": triplets,
            "pictures that are no target": bare,
            "left out": "the test split",
        }

    def companions(self) -> dict[str, Any]:
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
        """Picture files by ASIN. Names in the annotation are looked up here and never made into a path."""
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
                        raise UserError(f"{path}: entry {number} is not of the form {_FORM}, which was expected")
                    for asin in names:
                        _check_asin(asin, path, number)
                    kept = [text for text in (clean(caption).rstrip(". ") for caption in captions) if text]
                    found[split].append({"class": kind, "candidate": names[0], "target": names[1], "captions": kept})
        return found

    @cached_property
    def _pictures(self) -> dict[str, list[Picture]]:
        """Each split's pictures, in the order of the annotation: the galleries, then what only triplets name."""
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
                Picture(asin, tuple(kinds), tuple(captions.get(asin, ()))) for asin, kinds in classes.items()
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
                raise UserError(f"{path} has more than {MAX_JSON >> 20} MB, which no FashionIQ file has")
            found = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); a folder with FashionIQ's captions and image_splits was expected"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); get it anew from FashionIQ's repository") from None
        if not isinstance(found, list):
            raise UserError(
                f"{path} is not a list, which FashionIQ's files are; get it anew from FashionIQ's repository"
            )
        return found


def _check_asin(asin: Any, path: Path, number: int) -> None:
    if not isinstance(asin, str) or not _ASIN.fullmatch(asin):
        raise UserError(
            f"{path}: entry {number} names the picture {asin!r}, where an ASIN of letters and digits was expected"
        )
