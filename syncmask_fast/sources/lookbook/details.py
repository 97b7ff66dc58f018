"""Local details and their motifs, drawn in a unit square: x and y from -0.5 to 0.5, y down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from syncmask_fast.sources.lookbook.fabric import COLORS, RGB, darker, lighter, mix
from syncmask_fast.sources.lookbook.geometry import Affine, ellipse, outline, rectangle, ribbon


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
    heart = outline((0, 0.48), (-0.56, 0.06, -0.48, -0.22), (-0.36, -0.52, 0, -0.22), (0.36, -0.52, 0.48, -0.22),
        (0.56, 0.06, 0, 0.48))  # fmt: skip
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
    return {"star": [(_star(5, 0.42), 0)], "heart": [(heart, 0)], "moon": [(moon, 0)], "flower": _flower(),
        "lightning bolt": [(bolt, 0)], "anchor": anchor, "sun": _sun(), "leaf": leaf, "crown": [(crown, 0)],
        "fish": fish, "cloud": cloud, "mountain": mountain, "cherry": cherry, "paw": paw, "butterfly": butterfly,
        "arrow": [(arrow, 0)], "mushroom": mushroom, "tree": tree}  # fmt: skip


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


METAL = COLORS["silver"]
_DISC = ellipse(0.0, 0.0, 1.0, 1.0, 20)


@dataclass
class Brush:
    """Draws shapes in unit coordinates on `image` (RGBA, opaque where painted)."""

    size: tuple[int, int]  # of `image`
    place: Affine  # unit square -> pixels of `image`
    aspect: float  # width / height of the detail on the garment
    ground: RGB  # the fabric below

    def __post_init__(self) -> None:
        self.image = Image.new("RGBA", self.size)
        self._draw = ImageDraw.Draw(self.image)
        self._turn, self._offset = self.place.matrix.T, self.place.offset
        self._rows, self._at = self.place.matrix.tolist(), self.place.offset.tolist()
        self._disc = (_DISC / [self.aspect, 1.0]) @ self._turn
        self._high = math.hypot(*self.place.matrix[:, 1].tolist())

    def polygon(self, points: np.ndarray | list[tuple[float, float]], fill: RGB) -> None:
        flat = np.asarray(points, dtype=np.float64) @ self._turn
        flat += self._offset
        self._draw.polygon(flat.ravel().tolist(), fill=fill)

    def line(self, points: np.ndarray | list[tuple[float, float]], fill: RGB, width: float) -> None:
        """Draw a line; `width` is a fraction of the detail's height."""
        pixels = max(1, round(width * self._high))
        flat = self.place(np.asarray(points, dtype=np.float64))
        self._draw.line([tuple(p) for p in flat.tolist()], fill=fill, width=pixels, joint="curve")

    def disc(self, x: float, y: float, radius: float, fill: RGB) -> None:
        """Draw a round spot; `radius` is a fraction of the detail's height."""
        (a, b), (c, d) = self._rows
        flat = self._disc * radius
        flat += (a * x + b * y + self._at[0], c * x + d * y + self._at[1])
        self._draw.polygon(flat.ravel().tolist(), fill=fill)


def motif(brush: Brush, name: str, color: RGB, scale: float = 1.0) -> None:
    tones = (color, brush.ground, darker(color, 0.4))
    for polygon, tone in MOTIFS[name]:
        brush.polygon(polygon * scale, tones[tone])


def draw_print(brush: Brush, what: str, color: RGB) -> None:
    motif(brush, what, color)


def draw_embroidery(brush: Brush, what: str, color: RGB) -> None:
    """Draw the motif as an open outline of thread with a hatched filling."""
    light, dark = lighter(color, 0.35), darker(color, 0.35)
    tones = (color, brush.ground, dark)
    for polygon, tone in MOTIFS[what]:
        brush.polygon(polygon * 0.9, tones[tone])
        brush.line(np.concatenate([polygon, polygon[:1]]) * 0.9, light if tone == 0 else dark, 0.07)
    for polygon, _ in MOTIFS[what][:1]:
        (x0, y0), (x1, y1) = polygon.min(axis=0) * 0.6, polygon.max(axis=0) * 0.6
        for t in np.linspace(0.2, 0.8, 3):
            brush.line([(x0 + (x1 - x0) * t - 0.06, y0 * 0.5), (x0 + (x1 - x0) * t + 0.06, y1 * 0.5)], dark, 0.05)


def draw_patch(brush: Brush, what: str, color: RGB) -> None:
    shapes = {
        "round": ellipse(0, 0, 0.5, 0.5),
        "square": rectangle(-0.48, -0.48, 0.48, 0.48),
        "oval": ellipse(0, 0, 0.5, 0.36),
        "shield-shaped": outline((-0.42, -0.46), (0.42, -0.46), (0.5, 0.3, 0, 0.5), (-0.5, 0.3, -0.42, -0.46)),
        "diamond-shaped": np.array([(0, -0.5), (0.46, 0), (0, 0.5), (-0.46, 0)]),
    }
    shape = shapes[what]
    rim = darker(color, 0.5) if sum(color) > 240 else lighter(color, 0.55)
    brush.polygon(shape, rim)
    brush.polygon(shape * 0.84, color)
    brush.polygon(shape * 0.62, rim)
    brush.polygon(shape * 0.54, color)
    brush.line([(-0.14, 0.0), (0.14, 0.0)], rim, 0.09)


def draw_pocket(brush: Brush, what: str, color: RGB) -> None:
    edge, stitch = darker(color, 0.4), lighter(color, 0.5) if sum(color) < 480 else darker(color, 0.3)
    if what == "kangaroo pocket":
        bag = np.array([(-0.3, -0.5), (0.3, -0.5), (0.5, 0.1), (0.5, 0.5), (-0.5, 0.5), (-0.5, 0.1)])
    elif what == "round pocket":
        bag = outline((-0.46, -0.5), (0.46, -0.5), (0.46, 0.1), (0.46, 0.5, 0, 0.5), (-0.46, 0.5, -0.46, 0.1))
    else:
        bag = np.array([(-0.46, -0.5), (0.46, -0.5), (0.46, 0.32), (0, 0.5), (-0.46, 0.32)])
    brush.polygon(bag, edge)
    brush.polygon(bag * 0.93, color)
    brush.line(np.concatenate([bag[:1], bag[1:], bag[:1]]) * 0.78, stitch, 0.03)
    if what == "flap pocket":
        flap = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, -0.2), (0, 0.02), (-0.5, -0.2)])
        brush.polygon(flap, edge)
        brush.polygon(flap * [0.95, 0.94] - [0, 0.025], lighter(color, 0.12))
        brush.disc(0, -0.17, 0.07, METAL)
    elif what == "zip pocket":
        brush.polygon(rectangle(-0.42, -0.36, 0.42, -0.2), (40, 40, 46))
        brush.line([(-0.38, -0.28), (0.38, -0.28)], METAL, 0.07)
        brush.polygon(rectangle(0.24, -0.3, 0.36, -0.02), METAL)
    else:
        brush.polygon(rectangle(-0.46, -0.5, 0.46, -0.36), lighter(color, 0.18))
        brush.line([(-0.46, -0.36), (0.46, -0.36)], edge, 0.04)


def draw_zip(brush: Brush, what: str, color: RGB) -> None:
    """Draw a colored tape with metal teeth; a metal zip has a dark tape."""
    metal = color in (COLORS["silver"], COLORS["gold"])
    tape, teeth = ((52, 50, 56), color) if metal else (color, METAL)
    brush.polygon(rectangle(-0.5, -0.5, 0.5, 0.5), darker(tape, 0.3))
    brush.polygon(rectangle(-0.43, -0.49, 0.43, 0.49), tape)
    width = 0.26 if metal else 0.16
    brush.polygon(rectangle(-width, -0.47, width, 0.47), darker(tape, 0.55))
    count = max(7, int(2.4 / brush.aspect))
    for i in range(count):
        y = -0.46 + 0.92 * i / count
        side = -1 if i % 2 else 1
        brush.polygon(rectangle(min(0, side * width), y, max(0, side * width), y + 0.55 / count), teeth)
    brush.polygon(outline((-0.24, -0.5), (0.24, -0.5), (0.36, -0.36), (0, -0.3, -0.36, -0.36)), lighter(teeth, 0.35))
    brush.polygon(rectangle(-0.12, -0.36, 0.12, -0.2), lighter(teeth, 0.15))


def draw_buttons(brush: Brush, what: str, color: RGB) -> None:
    count = dict(three=3, four=4, five=5)[what]
    radius = 0.42 / count
    for i in range(count):
        y = -0.5 + (i + 0.5) / count
        brush.disc(0, y, radius * 1.12, darker(color, 0.5))
        brush.disc(0, y - 0.01, radius, color)
        for dx in (-0.3, 0.3):
            brush.disc(dx * radius / brush.aspect, y, radius * 0.17, darker(color, 0.65))


def draw_bow(brush: Brush, what: str, color: RGB) -> None:
    dark = darker(color, 0.35)
    for s in (-1, 1):
        brush.polygon(outline((0, 0), (s * 0.06, 0.3, s * 0.24, 0.5), (s * 0.38, 0.38), (s * 0.2, 0.2, 0, -0.04)), dark)
        loop = outline((0, -0.08), (s * 0.3, -0.52, s * 0.5, -0.34), (s * 0.5, 0.16), (s * 0.3, 0.24, 0, 0.0))
        brush.polygon(loop, dark)
        brush.polygon((loop - [s * 0.27, -0.08]) * 0.86 + [s * 0.27, -0.08], color)
        brush.line([(s * 0.08, -0.06), (s * 0.34, -0.14)], dark, 0.05)
    brush.polygon(ellipse(0, -0.05, 0.11, 0.14), lighter(color, 0.15))


def draw_lacing(brush: Brush, what: str, color: RGB) -> None:
    rows = 4
    brush.polygon(
        rectangle(-0.46, -0.5, 0.46, 0.42),
        darker(brush.ground, 0.35) if sum(brush.ground) > 200 else lighter(brush.ground, 0.25),
    )
    for i in range(rows):
        a, b = -0.44 + 0.86 * i / rows, -0.44 + 0.86 * (i + 1) / rows
        brush.line([(-0.36, a), (0.36, b)], color, 0.055)
        brush.line([(0.36, a), (-0.36, b)], color, 0.055)
    for s in (-1, 1):
        brush.line(outline((0, 0.42), (s * 0.3, 0.36, s * 0.34, 0.5)), color, 0.05)
    for i in range(rows + 1):
        for x in (-0.36, 0.36):
            brush.disc(x, -0.44 + 0.86 * i / rows, 0.035, METAL)


def draw_band(brush: Brush, what: str, color: RGB) -> None:
    brush.polygon(rectangle(-0.5, -0.5, 0.5, 0.5), color)
    if what == "double":
        brush.polygon(
            rectangle(-0.14, -0.5, 0.14, 0.5), darker(color, 0.5) if sum(color) > 240 else lighter(color, 0.5)
        )


def draw_studs(brush: Brush, what: str, color: RGB) -> None:
    rows, columns = 3, 4
    for i in range(rows):
        for j in range(columns):
            x, y = -0.5 + (j + 0.5) / columns, -0.5 + (i + 0.5) / rows
            brush.disc(x, y, 0.125, darker(color, 0.55))
            brush.disc(x - 0.01, y - 0.02, 0.10, color)
            brush.disc(x - 0.02, y - 0.05, 0.04, lighter(color, 0.7))


def draw_fringe(brush: Brush, what: str, color: RGB) -> None:
    brush.polygon(rectangle(-0.5, -0.5, 0.5, -0.28), darker(color, 0.25))
    strands = 11
    for i in range(strands):
        x = -0.5 + (i + 0.5) / strands
        sway = 0.03 * math.sin(i * 2.1)
        brush.polygon(
            [
                (x - 0.035, -0.3),
                (x + 0.035, -0.3),
                (x + 0.028 + sway, 0.5 - 0.05 * (i % 2)),
                (x - 0.028 + sway, 0.5 - 0.05 * (i % 2)),
            ],
            color if i % 2 else darker(color, 0.2),
        )


def draw_lace(brush: Brush, what: str, color: RGB) -> None:
    brush.polygon(rectangle(-0.44, -0.44, 0.44, 0.44), color)
    hole = mix(color, brush.ground, 0.8)
    for t in np.linspace(-0.4, 0.4, 6):
        for x, y in ((t, -0.42), (t, 0.42), (-0.42, t), (0.42, t)):
            brush.polygon(ellipse(x, y, 0.08, 0.08, 12), color)
    for x in (-0.24, 0.0, 0.24):
        for y in (-0.24, 0.0, 0.24):
            if x or y:
                brush.polygon(ellipse(x, y, 0.085, 0.085, 10), hole)
    for a in np.arange(6) * math.pi / 3:
        brush.polygon(ellipse(0.09 * math.cos(a), 0.09 * math.sin(a), 0.04, 0.04, 8), hole)


def draw_ruffle(brush: Brush, what: str, color: RGB) -> None:
    dark, light = darker(color, 0.3), lighter(color, 0.2)
    x = np.linspace(-0.5, 0.5, 41)
    wave = 0.42 + 0.08 * np.cos(x * 38)
    brush.polygon(np.concatenate([np.stack([x, np.full_like(x, -0.5)], 1), np.stack([x, wave], 1)[::-1]]), color)
    for i in range(6):
        at = -0.415 + i * 0.1653
        brush.polygon([(at - 0.02, -0.4), (at + 0.055, 0.42), (at - 0.055, 0.42)], dark if i % 2 else light)
    brush.polygon(rectangle(-0.5, -0.5, 0.5, -0.36), dark)


def draw_lettering(brush: Brush, what: str, color: RGB) -> None:
    count = len(what)
    for i, letter in enumerate(what):
        left = -0.5 + i / count + 0.06
        wide = 1 / count - 0.12
        for stroke in LETTERS[letter]:
            brush.line([(left + x * wide, -0.36 + 0.72 * y) for x, y in stroke], color, 0.2)


def draw_strap(brush: Brush, what: str, color: RGB) -> None:
    brush.polygon(rectangle(-0.5, -0.24, 0.5, 0.24), darker(color, 0.4))
    brush.polygon(rectangle(-0.5, -0.18, 0.5, 0.18), color)
    for x in (-0.36, 0.28, 0.40):
        brush.disc(x, 0.0, 0.06, darker(color, 0.7))
    frame = rectangle(-0.2, -0.5, 0.14, 0.5)
    brush.polygon(frame, METAL)
    brush.polygon(rectangle(-0.12, -0.32, 0.06, 0.32), color)
    brush.polygon(rectangle(-0.06, -0.06, 0.14, 0.06), lighter(METAL, 0.4))


def draw_tassel(brush: Brush, what: str, color: RGB) -> None:
    brush.polygon(rectangle(-0.06, -0.5, 0.06, -0.3), darker(color, 0.4))
    brush.polygon(ellipse(0, -0.22, 0.26, 0.14), color)
    brush.polygon(outline((-0.22, -0.14), (0.22, -0.14), (0.42, 0.48), (0, 0.5, -0.42, 0.48)), color)
    for x in (-0.24, -0.08, 0.08, 0.24):
        brush.line([(x * 0.5, -0.08), (x * 1.3, 0.46)], darker(color, 0.4), 0.035)
    brush.polygon(rectangle(-0.24, -0.16, 0.24, -0.07), darker(color, 0.5))


def draw_pompoms(brush: Brush, what: str, color: RGB) -> None:
    for x in (-0.33, 0.0, 0.33):
        for a in np.arange(9) * 2 * math.pi / 9:
            brush.disc(x + 0.11 * math.cos(a), 0.3 * math.sin(a), 0.16, darker(color, 0.18))
        brush.disc(x, 0.0, 0.3, color)
        brush.disc(x - 0.03, -0.1, 0.13, lighter(color, 0.3))


def draw_label(brush: Brush, what: str, color: RGB) -> None:
    ink = darker(color, 0.65) if sum(color) > 330 else lighter(color, 0.7)
    brush.polygon(rectangle(-0.5, -0.5, 0.5, 0.5), darker(color, 0.25))
    brush.polygon(rectangle(-0.47, -0.44, 0.47, 0.44), color)
    brush.line([(-0.34, -0.14), (0.34, -0.14)], ink, 0.14)
    brush.line([(-0.2, 0.18), (0.2, 0.18)], ink, 0.09)


def draw_cutout(brush: Brush, what: str, color: RGB) -> None:
    shape = {
        "keyhole": outline(
            (-0.08, -0.5), (0.08, -0.5), (0.5, 0.2, 0.3, 0.4), (0.0, 0.6, -0.3, 0.4), (-0.5, 0.2, -0.08, -0.5)
        ),
        "round": ellipse(0, 0, 0.46, 0.46),
    }[what]
    brush.polygon(shape, color)
    brush.polygon((shape - shape.mean(axis=0)) * 0.8 + shape.mean(axis=0), (226, 178, 148))
    brush.polygon((shape - shape.mean(axis=0)) * [0.8, 0.4] + shape.mean(axis=0) - [0, 0.12], (188, 138, 110))


def draw_quilting(brush: Brush, what: str, color: RGB) -> None:
    brush.polygon(rectangle(-0.5, -0.5, 0.5, 0.5), color)
    for t in np.linspace(-0.75, 0.75, 7):
        for s in (-1, 1):
            a = np.array([(t - 0.5, -0.5 * s), (t + 0.5, 0.5 * s)])
            x0, x1 = np.clip(a[:, 0], -0.5, 0.5)
            brush.line([(x0, s * (x0 - t)), (x1, s * (x1 - t))], darker(color, 0.5), 0.05)


@dataclass(frozen=True)
class Kind:
    """A kind of local detail. A new kind is a draw function and a line in `KINDS`.

    draw:   draws a variant in a color on a brush.
    words:  what a text calls it, with {color} and {what}, its variant. article: whether it takes "a".
    size:   its height as a fraction of the garment's larger side, from and to.
    aspect: width over height, from and to. tilt: degrees to either side.
    metal:  its colors are metals. inside: it may be on the lining. only: categories; empty: all.
    """

    draw: Callable[[Brush, str, RGB], None]
    words: str
    variants: tuple[str, ...]
    size: tuple[float, float]
    aspect: tuple[float, float] = (1.0, 1.0)
    tilt: float = 8.0
    metal: bool = False
    inside: bool = True
    weight: float = 1.0
    only: tuple[str, ...] = ()
    article: bool = True


CLOTHES = ("top", "knitwear", "jacket", "coat", "dress", "jumpsuit", "trousers", "shorts", "skirt")
_EMBROIDERIES = ("flower", "leaf", "butterfly", "star", "heart", "sun", "moon", "cherry")
_PATCHES = ("round", "square", "oval", "shield-shaped", "diamond-shaped")
_POCKETS = ("patch pocket", "flap pocket", "zip pocket", "round pocket", "kangaroo pocket")
_WORDS = ("LOVE", "OXO", "HALO", "MOTEL", "VELO", "TAKE", "747", "1471")
_WITH_LACE = (*CLOTHES, "scarf")
_WITH_HOLES = ("top", "knitwear", "dress", "jumpsuit")

# fmt: off
KINDS: dict[str, Kind] = {
    "print": Kind(draw_print, "{color} {what} print", tuple(MOTIFS), (0.20, 0.31), weight=2.2, tilt=15),
    "embroidery": Kind(draw_embroidery, "{color} {what} embroidery", _EMBROIDERIES, (0.19, 0.28), tilt=15, weight=1.3,
                       article=False),
    "patch": Kind(draw_patch, "{what} {color} patch", _PATCHES, (0.16, 0.24), weight=1.3),
    "pocket": Kind(draw_pocket, "{color} {what}", _POCKETS, (0.19, 0.28), (0.9, 1.15), tilt=4, weight=2.0),
    "zip": Kind(draw_zip, "{color} zip", ("straight",), (0.28, 0.46), (0.19, 0.25), tilt=25, weight=1.3),
    "buttons": Kind(draw_buttons, "{what} {color} buttons", ("three", "four", "five"), (0.26, 0.42), (0.24, 0.3),
                    tilt=12, weight=1.3, article=False),
    "bow": Kind(draw_bow, "{color} bow", ("bow",), (0.15, 0.23), (1.25, 1.5), tilt=14),
    "lacing": Kind(draw_lacing, "{color} lacing", ("lacing",), (0.22, 0.34), (0.5, 0.65), tilt=5, article=False),
    "band": Kind(draw_band, "{color} {what} stripe", ("single", "double"), (0.32, 0.52), (0.13, 0.2), tilt=35),
    "studs": Kind(draw_studs, "{color} studs", ("studs",), (0.14, 0.2), (1.2, 1.5), tilt=10, metal=True, article=False),
    "fringe": Kind(draw_fringe, "{color} fringe", ("fringe",), (0.13, 0.19), (1.4, 2.0), tilt=6),
    "lace": Kind(draw_lace, "{color} lace insert", ("lace",), (0.18, 0.26), (0.9, 1.2), tilt=6, only=_WITH_LACE),
    "ruffle": Kind(draw_ruffle, "{color} ruffle", ("ruffle",), (0.12, 0.17), (1.6, 2.2)),
    "lettering": Kind(draw_lettering, '{color} "{what}" lettering', _WORDS, (0.12, 0.17), (1.9, 2.5), tilt=10,
                      weight=1.3, article=False),
    "strap": Kind(draw_strap, "{color} buckled strap", ("strap",), (0.10, 0.14), (2.2, 3.0), tilt=20),
    "tassel": Kind(draw_tassel, "{color} tassel", ("tassel",), (0.20, 0.28), (0.5, 0.65)),
    "pompoms": Kind(draw_pompoms, "{color} pompoms", ("pompoms",), (0.10, 0.14), (2.2, 2.8), tilt=12, article=False),
    "label": Kind(draw_label, "{color} label", ("label",), (0.10, 0.15), (1.5, 2.2), weight=1.2),
    "cut-out": Kind(draw_cutout, "{what} cut-out", ("keyhole", "round"), (0.15, 0.22), inside=False, only=_WITH_HOLES,
                    weight=0.7),
    "quilting": Kind(draw_quilting, "{color} quilted panel", ("quilted panel",), (0.18, 0.26), (0.9, 1.2)),
}
# fmt: on
