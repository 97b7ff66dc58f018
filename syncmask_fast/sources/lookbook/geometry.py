"""Outlines of drawn garments, float64 arrays [n, 2] with x to the right and y down, and what is made of them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np

CURVE_STEPS = 8
_T = np.linspace(0.0, 1.0, CURVE_STEPS + 1)[1:]
_CURVE = np.stack([(1 - _T) ** 2, 2 * _T * (1 - _T), _T**2], axis=1)  # of start, control point and end


def outline(start: tuple[float, float], *segments: tuple[float, ...]) -> np.ndarray:
    """Return a polyline [n, 2] from `start`: (x, y) is a line to it, (cx, cy, x, y) a quadratic curve by c."""
    points = [np.array([start], dtype=np.float64)]
    for segment in segments:
        if len(segment) == 2:
            points.append(np.array([segment], dtype=np.float64))
            continue
        points.append(_CURVE @ np.array([points[-1][-1], segment[:2], segment[2:]], dtype=np.float64))
    return np.concatenate(points)


def mirror(half: np.ndarray) -> np.ndarray:
    """Return the same outline on the other side of x = 0, walked backwards."""
    return half[::-1] * np.array([-1.0, 1.0])


def both(start: tuple[float, float], *segments: tuple[float, ...]) -> np.ndarray:
    """Return the closed outline of a right half (given as in `outline`) and its mirror image."""
    half = outline(start, *segments)
    return np.concatenate([half, mirror(half)])


def rectangle(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=np.float64)


def ellipse(x: float, y: float, rx: float, ry: float, steps: int = 32) -> np.ndarray:
    return _circle(steps) * [rx, ry] + [x, y]


@functools.lru_cache(maxsize=64)
def _circle(steps: int) -> np.ndarray:
    angle = np.linspace(0.0, 2 * math.pi, steps, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def ribbon(line: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Return the closed outline of a band of `width` (a number, or one per point) along an open polyline [n, 2]."""
    step = np.gradient(line, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], axis=1)
    normal /= np.maximum(np.hypot(normal[:, 0], normal[:, 1]), 1e-9)[:, None]
    half = normal * (np.asarray(width, dtype=np.float64).reshape(-1, 1) / 2)
    return np.concatenate([line + half, (line - half)[::-1]])


def area(polygon: np.ndarray) -> float:
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def bounds(polygons: list[np.ndarray]) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1) around all points."""
    points = np.concatenate(polygons)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def contains(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return bool [h, w]: which points of the grid `x` [w], `y` [h] are in the polygon [n, 2] (even-odd rule)."""
    x0, y0 = polygon[:, :1], polygon[:, 1:]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    height = np.where(y1 == y0, 1.0, y1 - y0)
    crossing = np.where((y0 > y) != (y1 > y), (x1 - x0) * (y - y0) / height + x0, -np.inf)  # [n, h]
    return np.logical_xor.reduce(x < crossing[..., None], axis=0)


@dataclass(frozen=True)
class Affine:
    """p -> p @ matrix.T + offset."""

    matrix: np.ndarray
    offset: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return points @ self.matrix.T + self.offset

    def after(self, first: Affine) -> Affine:
        """Return the map that applies `first`, then this one."""
        return Affine(self.matrix @ first.matrix, self(first.offset[None])[0])

    @property
    def scale(self) -> float:
        """Length factor: the root of the area factor."""
        return math.sqrt(abs(float(np.linalg.det(self.matrix))))


def affine(
    scale: float | tuple[float, float] = 1.0,
    degrees: float = 0.0,
    lean: float = 0.0,
    offset: tuple[float, float] = (0.0, 0.0),
) -> Affine:
    """Scale, then lean sideways (x += lean * y), then turn, then move."""
    sx, sy = scale if isinstance(scale, tuple) else (scale, scale)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, lean], [0.0, 1.0]]) @ np.diag([sx, sy])
    return Affine(matrix, np.array(offset, dtype=np.float64))


@dataclass(frozen=True)
class Piece:
    """A piece of a garment. Pieces of the same name are one thing, such as both sleeves.

    fabric: "main" (with its pattern), "plain" (main color, no pattern), "inner" (main color in shadow), "trim" (the
            second color), "belt", "metal" or "sole".
    panel:  details may be on it. clip: it is visible only on the pieces of that name.
    """

    name: str
    polygon: np.ndarray
    fabric: str = "main"
    panel: bool = False
    clip: str | None = None


@dataclass(frozen=True)
class Seam:
    """A line in the fabric: "seam" (dark), "stitch" (dashed, light), "fold" (broad and soft)."""

    line: np.ndarray
    style: str = "seam"


@dataclass(frozen=True)
class Style:
    """How one product's garment is sewn; None if it does not apply."""

    sleeves: str | None = None  # long, short, puff, bell, none
    neck: str | None = None  # crew, v, scoop, square, boat
    arm: float = 14.0  # degrees between sleeve (or leg) and body
    trim: str | None = None  # where the second color is
    belt: bool = False
    proportions: tuple[float, float] = (1.0, 1.0)  # factors of width and height


@dataclass
class Garment:
    pieces: list[Piece] = field(default_factory=list)
    seams: list[Seam] = field(default_factory=list)
    waist: float | None = None  # y of a belt
    hem: float | None = None  # y of the lower edge
    hanger: tuple[float, float] | None = None  # half width and y of the neck, where a hanger may show

    def add(
        self, name: str, polygon: np.ndarray, fabric: str = "main", *, panel: bool = False, clip: str | None = None
    ) -> None:
        self.pieces.append(Piece(name, polygon, fabric, panel, clip))

    def seam(self, line: np.ndarray | list[tuple[float, float]], style: str = "seam") -> None:
        self.seams.append(Seam(np.asarray(line, dtype=np.float64), style))

    def stretched(self, wide: float, tall: float) -> Garment:
        factor = np.array([wide, tall])
        pieces = [Piece(p.name, p.polygon * factor, p.fabric, p.panel, p.clip) for p in self.pieces]
        seams = [Seam(s.line * factor, s.style) for s in self.seams]
        return Garment(
            pieces,
            seams,
            None if self.waist is None else self.waist * tall,
            None if self.hem is None else self.hem * tall,
            None if self.hanger is None else (self.hanger[0] * wide, self.hanger[1] * tall),
        )

    def bounds(self) -> tuple[float, float, float, float]:
        return bounds([piece.polygon for piece in self.pieces if piece.clip is None])
