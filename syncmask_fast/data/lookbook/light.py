"""From flat paint to a photograph: volume, creases, the grain of the cloth, gloss, shadows and the
background."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
    draw = ImageDraw.Draw(canvas.lines)
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


def photograph(
    canvas: Canvas, base: Image.Image, colour: RGB, material: str, close: bool, g: np.random.Generator
) -> Image.Image:
    """The finished RGB picture of `canvas.size`. `base`: what was on top before the details were laid on;
    `colour`: the garment's."""
    size, factor = canvas.size, canvas.factor
    pixel = size / 96
    unit = pixel * (1.7 if close else 1.0)
    angle = g.uniform(0, 2 * math.pi)
    light = np.array([math.cos(angle), math.sin(angle) * 0.6 - 0.4])

    cover = canvas.cover()  # CMYK below is only a way to handle four masks at once
    masks = Image.merge("CMYK", [*(canvas.bands[band] for band in BANDS), cover]).reduce(factor)
    sharp, narrow, wide = (
        _floats(masks),
        _floats(_blurred(masks, 1.6 * unit, 1)),
        _floats(_blurred(masks, 4.0 * unit, 2)),
    )
    shade = _volume(sharp, narrow, wide, light, unit, GLOSS.get(material, 0.0))
    lines = _floats(canvas.lines.reduce(factor).filter(ImageFilter.BoxBlur(0.9 * unit)))
    shade *= 1 + (lines - 128 / 255) * 1.7

    top, left = (int(v) for v in g.integers(0, size, 2))
    grain = texture(material, size, close)[top : top + size, left : left + size] - 1
    details = Image.fromarray(
        (np.asarray(canvas.seen) != np.asarray(base)).view(np.uint8) * np.uint8(255)
    ).reduce(factor)
    shade *= 1 + grain * (1 - 0.67 * _floats(details))  # prints and hardware take little of the cloth's grain
    shade *= np.float32(g.uniform(0.94, 1.10))
    picture = np.asarray(canvas.paint.reduce(factor), np.float32) * shade[..., None]
    if material in GLOSS:
        picture += (GLOSS[material] * 150 * np.clip(shade - 1.06, 0, 0.6))[..., None]

    behind = background(size, colour, g)
    strength, reach, soft = g.uniform(0.22, 0.5), g.uniform(2.0, 6.0), g.uniform(1.0, 3.5)
    dx, dy = (int(round(v)) for v in -light * reach * pixel + np.array([0.0, 1.2 * pixel]))
    cast = _floats(_blurred(masks.getchannel("K"), soft * pixel, 2))
    behind *= ((1 - strength * shifted(cast, dx, dy)) * (1 - 0.22 * narrow[..., 3]))[..., None]
    alpha = sharp[..., 3:]
    picture = behind + (picture - behind) * alpha
    warm = g.normal(0, 0.018)
    picture *= np.array([1 + warm, 1.0, 1 - warm], np.float32)
    picture += g.standard_normal((size, size, 1), np.float32) * np.float32(1.6)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _volume(
    sharp: np.ndarray, narrow: np.ndarray, wide: np.ndarray, light: np.ndarray, unit: float, gloss: float
) -> np.ndarray:
    """Brightness [size, size] of a garment whose bands (the first channels) swell towards their middle
    and shade one another."""
    sx, sy = (int(round(v * 5 * unit)) for v in light)
    relief = wide - shifted(wide, -sx, -sy)
    own = (
        0.80
        + 0.11 * np.maximum(2 * narrow - 1, 0)
        + 0.10 * np.maximum(2 * wide - 1, 0)
        + (0.17 + 0.10 * gloss) * relief
    )
    cast = shifted(narrow, round(0.8 * unit), max(1, round(1.2 * unit)))
    shade = np.ones(sharp.shape[:2], np.float32)
    for i in range(len(BANDS)):
        m = sharp[..., i]
        shade *= 1 - 0.30 * cast[..., i] * (1 - m)
        shade += (own[..., i] - shade) * m
    return shade


def _blurred(image: Image.Image, radius: float, times: int) -> Image.Image:
    for _ in range(times):
        image = image.filter(ImageFilter.BoxBlur(radius * 1.1))
    return image


def _floats(image: Image.Image) -> np.ndarray:
    """float32 from 0 to 1."""
    return np.asarray(image, np.float32) * np.float32(1 / 255)


def shifted(values: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The array [h, w, ...] moved by whole pixels; its rim repeats."""
    h, w = values.shape[:2]
    padded = np.pad(
        values,
        ((max(0, dy), max(0, -dy)), (max(0, dx), max(0, -dx)), *((0, 0),) * (values.ndim - 2)),
        mode="edge",
    )
    return padded[max(0, -dy) : max(0, -dy) + h, max(0, -dx) : max(0, -dx) + w]
