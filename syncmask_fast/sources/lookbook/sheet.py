"""A contact sheet of the lookbook: `python -m syncmask_fast.sources.lookbook.sheet docs/lookbook.jpg`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .catalogue import sample_product, stream
from .details import KINDS
from .drawing import render
from .wording import describe

CHOSEN = (29, 90, 134, 36, 40, 101, 4, 33)  # of seed 0: they show different things
INK, GREEN, GREY = (40, 40, 44), (20, 128, 70), (150, 150, 156)


def contact_sheet(
    numbers: tuple[int, ...] = CHOSEN, *, seed: int = 0, size: int = 176, columns: int = 2
) -> Image.Image:
    """The views of some training products with their texts. Local details are framed where they are seen;
    under each view stand those that are mentioned and seen there (green) and those that are mentioned and
    not seen (grey)."""
    views, gap, words = 4, 6, 88
    cell = (views * (size + gap) + 14, size + words)
    rows = -(-len(numbers) // columns)
    sheet = Image.new("RGB", (cell[0] * columns + gap, cell[1] * rows + gap), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    body, small = ImageFont.load_default(12), ImageFont.load_default(10)
    for place, number in enumerate(numbers):
        product = sample_product(seed, "train", number)
        text, mentions = describe(product, stream(seed, "train", number, "text"))
        told = list(dict.fromkeys(m.name for m in mentions if m.name in KINDS or m.name in ("lining", "trim", "belt")))
        left, top = gap + (place % columns) * cell[0], gap + (place // columns) * cell[1]
        for index in range(min(views, len(product.views))):
            view = render(product, index, size, seed, "train")
            frame = ImageDraw.Draw(view.image)
            x = left + index * (size + gap)
            for line, name in enumerate(told):
                box = view.boxes[name]
                if box:
                    frame.rectangle([round(v) for v in box], outline=(255, 255, 255))
                    frame.rectangle([round(v) + d for v, d in zip(box, (-1, -1, 1, 1), strict=True)], outline=GREEN)
                at = (x + (line % 3) * (size // 3), top + size + 2 + 11 * (line // 3))
                draw.text(at, name, fill=GREEN if box else GREY, font=small)
            sheet.paste(view.image, (x, top))
        for line, words_ in enumerate(textwrap.wrap(text, 118)[:4]):
            draw.text((left, top + size + 26 + 15 * line), words_, fill=INK, font=body)
    return sheet


if __name__ == "__main__":
    contact_sheet().save(Path(sys.argv[1]), quality=88)
