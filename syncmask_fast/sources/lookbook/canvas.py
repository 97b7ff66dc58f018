"""The canvas of one image: the paint, and which thing is on top at every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from syncmask_fast.sources.lookbook.fabric import RGB

Box = list[float]
BANDS = ("behind", "body", "front")


@dataclass
class Canvas:
    """Square images of size * factor pixels.

    paint:   RGB, colors without light.
    seen:    L, number of the thing on top, 0 for none.
    bands:   L, outlines behind the body, of the body and in front of it, for light and shadow.
    details: L, where details are; None without any. props: L, hangers. lines: L, creases; 128 is none.
    """

    size: int
    factor: int
    ground: RGB
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = self.size * self.factor
        self.paint = Image.new("RGB", (self.n, self.n), self.ground)
        self.seen, self.props, self.details = self.blank(), None, None
        self.lines = self.blank(128)
        self.bands = {band: self.blank() for band in BANDS}
        self.on_paint, self.on_seen, self.on_lines = map(ImageDraw.Draw, (self.paint, self.seen, self.lines))

    def blank(self, value: int = 0) -> Image.Image:
        return Image.new("L", (self.n, self.n), value)

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    def numbers_of(self, prefix: str) -> set[int]:
        return {number for name, number in self.numbers.items() if name.startswith(prefix)}

    def polygons(
        self,
        name: str,
        polygons: list[np.ndarray],
        fill: RGB | Image.Image,
        *,
        on: set[int] | None = None,
        band: str | None = None,
    ) -> None:
        """Paint polygons (in pixels) as the thing `name`, in a color or with an image of the canvas's size.

        on: only where one of these numbers is on top. band: for light and shadow.
        """
        flat = [polygon.ravel().tolist() for polygon in polygons]
        number = self.number(name)
        if band:
            draw = ImageDraw.Draw(self.bands[band])
            for points in flat:
                draw.polygon(points, fill=255)
        if on is None and not isinstance(fill, Image.Image):
            for points in flat:
                self.on_paint.polygon(points, fill=fill)
                self.on_seen.polygon(points, fill=number)
            return
        every = np.concatenate(polygons)
        x0, y0 = (max(0, math.floor(v)) for v in every.min(axis=0))
        x1, y1 = (min(self.n, math.ceil(v) + 1) for v in every.max(axis=0))
        if x1 <= x0 or y1 <= y0:
            return
        mask = Image.new("L", (x1 - x0, y1 - y0), 0)
        draw = ImageDraw.Draw(mask)
        for polygon in polygons:
            draw.polygon((polygon - [x0, y0]).ravel().tolist(), fill=255)
        if on is not None:
            mask = ImageChops.multiply(mask, where(self.seen.crop((x0, y0, x1, y1)), on))
        box = (x0, y0, x1, y1)
        self.paint.paste(fill.crop(box) if isinstance(fill, Image.Image) else fill, box, mask)
        self.seen.paste(number, box, mask)

    def stroke(self, points: np.ndarray, fill: RGB, width: int) -> None:
        """Draw a line on `paint` only."""
        self.on_paint.line([tuple(p) for p in points.tolist()], fill=fill, width=width)

    def cover(self) -> Image.Image:
        """Return L, 255 where anything was painted."""
        found = (np.asarray(self.seen) > 0).view(np.uint8)
        cover = as_image(np.negative(found, out=found))
        return ImageChops.lighter(cover, self.props) if self.props else cover


def where(seen: Image.Image, numbers: set[int]) -> Image.Image:
    """Return L, 255 where `seen` is one of `numbers`."""
    found = among(np.asarray(seen), numbers).view(np.uint8)
    return as_image(np.negative(found, out=found))


def among(cells: np.ndarray, numbers: set[int]) -> np.ndarray:
    """Return bool: where `cells` is one of `numbers`."""
    if not numbers:
        return np.zeros(cells.shape, bool)
    first, *others = numbers
    found = cells == first
    for number in others:
        found |= cells == number
    return found


def as_image(cells: np.ndarray) -> Image.Image:
    """Return the array (uint8 or bool) as an L image, without a copy."""
    return Image.frombuffer("L", cells.shape[::-1], cells, "raw", "L", 0, 1)


class Regions:
    """A map of numbers (L): the box around the pixels that carry given numbers, and how many there are."""

    def __init__(self, seen: Image.Image, within: tuple[int, int, int, int] | None = None) -> None:
        """Read the map, or only the part `within`."""
        self.all = within or seen.getbbox()
        self._at = self.all or (0, 0, 1, 1)
        self._cells = np.asarray(seen.crop(self._at))

    def box(self, numbers: set[int], factor: int) -> tuple[Box | None, int]:
        """Return the tight box, in pixels of the reduced image, around the pixels with `numbers`, and their count."""
        if not numbers:
            return None, 0
        own = among(self._cells, numbers)
        count = int(np.count_nonzero(own))
        found = as_image(own).getbbox() if count else None
        if not found:
            return None, 0
        left, top = self._at[:2]
        x0, y0, x1, y1 = found
        return [(left + x0) / factor, (top + y0) / factor, (left + x1) / factor, (top + y1) / factor], count
