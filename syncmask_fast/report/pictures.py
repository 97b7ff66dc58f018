"""Pictures of a report: small data URIs, score maps, and `mask_overlay`, one wide picture for a README."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from syncmask_fast.report.examples import (
    MaskExample,
    Segment,
    Which,
    frames,
    key_of,
    patch_count,
    segments,
    word_counts,
)

PAPER, INK, MUTED, LINE = (250, 249, 246), (29, 28, 26), (104, 101, 94), (226, 222, 213)
ACCENT, SLATE, AMBER, BOX = (79, 70, 200), (84, 94, 112), (180, 83, 9), (245, 158, 11)


def data_uri(image: np.ndarray, side: int, budget: int) -> str:
    """A JPEG data URI of `image` (uint8 [H, W, 3]), at most `side` pixels long, of about `budget` bytes.

    The quality falls from 90 to 30 until the file fits, so that even noise keeps a report small.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    for quality in (90, 80, 65, 45, 30):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
        if file.tell() <= budget:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def score_uri(scores: np.ndarray, grid: int) -> str:
    """A PNG data URI of patch scores (float [P]), a pixel a patch: the denser, the higher."""
    values = np.nan_to_num(scores.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    share = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    pixels = np.zeros((grid, grid, 4), dtype=np.uint8)
    pixels[..., :3] = ACCENT
    pixels[..., 3] = np.round(235 * share).reshape(grid, grid)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def mask_overlay(example: MaskExample, scale: int = 3) -> Image.Image:
    """One wide RGB picture: photo and boxes | random mask | synchronised mask, hidden words struck below.

    scale: the photo is drawn at scale * S pixels (at least 240), and type and lines grow with it.
    """
    side = max(240, scale * example.image.shape[0])
    unit = side / 288
    margin, gap = round(30 * unit), round(26 * unit)
    columns = [margin + index * (side + gap) for index in range(3)]
    title, body, small = _font(17 * unit, bold=True), _font(14.5 * unit), _font(12.5 * unit)
    width = columns[-1] + side + margin

    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    parts: dict[Which, list[Segment]] = {"random": segments(example, "random"), "sync": segments(example, "sync")}
    line_height = round(23 * unit)
    lines = {which: _layout(probe, parts[which], body, side) for which in parts}
    details, large = key_of(example)
    keys = [f"{number}  {name}" for number, name in enumerate(details, 1)] + ([f"–  {large}"] if large else [])
    keys = [line for key in keys for line in _break(probe, key, body, side)]
    heads = {which: _break(probe, _subtitle(example, which), small, side) for which in (None, "random", "sync")}
    longest = max(len(lines["random"]), len(lines["sync"]))
    rows = max(longest + 1, len(keys) + 2)
    top = margin + round((30 + 18 * max(map(len, heads.values()))) * unit)
    text_top = top + side + round(18 * unit)
    height = text_top + rows * line_height + round(12 * unit) + margin

    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    photo = Image.fromarray(example.image).resize((side, side), Image.Resampling.BICUBIC)
    for x, head, which in zip(columns, ("The photo", "Random mask", "SyncMask"), (None, "random", "sync"), strict=True):
        draw.text((x, margin), head, font=title, fill=ACCENT if which == "sync" else INK)
        for row, line in enumerate(heads[which]):
            draw.text((x, margin + round((23 + 17 * row) * unit)), line.lstrip(), font=small, fill=MUTED)
        panel = photo if which is None else _shade(photo, example, which)
        canvas.paste(_outline(panel, example, unit, numbers=which is None), (x, top))
    _draw_key(draw, example, (columns[0], text_top), line_height, body, small, keys)
    for x, which, colour in ((columns[1], "random", SLATE), (columns[2], "sync", ACCENT)):
        for row, line in enumerate(lines[which]):
            _draw_line(draw, line, (x, text_top + row * line_height), body, colour, unit)
        at = (x, text_top + longest * line_height + round(12 * unit))
        draw.text(at, tally(parts[which]), font=small, fill=MUTED)
    return canvas


def _subtitle(example: MaskExample, which: Which | None) -> str:
    if which is None:
        return f"{example.view} view" if example.view else "as the model gets it"
    return patch_count(example, which)


def tally(parts: list[Segment]) -> str:
    """How many words are hidden and how many of those name something that the view shows, or does not."""
    hidden, seen, away = word_counts(parts)
    text = f"{hidden} hidden word{'' if hidden == 1 else 's'}"
    return text + (f": {seen} can be seen here, {away} cannot" if seen or away else "")


def _shade(photo: Image.Image, example: MaskExample, which: Which) -> Image.Image:
    """The photo with the masked patches tinted, a hair of the photo left between patches."""
    colour = SLATE if which == "random" else ACCENT
    side = photo.width
    tint = Image.new("L", photo.size, 0)
    draw = ImageDraw.Draw(tint)
    edges = np.round(np.arange(example.grid + 1) * side / example.grid).astype(int)
    for patch in np.flatnonzero(example.patches(which)):
        row, column = divmod(int(patch), example.grid)
        draw.rectangle((edges[column], edges[row], edges[column + 1] - 2, edges[row + 1] - 2), fill=200)
    out = photo.copy()
    out.paste(Image.new("RGB", photo.size, colour), mask=tint)
    return out


def _outline(panel: Image.Image, example: MaskExample, unit: float, numbers: bool) -> Image.Image:
    """The panel with the ground-truth boxes (and their numbers), corners rounded into the paper."""
    out = panel.copy()
    draw = ImageDraw.Draw(out)
    ratio = out.width / example.image.shape[0]
    font, reach = _font(12 * unit, bold=True), round(9 * unit)
    outlined = frames(example, radius=(reach + 1) / ratio)
    details = [frame for frame in outlined if frame.detail]
    for frame in outlined if numbers else ():
        if not frame.detail:
            _dashes(draw, [value * ratio for value in frame.box], unit)
    for frame in details:
        x0, y0, x1, y1 = (value * ratio for value in frame.box)
        x1, y1 = max(min(x1, out.width - 1), x0 + 2), max(min(y1, out.width - 1), y0 + 2)
        draw.rectangle((x0, y0, x1, y1), outline=(255, 255, 255), width=round(4 * unit))
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=BOX, width=round(2 * unit))
    for number, frame in enumerate(details if numbers else (), 1):
        x, y = (value * ratio for value in frame.badge)
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=BOX, outline=(255, 255, 255))
        draw.text((x, y), str(number), font=font, fill=INK, anchor="mm")
    corner = Image.new("L", (out.width * 2, out.height * 2), 0)
    ImageDraw.Draw(corner).rounded_rectangle((0, 0, corner.width - 1, corner.height - 1), radius=20 * unit, fill=255)
    return Image.composite(out, Image.new("RGB", out.size, PAPER), corner.resize(out.size, Image.Resampling.LANCZOS))


def _dashes(draw: ImageDraw.ImageDraw, box: list[float], unit: float) -> None:
    """A dashed rectangle: what the text names, but too large to be a detail."""
    x0, y0, x1, y1 = (np.clip(value, 1, draw.im.size[0] - 2) for value in box)
    step, width = 8 * unit, round(1.6 * unit)
    for x in np.arange(x0, x1, step):
        for y in (y0, y1):
            draw.line((x, y, min(x + step * 0.55, x1), y), fill=BOX, width=width)
    for y in np.arange(y0, y1, step):
        for x in (x0, x1):
            draw.line((x, y, x, min(y + step * 0.55, y1)), fill=BOX, width=width)


def _draw_key(draw, example, at, line_height, body, small, keys) -> None:
    """Under the photo: what the numbered boxes are, and how hidden and out-of-view words are drawn."""
    x, y = at
    for row, key in enumerate(keys):
        draw.text((x, y + row * line_height), key, font=body, fill=INK)
    y += len(keys) * line_height + line_height // 3
    unit = line_height / 23
    legend = [Segment("hidden word", True, None, None)]
    if any(word.visible is False for word in example.words):
        legend.append(Segment("not in this view", False, False, None))
    for row, part in enumerate(legend):
        _draw_line(draw, [(0.0, part)], (x, y + row * line_height), small, SLATE, unit)


def _break(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> list[str]:
    """`text` in lines no wider than `width`, broken at spaces, continued with an indent."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(f"    {word}")
        else:
            lines[-1] = longer
    return lines


def _layout(draw: ImageDraw.ImageDraw, parts: Iterable[Segment], font, width: int) -> list[list[tuple[float, Segment]]]:
    """Styled runs in lines no wider than `width`; every entry is (x, a run without spaces)."""
    lines: list[list[tuple[float, Segment]]] = [[]]
    x, space = 0.0, draw.textlength(" ", font=font)
    for word in _words(parts):
        length = sum(draw.textlength(part.text, font=font) for part in word)
        if lines[-1] and x + length > width:
            lines.append([])
            x = 0.0
        for part in word:
            lines[-1].append((x, part))
            x += draw.textlength(part.text, font=font)
        x += space
    return lines


def _words(parts: Iterable[Segment]) -> list[list[Segment]]:
    """Styled runs regrouped by white space: each word is the list of its runs."""
    words: list[list[Segment]] = []
    joined = False
    for part in parts:
        pieces = part.text.split()
        for index, piece in enumerate(pieces):
            touches = joined and index == 0 and not part.text[0].isspace()
            cut = Segment(piece, part.masked, part.visible, part.score)
            if touches:
                words[-1].append(cut)
            else:
                words.append([cut])
        if part.text:
            joined = not part.text[-1].isspace() and (bool(pieces) or joined)
    return words


def _draw_line(draw, line, at, font, colour, unit) -> None:
    """Draws a line of runs: hidden ones struck on a tint of `colour`, out-of-view ones dotted below."""
    x0, y = at
    ascent = font.getmetrics()[0]
    tint = tuple(round(0.82 * paper + 0.18 * ink) for paper, ink in zip(PAPER, colour, strict=True))
    for x, part in line:
        left, right = x0 + x, x0 + x + draw.textlength(part.text, font=font)
        if part.masked:
            pad = 2 * unit
            draw.rounded_rectangle(
                (left - pad, y - pad / 2, right + pad, y + ascent * 1.22), radius=3 * unit, fill=tint
            )
        draw.text((left, y), part.text, font=font, fill=colour if part.masked else INK)
        if part.masked:
            middle = y + ascent * 0.66
            draw.line((left - unit, middle, right + unit, middle), fill=colour, width=max(1, round(1.6 * unit)))
        if part.visible is False:
            step, dot = 4 * unit, 0.9 * unit
            for px in np.arange(left + dot, right, step):
                base = y + ascent * 1.2
                draw.ellipse((px - dot, base - dot, px + dot, base + dot), fill=AMBER)


@lru_cache(maxsize=32)
def _font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same picture on every machine."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size=round(size))
