"""From flat paint to a photograph: backgrounds, volume, creases, the grain of the cloth, gloss and shadows."""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np
from PIL import Image, ImageFilter

from syncmask_fast.sources.lookbook.canvas import BANDS, Canvas
from syncmask_fast.sources.lookbook.fabric import GLOSS, RGB, distance, noise, texture
from syncmask_fast.sources.lookbook.geometry import Affine, outline


@functools.lru_cache(maxsize=16)
def _surface(kind: str, size: int) -> np.ndarray:
    """Return float32 [3, 2 * size, 2 * size]: a plank floor, a marble top, a plastered wall or a cloth."""
    g = np.random.Generator(np.random.Philox(zlib.crc32(kind.encode())))
    n, unit = 2 * size, size / 96
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / unit
    if kind == "wood":
        plank = (x // 27).astype(int)
        tone = g.uniform(-16, 16, plank.max() + 1)[plank]
        shift = g.uniform(0, 90, plank.max() + 1)[plank]
        low, high = noise(g, n, n, 7 * unit), noise(g, n, n, 0.5 * unit)
        grain = np.sin((x % 27) * 0.55 + 2.2 * low + np.sin((y + shift) * 0.06) * 2.4)
        value = tone + 8 * grain + 3 * high - 34 * ((x % 27) < 0.9) - 26 * (((y + shift) % 90) < 0.8)
        return _toned(kind, np.array([1, 0.9, 0.78])[:, None, None] * value)
    if kind == "marble":
        low, mid = noise(g, n, n, 14 * unit), noise(g, n, n, 4 * unit)
        vein = np.exp(-np.abs(np.sin(0.04 * (x + 0.7 * y) + 1.0 * low + 0.25 * mid)) * 16) * np.clip(
            0.55 + 0.5 * noise(g, n, n, 8 * unit), 0.05, 1
        )
        return _toned(kind, 4 * mid + 3 * low - 34 * vein)
    if kind == "plaster":
        return _toned(kind, 7 * noise(g, n, n, 9 * unit) + 4 * noise(g, n, n, 1.3 * unit))
    value = (
        8 * np.sin(2 * math.pi * x / 2.6) * np.sin(2 * math.pi * y / 2.6)
        + 6 * noise(g, n, n, 8 * unit)
        + 3 * noise(g, n, n, 0.5 * unit)
    )
    return _toned(kind, value)


def _toned(kind: str, value: np.ndarray) -> np.ndarray:
    return (np.array(SURFACES[kind], np.float32)[:, None, None] + value).astype(np.float32)


PASTELS: tuple[RGB, ...] = (
    (250, 224, 222),
    (222, 236, 248),
    (226, 244, 228),
    (250, 240, 208),
    (236, 226, 248),
    (250, 228, 204),
    (212, 234, 232),
)
MUTED: tuple[RGB, ...] = (
    (226, 206, 198),
    (198, 210, 220),
    (204, 214, 202),
    (232, 222, 196),
    (214, 208, 222),
    (222, 204, 206),
    (190, 200, 204),
)


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return y, x


SURFACES = dict(wood=(200, 158, 120), marble=(232, 231, 232), plaster=(190, 186, 180), cloth=(206, 196, 180))
BACKGROUNDS = ("white", "grey", "pastel", "gradient", "gradient", "room", "room", "wood", "marble", "plaster", "cloth")


def background(size: int, main: RGB, g: np.random.Generator) -> np.ndarray:
    """Return a background that contrasts with a garment of color `main`: float32 [3, size, size], 0 to 255."""
    y, x = _grid(size)
    for _ in range(12):
        kind = BACKGROUNDS[int(g.integers(len(BACKGROUNDS)))]
        tones = MUTED if kind == "gradient" or (kind == "room" and g.random() < 0.4) else PASTELS
        base = (
            SURFACES.get(kind)
            or {"white": (246, 246, 246), "grey": (196, 198, 202)}.get(kind)
            or tones[int(g.integers(len(tones)))]
        )
        if distance(base, main) > 26:
            break
    tone = np.array(base, np.float32)[:, None, None]
    if kind in SURFACES:
        surface = _surface(kind, size)
        top, left = (int(v) for v in g.integers(0, size, 2))
        picture = surface[:, top : top + size, left : left + size]
        picture = picture[..., ::-1] if g.random() < 0.5 else picture
        picture = picture.swapaxes(1, 2) if kind == "wood" and g.random() < 0.5 else picture
        tint = g.uniform(0.82, 1.06) * (1 + g.uniform(-0.05, 0.05, (3, 1, 1)))
        picture = np.multiply(picture, tint.astype(np.float32), order="C")
    elif kind == "room":
        floor = (
            tone * 0.82
            if g.random() < 0.5
            else np.array((196, 170, 140), np.float32)[:, None, None] * np.float32(g.uniform(0.8, 1.1))
        )
        line = g.uniform(0.62, 0.9) + g.uniform(-0.05, 0.05) * x - y
        share = np.clip(0.5 - line * (size / 2.0), 0, 1)
        wall = (1.02 - 0.16 * np.abs(x - g.uniform(0.2, 0.8))) * (1 - 0.10 * np.exp(-np.abs(line) * 22)) * (1 - share)
        share *= 0.75 + 0.25 * y
        picture = wall * tone
        picture += share * floor
    else:
        other = (
            np.array(PASTELS[int(g.integers(len(PASTELS)))], np.float32)[:, None, None]
            if kind == "gradient"
            else tone * 0.93
        )
        angle = g.uniform(0, 2 * math.pi)
        ramp = np.clip(0.5 + (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle), 0, 1)
        cx, cy = g.uniform(0.3, 0.7, 2)
        fall = 1.02 - g.uniform(0.05, 0.28) * ((x - cx) ** 2 + (y - cy) ** 2)
        picture = ramp * (other - tone)
        picture += tone
        picture *= fall
    if g.random() < 0.22:  # light through a window
        slope, at, wide = g.uniform(-1.2, 1.2), g.uniform(-0.2, 1.0), g.uniform(0.15, 0.35)
        across = x + slope * y - at
        light = np.clip(np.minimum(across, wide - across) * 14 + 0.5, 0, 1) * np.clip(
            np.abs(((y * 2.2 + slope) % 1.0) - 0.06) * 20, 0, 1
        )
        picture *= 0.93 + 0.13 * light
    return np.clip(picture, 0, 255, out=picture)


SUPPLE = dict(satin=7, velvet=6, cotton=5, linen=6, wool=4, fleece=3)  # creases; 4 for other cloth


def crease(
    canvas: Canvas,
    place: Affine,
    bounds: tuple[float, float, float, float],
    material: str,
    unit: float,
    g: np.random.Generator,
) -> None:
    """Draw a few soft creases in the garment's `bounds` (its own units, `place` maps them to pixels)."""
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


def photograph(canvas: Canvas, color: RGB, material: str, close: bool, g: np.random.Generator) -> Image.Image:
    """Return the finished RGB image of `canvas.size`. `color`: the garment's."""
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

    behind = background(size, color, g)
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
    """Return the noise of a camera: float32 [2 * size, 2 * size]."""
    g = np.random.Generator(np.random.Philox(1))
    return g.standard_normal((2 * size, 2 * size), np.float32) * np.float32(1.6)


def _volume(
    sharp: np.ndarray, narrow: np.ndarray, wide: np.ndarray, light: np.ndarray, unit: float, gloss: float
) -> np.ndarray:
    """Return the brightness [size, size] of a garment whose bands swell towards their middle and shade one another."""
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
    """Return float32 [channels, h, w], 0 to 255."""
    return np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")


def _floats(image: Image.Image) -> np.ndarray:
    """Return float32 from 0 to 1: [h, w], or [channels, h, w]."""
    values = _planes(image) if len(image.getbands()) > 1 else np.asarray(image, np.float32)
    values *= np.float32(1 / 255)
    return values


def shifted(values: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Return a copy of the array [h, w] moved by whole pixels; its rim repeats."""
    h, w = values.shape
    return values.take(_from(h, dy), axis=0).take(_from(w, dx), axis=1)


@functools.lru_cache(maxsize=256)
def _from(n: int, d: int) -> np.ndarray:
    return np.clip(np.arange(n) - d, 0, n - 1)
