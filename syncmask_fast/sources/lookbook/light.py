"""From flat paint to a photograph: volume, creases, the grain of the cloth, gloss, shadows and the
background."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageFilter

from .backgrounds import background
from .canvas import BANDS, Canvas
from .fabric import GLOSS, RGB, texture
from .geometry import Affine, outline

SUPPLE = dict(satin=7, velvet=6, cotton=5, linen=6, wool=4, fleece=3)  # creases; 4 for other cloth


def crease(
    canvas: Canvas,
    place: Affine,
    bounds: tuple[float, float, float, float],
    material: str,
    unit: float,
    g: np.random.Generator,
) -> None:
    """Draws a few soft creases in the garment's `bounds` (its own units, `place` maps them to pixels)."""
    draw = canvas.on_lines
    x0, y0, x1, y1 = bounds
    count = SUPPLE.get(material, 4)
    for x, y, dx, bend, dy, wide, light, dark in g.uniform(size=(count, 8)).tolist():
        x, y, dx, dy = (
            x0 + x * (x1 - x0),
            y0 + (0.15 + 0.85 * y) * (y1 - y0),
            0.24 * (dx - 0.5),
            (0.10 + 0.22 * dy) * (y1 - y0),
        )
        points = place(outline((x, y), (x + dx * 2 + 0.1 * (bend - 0.5), y + dy * 0.5, x + dx, y + dy)))
        width = max(1, round((1.2 + 1.4 * wide) * unit * canvas.factor))
        draw.line([(a + width, b) for a, b in points.tolist()], fill=round(142 + 22 * light), width=width)
        draw.line([tuple(p) for p in points.tolist()], fill=round(84 + 26 * dark), width=width)


def photograph(canvas: Canvas, colour: RGB, material: str, close: bool, g: np.random.Generator) -> Image.Image:
    """The finished RGB picture of `canvas.size`. `colour`: the garment's."""
    size, factor = canvas.size, canvas.factor
    pixel = size / 96
    unit = pixel * (1.7 if close else 1.0)
    angle = g.uniform(0, 2 * math.pi)
    light = np.array([math.cos(angle), math.sin(angle) * 0.6 - 0.4])

    # CMYK is only a way to handle four masks at once
    masks = Image.merge("CMYK", [*(canvas.bands[band] for band in BANDS), canvas.cover()]).reduce(factor)
    soft = masks.filter(ImageFilter.BoxBlur(1.76 * unit))
    softer = soft.filter(ImageFilter.BoxBlur(6.0 * unit))
    sharp, narrow, wide = _floats(masks), _floats(soft), _floats(softer)
    shade = _volume(sharp, narrow, wide, light, unit, GLOSS.get(material, 0.0))
    lines = _floats(canvas.lines.reduce(factor).filter(ImageFilter.BoxBlur(0.9 * unit)))
    lines *= 1.7
    lines += 1 - 128 / 255 * 1.7
    shade *= lines

    top, left = (int(v) for v in g.integers(0, size, 2))
    grain = texture(material, size, close)[top : top + size, left : left + size] - 1
    if canvas.details:  # prints and hardware take little of the cloth's grain
        details = _floats(canvas.details.reduce(factor))
        details *= -0.67
        details += 1
        grain *= details
    grain += 1
    shade *= grain
    shade *= np.float32(g.uniform(0.94, 1.10))
    picture = _planes(canvas.paint.reduce(factor)) * shade
    if material in GLOSS:
        picture += GLOSS[material] * 150 * np.clip(shade - 1.06, 0, 0.6)

    behind = background(size, colour, g)
    strength, reach, spread = g.uniform(0.22, 0.5), g.uniform(2.0, 6.0), g.uniform(1.0, 3.5)
    dx, dy = (int(round(v)) for v in -light * reach * pixel + np.array([0.0, 1.2 * pixel]))
    blur = ImageFilter.BoxBlur(spread * 1.1 * pixel)
    ground = shifted(_floats(masks.getchannel("K").filter(blur).filter(blur)), dx, dy)
    ground *= -strength
    ground += 1
    ground *= 1 - 0.22 * narrow[3]
    behind *= ground
    picture -= behind
    picture *= sharp[3]
    picture += behind
    warm = g.normal(0, 0.018)
    picture[0] *= 1 + warm
    picture[2] *= 1 - warm
    top, left = (int(v) for v in g.integers(0, size, 2))
    picture += _sensor(size)[top : top + size, left : left + size]
    np.clip(picture, 0, 255, out=picture)
    return Image.merge("RGB", [Image.fromarray(plane) for plane in picture.astype(np.uint8)])


@functools.lru_cache(maxsize=2)
def _sensor(size: int) -> np.ndarray:
    """The noise of a camera: float32 [2 * size, 2 * size]."""
    g = np.random.Generator(np.random.Philox(1))
    return g.standard_normal((2 * size, 2 * size), np.float32) * np.float32(1.6)


def _volume(
    sharp: np.ndarray, narrow: np.ndarray, wide: np.ndarray, light: np.ndarray, unit: float, gloss: float
) -> np.ndarray:
    """Brightness [size, size] of a garment whose bands (the first planes) swell towards their middle and
    shade one another."""
    sx, sy = (int(round(v * 5 * unit)) for v in light)
    shade = np.ones(sharp.shape[1:], np.float32)
    for i in range(len(BANDS)):
        m = sharp[i]
        if not m.any():
            continue
        own = shifted(wide[i], -sx, -sy)
        np.subtract(wide[i], own, out=own)
        own *= 0.17 + 0.10 * gloss
        own += 0.80
        for blurred, swell in ((narrow[i], 0.22), (wide[i], 0.20)):
            rise = blurred - 0.5
            np.maximum(rise, 0, out=rise)
            rise *= swell
            own += rise
        cast = shifted(narrow[i], round(0.8 * unit), max(1, round(1.2 * unit)))
        cast *= 1 - m
        cast *= -0.30
        cast += 1
        shade *= cast
        own -= shade
        own *= m
        shade += own
    return shade


def _planes(image: Image.Image) -> np.ndarray:
    """float32 [channels, h, w], 0 to 255."""
    return np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")


def _floats(image: Image.Image) -> np.ndarray:
    """float32 from 0 to 1: [h, w], or [channels, h, w]."""
    values = _planes(image) if len(image.getbands()) > 1 else np.asarray(image, np.float32)
    values *= np.float32(1 / 255)
    return values


def shifted(values: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """A copy of the array [h, w] moved by whole pixels; its rim repeats."""
    h, w = values.shape
    return values.take(_from(h, dy), axis=0).take(_from(w, dx), axis=1)


@functools.lru_cache(maxsize=256)
def _from(n: int, d: int) -> np.ndarray:
    return np.clip(np.arange(n) - d, 0, n - 1)
