"""Small files in the formats of real sources, written by the real libraries."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from tests.helpers import encoded_image

CATEGORIES = ("TOPS   ", "JEANS", "SWEATERS\t")
SUBCATEGORIES = ("T-SHIRTS    ", "SLIM JEANS", "CREWNECKS")
ONLY_IN_VALIDATION = "CORSETS & BODYSUITS"


def description(row: int) -> str:
    """Upper and lower case, a tag, an entity and a letter beyond ASCII; images of a product share it."""
    product = row // 3
    shape = ["star", "moon", "sun"][product % 3]
    return f"Slim-fit coat number {product} in café brown.<br>Zip pocket &amp; {shape} print."


def write_fashiongen(
    path: Path,
    rows: int = 60,
    *,
    size: int = 32,
    validation: bool = False,
    empty: tuple[int, ...] = (),
    **chunks: object,
) -> None:
    """FashionGen's layout: [N, 1] fixed bytes in ISO-8859-1, integer product ids, three rows for each product."""
    rng = np.random.default_rng(7)
    with h5py.File(path, "w") as file:
        colors = rng.integers(0, 256, (rows, 1, 1, 3))
        noise = rng.integers(-20, 20, (rows, size, size, 3))
        file.create_dataset("input_image", data=(colors + noise).clip(0, 255).astype(np.uint8), **chunks)
        columns = {
            "name": ("S100", [f"NAVY COAT {row // 3}   " for row in range(rows)]),
            "description": ("S400", ["" if row in empty else description(row) for row in range(rows)]),
            "category": ("S30", [CATEGORIES[row // 3 % 3] for row in range(rows)]),
            "subcategory": ("S40", [SUBCATEGORIES[row // 3 % 3] for row in range(rows)]),
            "pose": ("S20", [f"id_gridfs_{row % 3 + 1}" for row in range(rows)]),
            "brand": ("S40", ["Maison Éclair"] * rows),
            "gender": ("S6", ["Women"] * rows),
            "season": ("S6", ["SS2015"] * rows),
        }
        if validation:
            columns["subcategory"][1][:3] = [ONLY_IN_VALIDATION] * 3
        if empty:
            columns["name"] = ("S100", ["" if row in empty else name for row, name in enumerate(columns["name"][1])])
        for name, (kind, values) in columns.items():
            file[f"input_{name}"] = np.array([value.encode("iso-8859-1") for value in values], kind).reshape(-1, 1)
        file["input_productID"] = np.arange(rows).reshape(-1, 1) // 3 + 4000
        file["index"] = np.arange(rows).reshape(-1, 1)
        file["index_2"] = np.arange(rows)


def asin(kind: str, number: int) -> str:
    return f"B00{kind[0].upper()}{number:06d}"


def write_fashioniq(folder: Path, images: int = 12, missing: tuple[str, ...] = ()) -> None:
    """FashionIQ's annotation for the three classes, and images of both kinds.

    One image is the target of two triplets, the last two of none.
    """
    (folder / "captions").mkdir(parents=True)
    (folder / "image_splits").mkdir()
    (folder / "images").mkdir()
    for place, kind in enumerate(("dress", "shirt", "toptee")):
        for split, first in (("train", 0), ("val", 100), ("test", 200)):
            names = [asin(kind, first + n) for n in range(images)]
            triplets = []
            for n in range(images - 2):
                captions = [f" is more red than number {n}. ", "has longer sleeves"]
                target = {} if split == "test" else {"target": names[max(n, 1)]}
                triplets.append({"candidate": names[n + 2], **target, "captions": captions})
            (folder / f"captions/cap.{kind}.{split}.json").write_text(json.dumps(triplets))
            (folder / f"image_splits/split.{kind}.{split}.json").write_text(json.dumps(names))
            for n, name in enumerate(names):
                if split != "test" and name not in missing:
                    suffix, fmt = (".png", "PNG") if n % 5 == 4 else (".jpg", "JPEG")
                    (folder / "images" / (name + suffix)).write_bytes(encoded_image(1000 * place + first + n, kind=fmt))
