"""Triplets of the lookbook: "is red and has long sleeves", from what two products of one category differ in.

They follow from the records alone, so that a lookbook drawn before can be given them without being drawn anew.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from syncmask_fast.data.triplets import GALLERIES, TRIPLETS

from .subcategories import SUBCATEGORIES

CANDIDATES = 3  # references of each target: the products that are most like it
NAMED = 4  # differences that are told at most
STRUCTURE = ("category", "subcategory", "sleeves", "neckline", "collar", "hood")  # of the cut: these are never "none"
MASS_NOUNS = ("lacing", "embroidery", "lettering", "edging")
SAME = "is otherwise the same"

Entry = tuple[str, dict[str, Any]]


def write_triplets(folder: Path, samples: Iterable[Entry]) -> None:
    """Writes triplets.json and galleries.json of a split from the keys and records of its samples, each aside first.

    Reference and target are front views of products of one category. A target's references are the products that differ from it in the fewest facts.
    """
    samples = list(samples)
    fronts = [(key, record) for key, record in samples if record["view"] == "front"]
    triplets = []
    by_category: dict[str, list[Entry]] = defaultdict(list)
    for entry in fronts:
        by_category[entry[1]["category"]].append(entry)
    for category, entries in by_category.items():
        for key, record in entries:
            told = [
                (len(_differences(other["facts"], record["facts"])), other_key, other) for other_key, other in entries
            ]
            for _, other_key, other in sorted((found for found in told if found[0]), key=lambda found: found[:2])[
                :CANDIDATES
            ]:
                rng = np.random.Generator(
                    np.random.Philox(key=np.array([record["product_id"], other["product_id"]], np.uint64))
                )
                captions = _captions(other["facts"], record["facts"], rng)
                triplets.append({"class": category, "candidate": other_key, "target": key, "captions": captions})
    galleries: dict[str, list[str]] = defaultdict(list)
    for key, record in samples:
        galleries[record["category"]].append(key)
    for name, content in ((TRIPLETS, triplets), (GALLERIES, galleries)):
        aside = folder / f".{name}.partial-{os.getpid()}"
        aside.write_text(json.dumps(content) + "\n")
        aside.replace(folder / name)


def _differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names of the facts that differ, but for parts of the cut that `after` does not have."""
    names = dict.fromkeys([*after, *before])
    return [name for name in names if before.get(name) != after.get(name) and (name in after or name not in STRUCTURE)]


def _captions(before: dict[str, str], after: dict[str, str], rng: np.random.Generator) -> list[str]:
    """Two captions, as FashionIQ has them, that tell up to four differences in random order."""
    names = _differences(before, after)
    phrases = [_phrase(name, after.get(name)) for name in (names[i] for i in rng.permutation(len(names))[:NAMED])]
    half = -(-len(phrases) // 2)
    return [" and ".join(phrases[:half]), " and ".join(phrases[half:]) or SAME]


def _phrase(name: str, value: str | None) -> str:
    """The words for one fact of the target; None where it has no such thing."""
    if value is None:
        return f"has no {name}"
    if name == "colour":
        return f"is {value}"
    if name == "material":
        return f"is made of {value}"
    if name == "subcategory":
        if not SUBCATEGORIES[value].plural:
            return f"is {_article(value)}{value}"
        return f"is a pair of {value.removesuffix('s')}s"
    if name == "pattern" and value == "solid":
        return "has no pattern"
    return f"has {value if name == 'pattern' or value.endswith(('s', *MASS_NOUNS)) else _article(value) + value}"


def _article(words: str) -> str:
    return "an " if words[0] in "aeiou" else "a "
