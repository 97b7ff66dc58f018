"""Looks at shards: a table of what is in them, and a contact sheet of some samples."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.console import Console
from rich.table import Table

from syncmask_fast.data.images import check_image, decode_image
from syncmask_fast.data.remote import fetch_if_remote
from syncmask_fast.data.shards import Labels, ShardIndex
from syncmask_fast.utils.errors import UserError

CELL, COLUMNS, LINES, GAP = 176, 6, 4, 8
INK, GREY, PAPER = (40, 40, 44), (150, 150, 156), (250, 250, 248)


def show_shards(data: str | Path, picture: Path, samples: int = 24, seed: int = 0) -> None:
    """Prints the table and writes the picture. errors: UserError for no shards, or a picture that cannot be written."""
    if not 1 <= samples <= 1000:
        raise UserError(f"--samples must be between 1 and 1000, not {samples}")
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
            print(f"left out: {name}/{problem}" if name else f"left out: {problem}")
    try:
        contact_sheet(next(iter(parts.values())), samples, seed).save(picture, quality=88)
    except (OSError, ValueError) as error:
        raise UserError(f"{picture} cannot be written ({error}); name a .jpg or .png by --picture") from None
    print(f"contact sheet: {picture}")


def facts(index: ShardIndex) -> dict[str, str]:
    """What is in one folder of shards, each fact as a text."""
    _, photos = np.unique(index.product_ids, return_counts=True)
    words = np.array([len(text.split()) for text in index.texts.unique])[index.texts.index]
    unreadable, sizes = look_at_images(index)
    return {
        "samples": f"{len(index):,}",
        "products": f"{len(photos):,}",
        "photos per product": _spread(photos),
        "different texts": f"{len(index.texts.unique):,}",
        "words per text": _spread(words),
        "categories": _most(index.category),
        "subcategories": _most(index.subcategory),
        "views": _most(index.view),
        "pictures": ", ".join(f"{count:,} of {size}" for size, count in sizes.most_common(3))
        + (" ..." if len(sizes) > 3 else ""),
        "unreadable pictures": f"{len(unreadable):,}" + (f" ({unreadable[0]} ...)" if unreadable else ""),
        "left out samples": f"{len(index.warnings):,}",
        "shards": f"{len(index.shards):,}, {sum(path.stat().st_size for path in index.shards) / 1e6:,.1f} MB",
    }


def look_at_images(index: ShardIndex) -> tuple[list[str], Counter[str]]:
    """The keys of pictures that are damaged as far as their headers and ends tell, and how many there are of each size."""
    unreadable, sizes = [], Counter()
    for sample in range(len(index)):
        try:
            width, height = check_image(index.image_bytes(sample))
        except ValueError:
            unreadable.append(index.key(sample))
        else:
            sizes[f"{width} x {height}"] += 1
    return unreadable, sizes


def contact_sheet(index: ShardIndex, samples: int, seed: int) -> Image.Image:
    """Some samples, drawn at random, in the order of the shards: picture, text, product and labels."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(index), min(samples, len(index)), replace=False))
    body = ImageFont.load_default(11)
    height = CELL + 14 * (LINES + 1) + GAP
    columns = min(COLUMNS, len(chosen))
    sheet = Image.new("RGB", ((CELL + GAP) * columns + GAP, height * -(-len(chosen) // COLUMNS) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, sample in enumerate(chosen.tolist()):
        left, top = GAP + (place % COLUMNS) * (CELL + GAP), GAP + place // COLUMNS * height
        try:
            photo = ImageOps.contain(Image.fromarray(decode_image(index.image_bytes(sample))), (CELL, CELL))
            sheet.paste(photo, (left + (CELL - photo.width) // 2, top + (CELL - photo.height) // 2))
        except ValueError as error:
            draw.multiline_text((left, top), "\n".join(textwrap.wrap(str(error), 28)), fill=INK, font=body)
        labels = [
            labels.names[labels.codes[sample]] for labels in (index.category, index.view) if labels.codes[sample] >= 0
        ]
        title = " ".join([f"#{index.product_ids[sample]}", *labels])
        draw.text((left, top + CELL + 2), title[:32], fill=GREY, font=body)
        for line, words in enumerate(textwrap.wrap(index.texts[sample], 30, max_lines=LINES, placeholder=" ...")):
            draw.text((left, top + CELL + 2 + 14 * (line + 1)), words, fill=INK, font=body)
    return sheet


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()}, median {np.median(values):.0f}, mean {values.mean():.1f}"


def _most(labels: Labels) -> str:
    counts = Counter(labels.codes[labels.codes >= 0].tolist())
    shown = ", ".join(f"{labels.names[code]} {count:,}" for code, count in counts.most_common(5))
    return f"{len(counts)}: {shown}{' ...' if len(counts) > 5 else ''}" if counts else "none"
