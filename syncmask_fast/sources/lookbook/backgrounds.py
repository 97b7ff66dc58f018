"""Studio backgrounds: float32 [3, size, size], 0 to 255. All sizes scale with the picture."""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np

from .fabric import RGB, distance, noise


@functools.lru_cache(maxsize=16)
def _surface(kind: str, size: int) -> np.ndarray:
    """float32 [3, 2 * size, 2 * size]: a plank floor, a marble top, a plastered wall or a cloth."""
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
    """A background that sets off a garment of colour `main`: float32 [3, size, size], 0 to 255."""
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
