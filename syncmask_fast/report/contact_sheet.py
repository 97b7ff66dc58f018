"""Paint images with their texts, boxes and masks on one sheet: search results, `pack inspect`, README's masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from syncmask_fast.sources.inspect import SheetSample
from syncmask_fast.utils.errors import UserError

Box = tuple[float, float, float, float]

PAPER, INK, MUTED = (250, 249, 246), (29, 28, 26), (104, 101, 94)
ACCENT, SLATE, AMBER, BOX = (79, 70, 200), (84, 94, 112), (180, 83, 9), (245, 158, 11)
DETAIL_AREA = 0.2  # as `mask_quality.PLACE_AREA`, which cannot be imported without torch


@dataclass(frozen=True)
class Segment:
    """A run of text in one style.

    masked: struck out. visible: False is dotted below, for what the image does not show; None: names no attribute.
    score: 0 to 1 within its text, None where there is none.
    """

    text: str
    masked: bool = False
    visible: bool | None = None
    score: float | None = None


@dataclass(frozen=True)
class Frame:
    """An outlined box in pixels of the image. names: all that it shows. badge: center of its number.

    detail: a small box. Large ones (color, material, category) cover the whole garment.
    """

    names: str
    box: Box
    badge: tuple[float, float]
    detail: bool


@dataclass(frozen=True, eq=False)
class Cell:
    """One image of a sheet.

    image: uint8 [H, W, 3], or None where it cannot be read. title, note: above it, left and right.
    text, footer: below it. frames: details are outlined, and with `numbered` numbered, large boxes dashed.
    patches: bool [G * G], shaded with `tint`.
    """

    image: np.ndarray | None
    title: str = ""
    note: str = ""
    text: Sequence[Segment] = ()
    footer: str = ""
    frames: Sequence[Frame] = ()
    numbered: bool = False
    patches: np.ndarray | None = None
    tint: tuple[int, int, int] = SLATE


def frames(boxes: Sequence[tuple[str, Box]], width: int, height: int, radius: float = 1.0) -> list[Frame]:
    """Clip boxes to the image and merge those equal to a pixel; details come first.

    radius: of a number's disc, in pixels of the image. The discs of details are kept apart.
    """
    merged: dict[tuple[int, ...], tuple[list[str], Box]] = {}
    for name, box in boxes:
        x0, y0, x1, y1 = inside = tuple(np.clip(box, 0, (width, height) * 2).astype(float).tolist())
        if x1 > x0 and y1 > y0:
            names, _ = merged.setdefault(tuple(round(value) for value in inside), ([], inside))
            if name not in names:
                names.append(name)
    out: list[Frame] = []
    for names, (x0, y0, x1, y1) in merged.values():
        detail = (x1 - x0) * (y1 - y0) < DETAIL_AREA * width * height
        # The first corner whose disc meets no other, or else the one farthest from the others.
        taken = [frame.badge for frame in out if frame.detail]
        corners = np.clip([(x0, y0), (x1, y0), (x0, y1), (x1, y1)], radius, (width - radius, height - radius))
        gaps = [min([float(np.hypot(x - u, y - v)) for u, v in taken] + [2.1 * radius]) for x, y in corners]
        badge = tuple(corners[int(np.argmax(gaps))].tolist())
        out.append(Frame(", ".join(names), (x0, y0, x1, y1), badge, detail))
    return sorted(out, key=lambda frame: not frame.detail)


def marked(text: str, attributes: Sequence[dict]) -> list[Segment]:
    """Cut a text at the names of its attributes: `visible` tells those that have a box from those that have none."""
    out, position = [], 0
    for item in sorted(attributes, key=lambda item: item["span"]):
        begin, end = item["span"]
        if position <= begin < end <= len(text):
            out += [Segment(text[position:begin]), Segment(text[begin:end], visible=bool(item.get("box")))]
            position = end
    return [*out, Segment(text[position:])]


def contact_sheet(
    cells: Sequence[Cell], *, columns: int = 6, side: int = 176, lines: int = 4, heading: str = ""
) -> Image.Image:
    """Return the cells as one RGB image, in rows of `columns`. lines: most lines of a cell's text."""
    columns = max(1, min(columns, len(cells)))
    size, margin = max(11, side // 18), max(10, side // 10)
    line = round(1.55 * size)
    body, bold, large = font(size), font(size, bold=True), font(2 * size, bold=True)
    # 1. Wrap the texts: a row is as high as its longest one.
    texts = [_wrap(cell.text, body, side, lines) for cell in cells]
    footers = [_wrap([Segment(cell.footer)], body, side, lines) for cell in cells]
    counts = [len(text) + len(footer) for text, footer in zip(texts, footers, strict=True)]
    heights = [side + line * (1 + max(counts[i : i + columns])) for i in range(0, len(cells), columns)]
    top = margin + (3 * size if heading else 0)
    width = margin + columns * (side + margin)
    sheet = Image.new("RGB", (width, top + sum(heights) + margin * len(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        for shown in _wrap([Segment(heading)], large, width - 2 * margin, 1):
            _draw_line(draw, shown, (margin, margin - size // 2), large, INK, INK)
    # 2. Paint the cells.
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        x, y = margin + column * (side + margin), top + sum(heights[:row]) + margin * row
        for shown in _wrap([Segment(cell.title)], bold, side, 1):
            _draw_line(draw, shown, (x, y), bold, ACCENT if cell.tint == ACCENT else INK, INK)
        draw.text((x + side, y), cell.note, font=body, fill=MUTED, anchor="ra")
        y += line
        if cell.image is not None:
            image, corners = _paint(cell, side)
            sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2), corners)
        for number, shown in enumerate(texts[place] + footers[place]):
            ink = INK if number < len(texts[place]) else MUTED
            _draw_line(draw, shown, (x, y + side + size // 2 + number * line), body, ink, cell.tint)
    return sheet


def samples_sheet(samples: Sequence[SheetSample]) -> Image.Image:
    """Return the contact sheet of samples of shards: attributes marked in the text, their boxes framed."""
    cells = []
    for sample in samples:
        if sample.image is None:
            cells.append(Cell(None, sample.title, text=[Segment(sample.problem)]))
            continue
        height, width = sample.image.shape[:2]
        boxes = [(attribute["name"], attribute["box"]) for attribute in sample.attributes if attribute.get("box")]
        text = marked(sample.text, sample.attributes)
        cells.append(Cell(sample.image, sample.title, text=text, frames=frames(boxes, width, height)))
    return contact_sheet(cells, columns=8)


def _paint(cell: Cell, side: int) -> tuple[Image.Image, Image.Image]:
    """Return the image with its mask and boxes, at most `side` pixels long, and its rounded corners as a mask."""
    scale = side / max(cell.image.shape[:2])
    height, width = (max(1, round(scale * length)) for length in cell.image.shape[:2])
    image = Image.fromarray(cell.image).resize((width, height), Image.Resampling.LANCZOS)
    unit = side / 288
    if cell.patches is not None:
        shade = Image.new("L", image.size, 0)
        grid = int(np.sqrt(len(cell.patches)))
        for row, column in zip(*np.divmod(np.flatnonzero(cell.patches), grid), strict=True):
            x, y = column * width / grid, row * height / grid
            # One pixel of the image stays between two patches.
            ImageDraw.Draw(shade).rectangle((x, y, x + width / grid - 2, y + height / grid - 2), fill=200)
        image.paste(Image.new("RGB", image.size, cell.tint), mask=shade)
    draw = ImageDraw.Draw(image)
    for frame in cell.frames:
        x0, y0, x1, y1 = (scale * value for value in frame.box)
        if frame.detail:
            x0, y0, x1, y1 = max(x0, 1), max(y0, 1), max(min(x1, width - 2), x0 + 4), max(min(y1, height - 2), y0 + 4)
            draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(255, 255, 255), width=round(2 + 2 * unit))
            draw.rectangle((x0, y0, x1, y1), outline=BOX, width=max(1, round(2 * unit)))
        elif cell.numbered:
            for x in np.arange(x0, x1, 8 * unit):  # dashes along the four edges
                for y in (y0 + 1, y1 - 2):
                    draw.line([(x, y), (x + 4 * unit, y)], fill=BOX, width=2)
            for y in np.arange(y0, y1, 8 * unit):
                for x in (x0 + 1, x1 - 2):
                    draw.line([(x, y), (x, y + 4 * unit)], fill=BOX, width=2)
    for number, frame in enumerate((f for f in cell.frames if f.detail and cell.numbered), 1):
        x, y = (scale * value for value in frame.badge)
        draw.circle((x, y), 9 * unit, fill=BOX, outline=(255, 255, 255))
        draw.text((x, y), str(number), font=font(round(12 * unit), bold=True), fill=INK, anchor="mm")
    corners = Image.new("L", (2 * width, 2 * height), 0)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 2 * width - 1, 2 * height - 1), 20 * unit, fill=255)
    return image, corners.resize(image.size, Image.Resampling.LANCZOS)


def _wrap(text: Sequence[Segment], face, width: int, most: int) -> list[list[tuple[float, Segment]]]:
    """Break runs into at most `most` lines of `width` pixels; each entry of a line is (x, a run without spaces)."""
    # 1. Cut at spaces. A word may consist of runs of several styles; it stays together.
    words: list[list[Segment]] = [[]]
    for run in text:
        for place, part in enumerate(re.split(r"\s", run.text)):
            if place:
                words.append([])
            if part:
                kept = max(1, int(len(part) * min(1.0, 0.9 * width / max(face.getlength(part), 1.0))))
                words[-1].append(replace(run, text=part[:kept]))
    # 2. Fill the lines.
    lines: list[list[tuple[float, Segment]]] = []
    x = float(width)
    for word in filter(None, words):
        length = sum(face.getlength(run.text) for run in word)
        if not lines or x + length > width:
            lines.append([])
            x = 0.0
        for run in word:
            lines[-1].append((x, run))
            x += face.getlength(run.text)
        x += face.getlength(" ")
    if len(lines) > most:
        x, last = lines[most - 1][-1]
        lines[most - 1].append((min(x + face.getlength(last.text), width - face.getlength("…")), Segment("…")))
    return lines[:most]


def _draw_line(draw: ImageDraw.ImageDraw, line, at: tuple[float, float], face, ink, tint) -> None:
    """Draw a line of runs: masked ones struck on a pale `tint`, out-of-view ones dotted below."""
    x0, y = at
    ascent = face.getmetrics()[0]
    pale = tuple(round(0.82 * paper + 0.18 * color) for paper, color in zip(PAPER, tint, strict=True))
    for x, run in line:
        left, right = x0 + x, x0 + x + face.getlength(run.text)
        if run.masked:
            draw.rounded_rectangle((left - 2, y - 1, right + 2, y + 1.22 * ascent), radius=3, fill=pale)
        draw.text((left, y), run.text, font=face, fill=tint if run.masked else ink)
        if run.masked:
            draw.line((left - 1, y + 0.66 * ascent, right + 1, y + 0.66 * ascent), fill=tint, width=1 + ascent // 16)
        if run.visible is False:
            for dot in np.arange(left + 1, right, 4):
                draw.circle((dot, y + 1.2 * ascent), 1, fill=AMBER)


@lru_cache(maxsize=32)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans as matplotlib ships it: the same sheet on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size=size)


def save_sheet(sheet: Image.Image, path: Path, flag: str) -> None:
    """Write a sheet, and the folder that it is in. errors: UserError for a path that cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, quality=88)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be written ({error}). Name a .png or .jpg file.") from None
