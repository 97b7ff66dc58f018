"""Inspect shards: a table of their contents, and samples for a contact sheet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from syncmask_fast.data.images import check_image, decode_image
from syncmask_fast.data.remote import fetch_if_remote
from syncmask_fast.data.shard_index import Labels
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.utils.errors import UserError


class SheetSample(NamedTuple):
    """One sample of a contact sheet. image: uint8 [H, W, 3], or None with the `problem` that it has."""

    image: np.ndarray | None
    problem: str
    title: str
    text: str
    attributes: list[dict]


def inspect_shards(data: str | Path) -> ShardIndex:
    """Print the table; return the index of `train`, or of the folder itself. errors: UserError for no shards."""
    folder = fetch_if_remote(data)
    parts = {name: ShardIndex.open(folder / name, max_bad=1) for name in ("train", "eval") if (folder / name).is_dir()}
    parts = parts or {"": ShardIndex.open(folder, max_bad=1)}
    columns = {name: facts(index) for name, index in parts.items()}
    table = Table(title=str(data), title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name)
    for row in next(iter(columns.values())):
        table.add_row(row, *(column[row] for column in columns.values()))
    Console(markup=False, highlight=False).print(table)
    for name, index in parts.items():
        for problem in index.warnings[:5]:
            print(f"skipped: {name}/{problem}" if name else f"skipped: {problem}")
    return next(iter(parts.values()))


def facts(index: ShardIndex) -> dict[str, str]:
    """Return what is in one folder of shards, each fact as a text."""
    _, images = np.unique(index.product_ids, return_counts=True)
    words = np.array([len(text.split()) for text in index.texts.unique])[index.texts.index]
    unreadable, sizes = check_images(index)
    return {
        "samples": f"{len(index):,}",
        "products": f"{len(images):,}",
        "images per product": _spread(images),
        "different texts": f"{len(index.texts.unique):,}",
        "words per text": _spread(words),
        "categories": _most(index.category),
        "subcategories": _most(index.subcategory),
        "views": _most(index.view),
        "images": ", ".join(f"{count:,} of {size}" for size, count in sizes.most_common(3))
        + (" ..." if len(sizes) > 3 else ""),
        "unreadable images": f"{len(unreadable):,}" + (f" ({unreadable[0]} ...)" if unreadable else ""),
        "skipped samples": f"{len(index.warnings):,}",
        "shards": f"{len(index.shards):,}, {sum(path.stat().st_size for path in index.shards) / 1e6:,.1f} MB",
    }


def check_images(index: ShardIndex) -> tuple[list[str], Counter[str]]:
    """Return the keys of images whose header or end is damaged, and a count of each size."""
    unreadable, sizes = [], Counter()
    for sample in range(len(index)):
        try:
            width, height = check_image(index.image_bytes(sample))
        except ValueError:
            unreadable.append(index.key(sample))
        else:
            sizes[f"{width} x {height}"] += 1
    return unreadable, sizes


def draw_samples(index: ShardIndex, samples: int, seed: int) -> list[SheetSample]:
    """Return at most `samples` samples: random products, each with its images next to each other.

    errors: UserError for a number out of range.
    """
    if not 1 <= samples <= 1000:
        raise UserError(f"--samples {samples} is out of range. Give a number from 1 to 1000.")
    _, product = np.unique(index.product_ids, return_inverse=True)
    turn = np.random.default_rng(seed).permutation(product.max() + 1)[product]
    found = []
    for sample in np.argsort(turn, kind="stable")[:samples].tolist():
        record = index.record(sample)
        try:
            image, problem = decode_image(index.image_bytes(sample)), ""
        except ValueError as error:
            image, problem = None, str(error)
        labels = [str(record[name]) for name in ("category", "view") if record.get(name)]
        title = " ".join([f"#{index.product_ids[sample]}", *labels])
        found.append(SheetSample(image, problem, title, index.texts[sample], record.get("attributes") or []))
    return found


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()}, median {np.median(values):.0f}, mean {values.mean():.1f}"


def _most(labels: Labels) -> str:
    counts = Counter(labels.codes[labels.codes >= 0].tolist())
    shown = ", ".join(f"{labels.names[code]} {count:,}" for code, count in counts.most_common(5))
    return f"{len(counts)}: {shown}{' ...' if len(counts) > 5 else ''}" if counts else "none"
