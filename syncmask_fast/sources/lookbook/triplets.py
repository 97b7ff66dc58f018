"""Triplets of the lookbook, such as "is red and has long sleeves": what two products of one category differ in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from syncmask_fast.sources.lookbook.subcategories import SUBCATEGORIES

CANDIDATES = 3  # references of each target: the products that are most like it
NAMED = 4  # differences that are told at most
STRUCTURE = ("category", "subcategory", "sleeves", "neckline", "collar", "hood")  # of the cut: these are never "none"
MASS_NOUNS = ("lacing", "embroidery", "lettering", "edging")
SAME = "is otherwise the same"

Entry = tuple[str, dict[str, Any]]


def make_triplets(samples: Iterable[Entry]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return the triplets and the galleries of a split from the keys and records of its samples.

    Reference and target are front views of products of one category. The references of a target are the products
    that differ from it in the fewest facts.
    """
    fronts: dict[str, list[Entry]] = defaultdict(list)
    galleries: dict[str, list[str]] = defaultdict(list)
    for key, record in samples:
        galleries[record["category"]].append(key)
        if record["view"] == "front":
            fronts[record["category"]].append((key, record))
    triplets = []
    for category, entries in fronts.items():
        for key, record in entries:
            # Closest products first; a key breaks ties. Identical products give no triplet
            near = [(len(_differences(o["facts"], record["facts"])), k, o) for k, o in entries]
            near = sorted((found for found in near if found[0]), key=lambda found: found[:2])
            for _, reference, other in near[:CANDIDATES]:
                ids = np.array([record["product_id"], other["product_id"]], np.uint64)
                captions = _captions(other["facts"], record["facts"], np.random.Generator(np.random.Philox(key=ids)))
                triplets.append({"class": category, "candidate": reference, "target": key, "captions": captions})
    return triplets, galleries


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
    if name == "color":
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
