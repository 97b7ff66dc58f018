"""The list of everything that the shop sells, read from subcategories.csv: one line for each subcategory.

In the file `|` separates names of several words and blanks separate single words. `shape` holds NAME=VALUE pairs:
numbers, words, or `yes`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("subcategories.csv")
FACES = ("front", "back", "side")


@dataclass(frozen=True)
class Subcategory:
    """One line of the table."""

    name: str
    category: str
    family: str  # which function of garments/ draws it
    nouns: tuple[str, ...]  # what a text may call it
    shape: dict[str, Any]  # arguments of that function
    materials: tuple[str, ...]
    sleeves: tuple[str, ...]  # that it may be sewn with
    necks: tuple[str, ...]
    trims: tuple[str, ...]  # places where a second color may be
    belt: bool
    plural: bool


def _value(text: str) -> Any:
    if text == "yes":
        return True
    if text.isdigit():
        return int(text)
    return float(text) if text[0].isdigit() else text


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(" | ")) if text else ()


def _read(path: Path) -> dict[str, Subcategory]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["name"]: Subcategory(
            name=row["name"],
            category=row["category"],
            family=row["family"],
            nouns=_names(row["nouns"]),
            shape={name: _value(value) for name, value in (pair.split("=") for pair in row["shape"].split())},
            materials=tuple(row["materials"].split()),
            sleeves=tuple(row["sleeves"].split()),
            necks=tuple(row["necks"].split()),
            trims=_names(row["trims"]),
            belt=row["belt"] == "yes",
            plural=row["plural"] == "yes",
        )
        for row in rows
    }


SUBCATEGORIES = _read(TABLE)
CATEGORIES = tuple(dict.fromkeys(sub.category for sub in SUBCATEGORIES.values()))
