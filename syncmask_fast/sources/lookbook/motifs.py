"""Shapes of prints, embroideries and letters, in the unit square (x and y from -0.5 to 0.5, y down)."""

from __future__ import annotations

import math

import numpy as np

from .geometry import ellipse, outline, rectangle, ribbon


def _star(points: int, inner: float) -> np.ndarray:
    angle = np.arange(2 * points) * math.pi / points - math.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 0.5, 0.5 * inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _arc(x: float, y: float, r: float, start: float, end: float) -> np.ndarray:
    a = np.radians(np.linspace(start, end, 24))
    return np.stack([x + r * np.cos(a), y + r * np.sin(a)], axis=1)


def _flower() -> list[tuple[np.ndarray, int]]:
    petals = [
        (ellipse(0.27 * math.cos(a), 0.27 * math.sin(a), 0.2, 0.2, 16), 0)
        for a in np.arange(5) * 2 * math.pi / 5 - math.pi / 2
    ]
    return [*petals, (ellipse(0, 0, 0.12, 0.12, 14), 2)]


def _sun() -> list[tuple[np.ndarray, int]]:
    rays = []
    for a in np.arange(8) * math.pi / 4:
        c, s = math.cos(a), math.sin(a)
        rays.append(
            (
                np.array(
                    [
                        (0.5 * c, 0.5 * s),
                        (0.3 * c - 0.09 * s, 0.3 * s + 0.09 * c),
                        (0.3 * c + 0.09 * s, 0.3 * s - 0.09 * c),
                    ]
                ),
                0,
            )
        )
    return [*rays, (ellipse(0, 0, 0.27, 0.27), 0)]


def _motifs() -> dict[str, list[tuple[np.ndarray, int]]]:
    heart = outline(
        (0, 0.48),
        (-0.56, 0.06, -0.48, -0.22),
        (-0.36, -0.52, 0, -0.22),
        (0.36, -0.52, 0.48, -0.22),
        (0.56, 0.06, 0, 0.48),
    )
    bolt = np.array(
        [(0.1, -0.5), (-0.34, 0.08), (-0.04, 0.08), (-0.16, 0.5), (0.34, -0.12), (0.04, -0.12), (0.28, -0.5)]
    )
    moon = np.concatenate([_arc(0.0, 0.0, 0.48, 40, 320), _arc(0.2, 0.0, 0.36, 305, 55)[::1]])
    anchor = [
        (ribbon(np.array([(0, -0.3), (0, 0.42)]), 0.12), 0),
        (ribbon(np.array([(-0.24, -0.16), (0.24, -0.16)]), 0.11), 0),
        (ellipse(0, -0.37, 0.13, 0.13), 0),
        (ellipse(0, -0.37, 0.05, 0.05), 1),
        (ribbon(_arc(0, 0.06, 0.38, 10, 170), 0.12), 0),
        (np.array([(0.5, 0.2), (0.24, 0.12), (0.44, -0.04)]), 0),
        (np.array([(-0.5, 0.2), (-0.24, 0.12), (-0.44, -0.04)]), 0),
    ]
    leaf = [
        (outline((0, -0.5), (0.5, -0.1, 0, 0.36), (-0.5, -0.1, 0, -0.5)), 0),
        (ribbon(np.array([(0, -0.2), (0, 0.5)]), 0.06), 2),
    ]
    crown = np.array([(-0.48, 0.34), (-0.5, -0.3), (-0.24, 0.02), (0, -0.42), (0.24, 0.02), (0.5, -0.3), (0.48, 0.34)])
    fish = [
        (outline((0.5, 0.0), (0.2, -0.36, -0.22, 0.0), (0.2, 0.36, 0.5, 0.0)), 0),
        (np.array([(-0.14, 0), (-0.5, -0.26), (-0.5, 0.26)]), 0),
        (ellipse(0.3, -0.04, 0.045, 0.045, 10), 1),
    ]
    cloud = [
        (ellipse(-0.24, 0.08, 0.24, 0.2), 0),
        (ellipse(0.05, -0.08, 0.28, 0.27), 0),
        (ellipse(0.29, 0.1, 0.21, 0.18), 0),
        (rectangle(-0.3, 0.06, 0.34, 0.28), 0),
    ]
    mountain = [
        (np.array([(-0.5, 0.38), (-0.12, -0.42), (0.12, 0.02), (0.22, -0.14), (0.5, 0.38)]), 0),
        (np.array([(-0.12, -0.42), (-0.24, -0.17), (-0.1, -0.1), (0.0, -0.2)]), 1),
    ]
    cherry = [
        (ribbon(outline((-0.22, 0.1), (-0.1, -0.3, 0.16, -0.46)), 0.07), 2),
        (ribbon(outline((0.24, 0.16), (0.2, -0.2, 0.16, -0.46)), 0.07), 2),
        (ellipse(-0.24, 0.22, 0.23, 0.23), 0),
        (ellipse(0.25, 0.27, 0.22, 0.22), 0),
    ]
    paw = [(ellipse(0, 0.2, 0.26, 0.24), 0)] + [
        (ellipse(x, y, 0.11, 0.14), 0) for x, y in ((-0.36, -0.02), (-0.14, -0.26), (0.14, -0.26), (0.36, -0.02))
    ]
    butterfly = [
        (
            outline(
                (0, -0.05), (0.3, -0.6, 0.5, -0.25), (0.5, 0.05, 0, 0.06), (0.42, 0.1, 0.34, 0.36), (0.16, 0.5, 0, 0.1)
            ),
            0,
        ),
        (
            outline(
                (0, -0.05),
                (-0.3, -0.6, -0.5, -0.25),
                (-0.5, 0.05, 0, 0.06),
                (-0.42, 0.1, -0.34, 0.36),
                (-0.16, 0.5, 0, 0.1),
            ),
            0,
        ),
        (ellipse(0, 0.04, 0.05, 0.3), 2),
    ]
    arrow = np.array(
        [(0, -0.5), (0.38, -0.08), (0.14, -0.08), (0.14, 0.5), (-0.14, 0.5), (-0.14, -0.08), (-0.38, -0.08)]
    )
    mushroom = [
        (outline((-0.5, 0.02), (-0.46, -0.48, 0, -0.48), (0.46, -0.48, 0.5, 0.02)), 0),
        (outline((-0.16, 0.02), (-0.12, 0.3, -0.2, 0.48), (0.2, 0.48), (0.12, 0.3, 0.16, 0.02)), 2),
        (ellipse(-0.18, -0.18, 0.08, 0.08, 12), 1),
        (ellipse(0.16, -0.22, 0.09, 0.09, 12), 1),
    ]
    tree = [
        (np.array([(0, -0.5), (0.3, -0.12), (-0.3, -0.12)]), 0),
        (np.array([(0, -0.28), (0.4, 0.26), (-0.4, 0.26)]), 0),
        (rectangle(-0.08, 0.26, 0.08, 0.5), 2),
    ]
    return {
        "star": [(_star(5, 0.42), 0)],
        "heart": [(heart, 0)],
        "moon": [(moon, 0)],
        "flower": _flower(),
        "lightning bolt": [(bolt, 0)],
        "anchor": anchor,
        "sun": _sun(),
        "leaf": leaf,
        "crown": [(crown, 0)],
        "fish": fish,
        "cloud": cloud,
        "mountain": mountain,
        "cherry": cherry,
        "paw": paw,
        "butterfly": butterfly,
        "arrow": [(arrow, 0)],
        "mushroom": mushroom,
        "tree": tree,
    }


MOTIFS = _motifs()


LETTERS: dict[str, list[list[tuple[float, float]]]] = {
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.2, 0.62), (0.8, 0.62)]],
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
    "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "K": [[(0, 0), (0, 1)], [(1, 0), (0, 0.5), (1, 1)]],
    "L": [[(0, 0), (0, 1), (1, 1)]],
    "M": [[(0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)]],
    "N": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
    "O": [[(0.2, 0), (0.8, 0), (1, 0.3), (1, 0.7), (0.8, 1), (0.2, 1), (0, 0.7), (0, 0.3), (0.2, 0)]],
    "T": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
    "V": [[(0, 0), (0.5, 1), (1, 0)]],
    "X": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
    "Y": [[(0, 0), (0.5, 0.5), (1, 0)], [(0.5, 0.5), (0.5, 1)]],
    "1": [[(0.2, 0.25), (0.6, 0), (0.6, 1)]],
    "4": [[(0.75, 1), (0.75, 0), (0, 0.7), (1, 0.7)]],
    "7": [[(0, 0), (1, 0), (0.4, 1)]],
}
