"""Pieces that a garment is sewn of."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .geometry import bounds


@dataclass(frozen=True)
class Part:
    """A piece of the garment. Parts of the same name are one thing (both sleeves). `fabric` is "main" (with
    its pattern), "plain" (main colour, no pattern), "inner" (main colour in shadow), "trim" (the second
    colour) or "belt" (the belt's). `panel`: details may lie on it. `clip`: only what lies on the parts of
    that name is seen."""

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
    """How one product's garment is cut; what does not apply to it is None."""

    sleeves: str | None = None  # long, short, puff, bell, none
    neck: str | None = None  # crew, v, scoop, square, boat
    arm: float = 14.0  # degrees between sleeve (or leg) and body
    trim: str | None = None  # where the second colour is
    belt: bool = False
    proportions: tuple[float, float] = (1.0, 1.0)  # factors of width and height


@dataclass
class Garment:
    parts: list[Part] = field(default_factory=list)
    seams: list[Seam] = field(default_factory=list)
    waist: float | None = None  # y of a belt
    hem: float | None = None  # y of the lower edge
    hanger: tuple[float, float] | None = None  # half width and y of the neck, where a hanger may show

    def add(
        self, name: str, polygon: np.ndarray, fabric: str = "main", *, panel: bool = False, clip: str | None = None
    ) -> None:
        self.parts.append(Part(name, polygon, fabric, panel, clip))

    def seam(self, line: np.ndarray | list[tuple[float, float]], style: str = "seam") -> None:
        self.seams.append(Seam(np.asarray(line, dtype=np.float64), style))

    def stretched(self, wide: float, tall: float) -> Garment:
        factor = np.array([wide, tall])
        parts = [Part(p.name, p.polygon * factor, p.fabric, p.panel, p.clip) for p in self.parts]
        seams = [Seam(s.line * factor, s.style) for s in self.seams]
        return Garment(
            parts,
            seams,
            None if self.waist is None else self.waist * tall,
            None if self.hem is None else self.hem * tall,
            None if self.hanger is None else (self.hanger[0] * wide, self.hanger[1] * tall),
        )

    def bounds(self) -> tuple[float, float, float, float]:
        return bounds([part.polygon for part in self.parts if part.clip is None])
