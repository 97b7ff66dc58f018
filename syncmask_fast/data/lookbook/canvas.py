"""The canvas of one picture: what is painted, and beside it which thing is on top at every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from .fabric import RGB

Box = list[float]
BANDS = ("behind", "body", "front")


@dataclass
class Canvas:
    """Square images of size * factor pixels. `paint` RGB: colours without light. `seen` L: number of the
    thing on top, 0 for none. `bands` L: outlines of what lies behind the body, of the body and of what lies
    on it (for light and shadow). `props` L: hangers and the like. `lines` L: creases (128: none, darker or
    lighter)."""

    size: int
    factor: int
    ground: RGB
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = self.size * self.factor
        self.paint = Image.new("RGB", (self.n, self.n), self.ground)
        self.seen, self.props = self.blank(), None
        self.lines = self.blank(128)
        self.bands = {band: self.blank() for band in BANDS}

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
        """Paints polygons (in pixels) as the thing `name`, in a colour or with a picture of the canvas's
        size. `on`: only where one of these numbers is on top. `band`: for light and shadow."""
        flat = [polygon.ravel().tolist() for polygon in polygons]
        number = self.number(name)
        if band:
            draw = ImageDraw.Draw(self.bands[band])
            for points in flat:
                draw.polygon(points, fill=255)
        if on is None and not isinstance(fill, Image.Image):
            paint, seen = ImageDraw.Draw(self.paint), ImageDraw.Draw(self.seen)
            for points in flat:
                paint.polygon(points, fill=fill)
                seen.polygon(points, fill=number)
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
        """A line on `paint` alone."""
        ImageDraw.Draw(self.paint).line([tuple(p) for p in points.tolist()], fill=fill, width=width)

    def cover(self) -> Image.Image:
        """255 where anything was painted."""
        cover = Image.fromarray((np.asarray(self.seen) > 0).view(np.uint8) * np.uint8(255))
        return ImageChops.lighter(cover, self.props) if self.props else cover


def where(seen: Image.Image, numbers: set[int]) -> Image.Image:
    """L, 255 where `seen` is one of `numbers`."""
    cells = np.asarray(seen)
    found = np.zeros(cells.shape, bool)
    for number in numbers:
        found |= cells == number
    return Image.fromarray(found.view(np.uint8) * np.uint8(255))


class Regions:
    """Which pixels of a map of numbers (L) carry which number: how many, and the box around them."""

    def __init__(self, seen: Image.Image) -> None:
        cells = np.asarray(seen)
        self._counts = seen.histogram()
        self._boxes: dict[int, tuple[int, int, int, int]] = {}
        for number in range(1, 256):
            if self._counts[number]:
                own = (cells == number).view(np.uint8)
                self._boxes[number] = Image.frombuffer("L", seen.size, own, "raw", "L", 0, 1).getbbox()  # type: ignore[assignment]

    def count(self, numbers: set[int]) -> int:
        return sum(self._counts[number] for number in numbers)

    def box(self, numbers: set[int], factor: int) -> Box | None:
        """The tight box around all pixels that carry one of `numbers`, in pixels of the reduced picture."""
        found = [self._boxes[number] for number in numbers if number in self._boxes]
        if not found:
            return None
        x0, y0, x1, y1 = zip(*found, strict=True)
        return [min(x0) / factor, min(y0) / factor, max(x1) / factor, max(y1) / factor]
