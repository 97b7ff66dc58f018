"""Colors, patterns and fabric textures. All sizes scale with the image: `unit` is image size / 96."""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np
from PIL import Image, ImageDraw

from syncmask_fast.sources.lookbook.geometry import Affine

RGB = tuple[int, int, int]


COLORS: dict[str, RGB] = {
    "white": (244, 242, 238),
    "black": (34, 34, 38),
    "grey": (142, 144, 148),
    "red": (206, 34, 42),
    "burgundy": (112, 22, 48),
    "orange": (240, 126, 30),
    "yellow": (248, 212, 52),
    "green": (36, 136, 70),
    "mint": (160, 224, 192),
    "turquoise": (32, 178, 182),
    "blue": (44, 98, 208),
    "navy": (28, 38, 92),
    "purple": (116, 52, 156),
    "lilac": (192, 162, 224),
    "pink": (244, 140, 178),
    "brown": (116, 72, 42),
    "beige": (216, 192, 154),
    "olive": (112, 114, 48),
    "silver": (196, 200, 208),
    "gold": (214, 172, 62),
}
CLOTH = tuple(name for name in COLORS if name not in ("silver", "gold"))
METALS = ("silver", "gold")


def _lab(rgb: RGB) -> np.ndarray:
    c = np.array(rgb) / 255.0
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ c
        / np.array([0.9505, 1.0, 1.089])
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@functools.lru_cache(maxsize=4096)
def distance(a: RGB, b: RGB) -> float:
    """Return the CIE76 color difference: about 2 is just visible, 40 is a clear contrast."""
    return float(np.linalg.norm(_lab(a) - _lab(b)))


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """Mix a fraction `share` of b into a."""
    return tuple(int(round(x + (y - x) * share)) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def darker(a: RGB, share: float) -> RGB:
    return mix(a, (12, 10, 16), share)


def lighter(a: RGB, share: float) -> RGB:
    return mix(a, (255, 255, 255), share)


def noise(generator: np.random.Generator, height: int, width: int, blur: float) -> np.ndarray:
    """Return smooth noise with zero mean and unit deviation; `blur` in pixels."""
    raw = generator.standard_normal((height, width)).astype(np.float32)
    if blur > 0.3:
        spectrum = np.fft.rfft2(raw)
        fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
        raw = np.fft.irfft2(spectrum * np.exp(-2 * (math.pi * blur) ** 2 * (fx**2 + fy**2)), s=(height, width)).astype(
            np.float32
        )
    raw -= raw.mean()
    return raw / max(float(raw.std()), 1e-6)


def _texture(material: str, n: int, unit: float, g: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / unit
    turn = 2 * math.pi

    def fine(blur: float) -> np.ndarray:
        return noise(g, n, n, blur * unit)

    if material == "denim":
        return 1 + 0.11 * np.sin(turn * (x + y) / 3.2) + 0.08 * fine(0.5) + 0.06 * fine(5)
    if material == "knit":
        rows = np.abs(((x / 5.0) % 1.0) - 0.5) * 5.0
        return (
            1
            + 0.20 * np.sin(turn * (y + rows) / 4.2)
            - 0.14 * (np.abs(((x / 5.0) % 1.0) - 0.5) > 0.42)
            + 0.03 * fine(0.6)
        )
    if material == "corduroy":
        return 1 + 0.20 * np.sin(turn * x / 4.0) + 0.04 * fine(0.8)
    if material == "tweed":
        return 1 + 0.13 * fine(0.55) + 0.09 * np.sin(turn * (x + np.abs((y % 8) - 4)) / 4)
    if material == "linen":
        return 1 + 0.09 * np.sign(np.sin(turn * x / 3.1)) * np.sign(np.sin(turn * y / 3.1)) + 0.05 * fine(0.4)
    if material == "leather":
        blotch = fine(3.2)
        return 1 + 0.05 * blotch + 0.14 * np.clip(blotch - 1.1, 0, None) + 0.05 * fine(0.7)
    if material == "satin":
        wave = np.sin(turn * (x / 26 + 0.14 * fine(12))) + 0.5 * np.sin(turn * (x + 0.4 * y) / 11 + fine(9))
        return 1 + 0.13 * wave + 0.20 * np.clip(wave - 0.7, 0, None)
    if material == "velvet":
        return 0.96 + 0.07 * fine(2.4) + 0.07 * fine(6) + 0.05 * fine(0.5)
    if material == "suede":
        return 1 + 0.06 * fine(0.5) + 0.07 * fine(4)
    if material == "fleece":
        bumps = fine(1.25)
        return 1 + 0.10 * np.clip(bumps, -1.4, 1.4)
    if material == "wool":
        return 1 + 0.09 * fine(0.7) + 0.05 * np.sin(turn * (x - y) / 6)
    return 1 + 0.025 * fine(0.5) + 0.015 * fine(4)  # cotton


MATERIALS = (
    "cotton",
    "linen",
    "denim",
    "satin",
    "velvet",
    "wool",
    "knit",
    "fleece",
    "corduroy",
    "tweed",
    "leather",
    "suede",
)
GLOSS = dict(satin=0.55, leather=0.5, velvet=0.25, suede=0.1)


@functools.lru_cache(maxsize=64)
def texture(material: str, size: int, close: bool) -> np.ndarray:
    """Return float32 [2 * size, 2 * size]; `close`: as a close-up sees it, 2.2 times as large."""
    generator = np.random.Generator(np.random.Philox(zlib.crc32(f"{material}/{close}".encode())))
    return np.clip(_texture(material, 2 * size, size / 96 * (2.2 if close else 1.0), generator), 0.45, 1.6).astype(
        np.float32
    )


def _lines(
    draw: ImageDraw.ImageDraw,
    place: Affine,
    box: tuple[float, float, float, float],
    fill: RGB,
    step: float,
    share: float,
    upright: bool,
) -> None:
    x0, y0, x1, y1 = box
    start, end = (x0, x1) if upright else (y0, y1)
    for i in range(int((end - start) / step) + 2):
        a = start + i * step
        b = a + step * share
        corners = [(a, y0), (b, y0), (b, y1), (a, y1)] if upright else [(x0, a), (x1, a), (x1, b), (x0, b)]
        draw.polygon(place(np.array(corners)).ravel().tolist(), fill=fill)


def _spots(g: np.random.Generator, box: tuple[float, float, float, float], step: float) -> np.ndarray:
    x0, y0, x1, y1 = box
    xs, ys = np.arange(x0, x1 + step, step), np.arange(y0, y1 + step, step)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1)
    grid[1::2, :, 0] += step / 2
    return grid.reshape(-1, 2) + g.uniform(-0.28, 0.28, (grid.shape[0] * grid.shape[1], 2)) * step


def _near(points: np.ndarray, image: Image.Image, reach: float) -> np.ndarray:
    """Return bool [n]: which of `points` [n, 2] are in the image or less than `reach` outside."""
    return ((points > -reach) & (points < reach + np.array(image.size))).all(axis=1)


def draw_pattern(
    image: Image.Image,
    pattern: str,
    ground: RGB,
    ink: RGB,
    place: Affine,
    box: tuple[float, float, float, float],
    scale: float,
    generator: np.random.Generator,
) -> None:
    """Fill an RGB image with the pattern. `box`: what to cover, in garment units; `scale`: about the period."""
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, *image.size), fill=ground)
    x0, y0, x1, y1 = box
    if pattern == "stripes":
        _lines(draw, place, box, ink, scale, 0.5, False)
    elif pattern == "pinstripes":
        _lines(draw, place, box, ink, scale * 0.8, 0.28, True)
    elif pattern == "checks":
        half = mix(ground, ink, 0.5)
        _lines(draw, place, box, half, scale * 1.3, 0.5, True)
        _lines(draw, place, box, half, scale * 1.3, 0.5, False)
        s = scale * 0.65
        columns, rows = (np.arange(int((end - a) / s / 2) + 2) * 2 * s + a for a, end in ((x0, x1), (y0, y1)))
        grid = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
        grid = grid[_near(place(grid), image, 2 * s * place.scale)]
        square = np.array([(0, 0), (s, 0), (s, s), (0, s)])
        for points in place((grid[:, None] + square).reshape(-1, 2)).reshape(-1, 8).tolist():
            draw.polygon(points, fill=ink)
    elif pattern == "tartan":
        for upright in (True, False):
            _lines(draw, place, box, mix(ground, ink, 0.55), scale * 2.0, 0.34, upright)
        for upright in (True, False):
            _lines(draw, place, (x0 + scale * 0.9, y0 + scale * 0.9, x1, y1), ink, scale * 2.0, 0.10, upright)
    elif pattern == "polka dots":
        step = scale * 1.05
        xs, ys = np.arange(x0, x1 + step, step), np.arange(y0, y1 + step, step * 0.87)
        grid = np.stack(np.meshgrid(xs, ys), axis=-1)
        grid[1::2, :, 0] += step / 2
        r = step * 0.27 * place.scale
        points = place(grid.reshape(-1, 2))
        for x, y in points[_near(points, image, r)].tolist():
            draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif pattern == "flowers":
        spots = _spots(generator, box, scale * 1.45)
        r = scale * 0.25 * place.scale
        leaf = mix(mix(ground, ink, 0.5), (70, 130, 70), 0.5)
        points, angles = place(spots), generator.uniform(0, 2 * math.pi, len(spots))
        near = _near(points, image, 2.4 * r)
        for (x, y), angle in zip(points[near].tolist(), angles[near].tolist(), strict=True):
            draw.ellipse((x + r * 1.2, y + r * 0.6, x + r * 2.3, y + r * 1.4), fill=leaf)
            for k in range(5):
                px, py = (x + 1.15 * r * math.cos(angle + k * 1.2566), y + 1.15 * r * math.sin(angle + k * 1.2566))
                draw.ellipse((px - r * 0.8, py - r * 0.8, px + r * 0.8, py + r * 0.8), fill=ink)
            draw.ellipse((x - r * 0.6, y - r * 0.6, x + r * 0.6, y + r * 0.6), fill=darker(ink, 0.45))
    elif pattern == "chevrons":
        step, teeth = scale * 1.0, scale * 0.9
        xs = np.arange(x0, x1 + teeth, teeth)
        zig = np.where(np.arange(len(xs)) % 2 == 0, 0.0, teeth * 0.75)
        for i in range(int((y1 - y0) / step) + 3):
            top = np.stack([xs, y0 - scale + i * step + zig], axis=1)
            draw.polygon(place(np.concatenate([top, (top + [0, step * 0.42])[::-1]])).ravel().tolist(), fill=ink)
    elif pattern in ("camouflage", "leopard spots"):
        camouflage = pattern == "camouflage"
        tones = (
            (ink, darker(mix(ground, ink, 0.5), 0.45), lighter(mix(ground, ink, 0.5), 0.25)) if camouflage else (ink,)
        )
        for tone in tones:
            spots = _spots(generator, box, scale * (2.3 if camouflage else 0.95))
            count = 9
            angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
            radius = scale * (0.62 if camouflage else 0.30) * generator.uniform(0.55, 1.35, (len(spots), count))
            blob = spots[:, None] + np.stack(
                [radius * np.cos(angle) * (1.35 if camouflage else 1.0), radius * np.sin(angle)], axis=-1
            )
            centers, r = place(spots), scale * 0.13 * place.scale
            near = _near(centers, image, 1.2 * place.scale * scale)
            corners = place(blob[near].reshape(-1, 2)).reshape(-1, 2 * count)
            for (x, y), points in zip(centers[near].tolist(), corners.tolist(), strict=True):
                draw.polygon(points, fill=tone)
                if not camouflage:
                    draw.ellipse((x - r, y - r, x + r, y + r), fill=mix(ground, (150, 84, 30), 0.6))
    elif pattern == "zigzags":
        teeth = scale * 0.7
        ys = np.arange(y0, y1 + teeth, teeth)
        zig = np.where(np.arange(len(ys)) % 2 == 0, 0.0, teeth * 0.6)
        for i in range(int((x1 - x0) / scale) + 3):
            left = np.stack([x0 - scale + i * scale + zig, ys], axis=1)
            draw.polygon(place(np.concatenate([left, (left + [scale * 0.36, 0])[::-1]])).ravel().tolist(), fill=ink)
    elif pattern == "diamonds":
        step = scale * 1.5
        xs, ys = np.arange(x0, x1 + step, step), np.arange(y0, y1 + step, step * 1.2)
        grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
        shape = np.array([(0, -0.55), (0.42, 0), (0, 0.55), (-0.42, 0)]) * step
        grid = grid[_near(place(grid), image, step * place.scale)]
        for points in place((grid[:, None] + shape).reshape(-1, 2)).reshape(len(grid), -1).tolist():
            draw.polygon(points, fill=ink)


PATTERNS = (
    "stripes",
    "pinstripes",
    "checks",
    "tartan",
    "polka dots",
    "flowers",
    "chevrons",
    "camouflage",
    "leopard spots",
    "zigzags",
    "diamonds",
)
