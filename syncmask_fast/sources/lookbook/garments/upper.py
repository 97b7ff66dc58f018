"""Clothes of the upper body, dresses and ponchos, from the front, the back and the side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from syncmask_fast.sources.lookbook.geometry import Garment, Style, both, ellipse, mirror, outline, rectangle, ribbon

NECK_DEPTH = dict(crew=0.085, v=0.25, scoop=0.20, square=0.17, boat=0.05)
NECK_WIDTH = dict(crew=0.125, v=0.125, scoop=0.15, square=0.15, boat=0.21)
SLEEVE_SHAPES = dict(  # length, width at the cuff, outward bulge at the shoulder, flare before the cuff
    long=(0.66, 0.125, 0.0, 0.0),
    short=(0.28, 0.19, 0.0, 0.0),
    puff=(0.34, 0.15, 0.13, 0.0),
    bell=(0.58, 0.30, 0.0, 0.04),
)


def neckline_curve(neck: str, width: float, depth: float) -> list[tuple[float, ...]]:
    """Return the right half of a neckline as segments from (0, depth) up to (width, 0)."""
    if neck == "v":
        return [(width, 0.0)]
    if neck == "square":
        return [(width * 0.9, depth), (width, 0.0)]
    return [(width * 0.95, depth, width, 0.0)]


def add_arms(
    garment: Garment,
    kind: str,
    shoulder: float,
    chest: float,
    degrees: float,
    style: Style,
    rib: bool,
    quilt: bool,
    drop: float = 0.05,
) -> None:
    """Add both sleeves of a front or back view, behind the body."""
    length, cuff, bulge, flare = SLEEVE_SHAPES[kind]
    top, pit = np.array([shoulder - 0.02, drop]), np.array([chest - 0.02, 0.31])
    middle = (top + pit) / 2
    along = np.array([math.sin(math.radians(degrees)), math.cos(math.radians(degrees))])
    across = np.array([along[1], -along[0]])
    if kind in ("short", "puff"):
        along = np.array([math.sin(math.radians(degrees + 16)), math.cos(math.radians(degrees + 16))])
        across = np.array([along[1], -along[0]])
    end = middle + along * length
    outer, inner = end + across * cuff / 2, end - across * cuff / 2
    bend_out = (top + outer) / 2 + across * (bulge + 0.035) + along * (flare * 0.5 - bulge * 0.3)
    bend_in = (pit + inner) / 2 - across * (bulge * 0.35 - 0.01)
    sleeve = outline(tuple(top), (*bend_out, *outer), tuple(inner), (*bend_in, *pit))
    fabric = "trim" if style.trim == "sleeves" else "main"
    for polygon in (sleeve, mirror(sleeve)):
        garment.add("sleeves", polygon, fabric, panel=True)
    if kind != "short" and (rib or style.trim == "cuffs"):
        back = along * (0.10 if kind == "long" else 0.08)
        band = np.array(
            [
                outer + across * 0.004,
                inner - across * 0.004,
                inner - back - across * 0.012,
                outer - back + across * 0.012,
            ]
        )
        for polygon in (band, mirror(band)):
            garment.add(
                "trim" if style.trim == "cuffs" else "cuff", polygon, "trim" if style.trim == "cuffs" else "plain"
            )
    if quilt:
        for t in np.arange(0.15, 0.95, 0.16):
            a, b = top + (outer - top) * t, pit + (inner - pit) * t
            line = np.array([a + across * 0.03, (a + b) / 2 + along * 0.015, b])
            garment.seam(line, "quilt")
            garment.seam(line * [-1, 1], "quilt")


def add_collar(garment: Garment, kind: str | None, face: str, width: float, style: Style, depth: float) -> None:
    """Add the collar in front of the neck, or a hood around it. Call it after the body."""
    fabric = "trim" if style.trim in ("collar", "hood") else "plain"
    if kind is None:
        return
    w = width
    if kind == "shirt":
        if face == "front":
            flap = outline(
                (0.005, 0.05), (w * 0.55, 0.02, w * 0.95, -0.035), (w + 0.075, 0.035), (w + 0.03, 0.165), (0.07, 0.10)
            )
            garment.add("collar", np.concatenate([outline((-w * 0.95, -0.035), (0.0, -0.075, w * 0.95, -0.035)),
                outline((w * 0.8, 0.02), (0.0, 0.03, -w * 0.8, 0.02))]), "inner")  # fmt: skip
            garment.add("collar", flap, fabric)
            garment.add("collar", mirror(flap), fabric)
        elif face == "back":
            garment.add(
                "collar",
                both((0, -0.06), (w, -0.06, w * 1.02, -0.02), (w + 0.05, 0.06), (0.0, 0.085, 0.0, 0.085)),
                fabric,
            )
        else:
            garment.add("collar", outline((-0.15, -0.06), (0.0, -0.06, 0.11, 0.03), (0.20, 0.16), (0.12, 0.19),
                (0.02, 0.12, -0.16, 0.06)), fabric)  # fmt: skip
    elif kind == "roll":
        roll = both((0, -0.15), (w, -0.155, w * 1.05, -0.14), (w * 1.16, -0.04, w * 1.1, 0.05), (0.05, 0.09, 0, 0.09))
        garment.add("collar", roll * ([0.85, 1] if face == "side" else [1, 1]), fabric)
        garment.seam(outline((-w, -0.02), (0, 0.02, w, -0.02)))
    elif kind == "stand":
        stand = both(
            (0, -0.055 if face == "front" else -0.075),
            (w * 0.8, -0.075, w * 0.98, -0.075),
            (w * 1.12, 0.03),
            (w * 0.5, 0.09 if face == "front" else 0.06, 0, 0.09 if face == "front" else 0.06),
        )
        garment.add("collar", stand * ([0.9, 1] if face == "side" else [1, 1]), fabric)
    elif kind == "round":
        if face == "side":
            garment.add(
                "collar",
                outline((-0.15, -0.03), (0.0, -0.03, 0.11, 0.04), (0.22, 0.12, 0.19, 0.20), (0.05, 0.24, -0.19, 0.14)),
                fabric,
            )
        else:
            low = 0.17 if face == "front" else 0.15
            flap = outline(
                (0.01, depth * 0.9 if face == "front" else 0.0),
                (w * 0.9, 0.05, w, -0.02),
                (w + 0.15, 0.04, w + 0.1, 0.13),
                (w * 0.8, low + 0.08, 0.01, low),
            )
            garment.add("collar", flap, fabric)
            garment.add("collar", mirror(flap), fabric)
    elif kind == "lapel":
        if face == "front":
            lapel = outline((0.0, 0.42), (0.05, 0.2, w * 0.8, -0.03), (w + 0.05, 0.03), (w + 0.11, 0.13),
                (w + 0.05, 0.155), (w + 0.10, 0.19), (w * 0.9, 0.32, 0.0, 0.42))  # fmt: skip
            garment.add("collar", lapel, fabric)
            garment.add("collar", mirror(lapel), fabric)
        elif face == "back":
            garment.add(
                "collar", both((0, -0.055), (w, -0.05, w * 1.02, -0.02), (w + 0.07, 0.06), (0, 0.075, 0, 0.075)), fabric
            )
        else:
            garment.add("collar", outline((-0.15, -0.05), (0.0, -0.05, 0.10, 0.03), (0.21, 0.18), (0.20, 0.36),
                (0.08, 0.12, -0.16, 0.06)), fabric)  # fmt: skip
    elif kind == "hood":
        if face == "front":
            ring = both((0, 0.14), (w * 0.75, 0.12, w * 0.8, 0.0), (w * 0.85, -0.13, 0, -0.13))
            garment.add(
                "hood",
                both((0, -0.20), (w * 1.5, -0.21, w * 1.55, 0.0), (w * 1.6, 0.12, w * 0.9, 0.16), (0.02, 0.2, 0, 0.2)),
                fabric,
            )
            garment.add("hood", ring, "inner")
            for side in (-1, 1):
                garment.seam(outline((side * 0.05, 0.16), (side * 0.07, 0.27, side * 0.055, 0.34)), "cord")
        elif face == "back":
            garment.add(
                "hood",
                both((0, -0.10), (w * 1.35, -0.10, w * 1.45, 0.02), (w * 1.5, 0.22, 0.07, 0.31), (0, 0.33)),
                fabric,
            )
            garment.seam([(0, -0.09), (0, 0.31)])
        else:
            garment.add("hood", outline((0.10, 0.06), (0.16, -0.16, -0.06, -0.19), (-0.26, -0.18, -0.28, 0.05),
                (-0.2, 0.16, -0.08, 0.13)), fabric)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How a garment of the upper body is cut. Lengths in shirt widths; half widths for shoulder to hem.

    hip: None: between waist and hem. seam: y of a waist seam. tail: how far a shirt tail hangs in the middle.
    strap: width of a shoulder strap; 0: a full shoulder. placket: "short" ends at the chest.
    """

    length: float
    shoulder: float = 0.30
    chest: float = 0.30
    waist: float = 0.28
    hip: float | None = None
    hem: float = 0.29
    strap: float = 0.0
    neck_width: float | None = None
    collar: str | None = None
    placket: bool | str = False
    deep: bool = False
    rib: bool = False
    quilt: bool = False
    yoke: bool = False
    tail: float = 0.0
    seam: float | None = None

    @property
    def hips(self) -> float:
        return self.hip or (self.waist + self.hem) / 2 + (0.015 if self.hem > self.waist else 0)


def torso(face: str, style: Style, **shape: Any) -> Garment:
    """Sew shirts, knitwear, jackets, coats and dresses. `shape` holds the fields of a `Cut`."""
    cut = Cut(**shape)
    length, collar, waist, hem, seam, strap = cut.length, cut.collar, cut.waist, cut.hem, cut.seam, cut.strap
    shoulder, chest, hips, tail = cut.shoulder, cut.chest, cut.hips, cut.tail
    garment = Garment(waist=(seam or 0.56) if length > 0.9 else None, hem=length)
    neck = style.neck or ("v" if collar == "lapel" else "crew")
    sleeves = style.sleeves or "none"
    width = cut.neck_width or NECK_WIDTH[neck]
    depth = NECK_DEPTH[neck] if collar is None else dict(shirt=0.09, lapel=0.40, hood=0.12).get(collar, 0.06)
    if cut.deep:
        depth = 0.36
    if sleeves == "none" and not strap:
        shoulder -= 0.05
    waist_y = seam or 0.55
    hip_y = waist_y + (length - waist_y) * 0.4

    if face == "side":
        return torso_side(garment, style, cut, width, waist_y, hip_y)

    if face == "back":
        depth = min(depth, 0.03) if not strap else 0.14
    if sleeves != "none":
        add_arms(garment, sleeves, shoulder, chest, style.arm, style, cut.rib, cut.quilt)
    if strap:
        top = [(width + strap, 0.0), (width + strap * 0.9 + 0.02, 0.2, chest, 0.30)]
    else:
        top = [(shoulder, 0.05), (shoulder - 0.045 if sleeves == "none" else shoulder - 0.02, 0.2, chest, 0.31)]
    sides = [
        (waist + 0.005, waist_y - 0.12, waist, waist_y),
        (hips, waist_y + 0.05, hips, hip_y) if hem > waist else (hips, hip_y),
        (hem, length - 0.02),
        (hem * 0.55, length + tail * 1.6 + 0.035, 0.0, length + tail + 0.02),
    ]
    if face == "front":
        back_neck = outline((-width, 0.0), (0.0, 0.05 if not strap else 0.16, width, 0.0))
        low = outline((width * 0.98, depth * 0.5), (0.0, depth + 0.09, -width * 0.98, depth * 0.5))
        if collar not in ("hood", "roll"):
            garment.add("inner", np.concatenate([back_neck, low]), "inner")
    neckline = [(0.0, depth), *neckline_curve(neck if face == "front" else "crew", width, depth)]
    garment.add("body", both(*neckline, *top, *sides), panel=True)

    if cut.rib and style.trim != "hem":
        garment.add("rib", rectangle(-1, length - 0.085, 1, length + 0.2), "plain", clip="body")
    if cut.placket:
        end = depth + 0.3 if cut.placket == "short" else length + tail + 0.02
        if face == "front":
            garment.seam([(0.02, depth), (0.02, end)])
            if cut.placket is True:
                garment.seam([(-0.02, depth), (-0.02, end)], "stitch")
    if cut.yoke:
        garment.seam([(-shoulder, 0.2), (0, 0.22), (shoulder, 0.2)])
    if face == "back" and (collar == "shirt" or collar == "lapel"):
        garment.seam([(-shoulder + 0.02, 0.15), (0.0, 0.16), (shoulder - 0.02, 0.15)])
        garment.seam([(0.0, 0.16), (0.0, length)] if collar == "lapel" else [(0.0, 0.16), (0.0, 0.16)])
    if cut.quilt:
        for y in np.arange(0.17, length, 0.115):
            garment.seam(outline((-0.4, y), (0.0, y + 0.03, 0.4, y)), "quilt")
    if seam:
        garment.seam(outline((-waist, seam), (0, seam + 0.03, waist, seam)))
        for x in np.linspace(-0.75, 0.75, 6):
            garment.seam([(x * waist, seam + 0.03), (x * hem * 1.05, length)], "fold")
    if collar is None and face == "front":
        edge = outline((0.0, depth), *neckline_curve(neck, width, depth))
        garment.add("neckline", ribbon(np.concatenate([mirror(edge)[:-1], edge]), 0.035), "plain")
    elif collar is None:
        edge = outline((0.0, depth), (width * 0.95, depth, width, 0.0))
        garment.add("neckband", ribbon(np.concatenate([mirror(edge)[:-1], edge]), 0.03), "plain")
    add_collar(garment, collar, face, width, style, depth)
    garment.hanger = (shoulder, 0.0)
    return garment


def torso_side(garment: Garment, style: Style, cut: Cut, neck_width: float, waist_y: float, hip_y: float) -> Garment:
    """Add the same from the side, with the front at the right."""
    length, seam, sleeves = cut.length, cut.seam, style.sleeves or "none"
    w, h, e = cut.waist * 0.76, cut.hips * 0.78, cut.hem * 0.82
    if cut.collar not in ("hood", "roll"):
        garment.add("inner", ellipse(-0.01, 0.008, 0.115, 0.036), "inner")
    body = outline((-0.125, 0.0), (-0.01, 0.075, 0.105, 0.01), (0.145, 0.055), (0.19, 0.12, 0.215, 0.26),
        (0.235, 0.36, w + 0.01, waist_y - 0.08), (w, waist_y), (h + 0.01, hip_y), (e + 0.01, length - 0.02),
        (0.0, length + cut.tail * 0.3 + 0.03, -e, length - 0.01), (-h - 0.02, hip_y), (-w, waist_y),
        (-0.24, 0.36, -0.225, 0.24), (-0.205, 0.10, -0.155, 0.045))  # fmt: skip
    garment.add("body", body, panel=True)
    if cut.rib and style.trim != "hem":
        garment.add("rib", rectangle(-1, length - 0.085, 1, length + 0.2), "plain", clip="body")
    if cut.quilt:
        for y in np.arange(0.17, length, 0.115):
            garment.seam(outline((-0.4, y), (0.0, y + 0.03, 0.4, y)), "quilt")
    if seam:
        garment.seam([(-w, seam), (w, seam)])
        for x in np.linspace(-0.7, 0.7, 5):
            garment.seam([(x * w, seam + 0.03), (x * e, length)], "fold")
    add_collar(garment, cut.collar, "side", neck_width, style, 0.1)
    if sleeves == "none":
        hole = ellipse(-0.015, 0.20, 0.085, 0.115)
        garment.add("armhole", hole, "inner")
        return garment
    reach, cuff, bulge, _ = SLEEVE_SHAPES[sleeves]
    top_w, cuff_w, reach = (0.125 + bulge * 0.6, cuff * 0.62 + (0.04 if sleeves == "long" else 0.035), reach + 0.19)
    swing = 0.03 + style.arm * 0.002 + (0.03 if sleeves in ("long", "bell") else 0.0)
    fabric = "trim" if style.trim == "sleeves" else "main"
    cap = outline((-top_w, 0.28), (-top_w * 1.05, 0.085, -0.02, 0.075), (top_w * 1.0, 0.08, top_w, 0.28))
    sleeve = np.concatenate([cap, outline((top_w, 0.28),
        (top_w * 0.9 + swing * 0.3, reach * 0.65, cuff_w + swing, reach), (-cuff_w + swing, reach),
        (-top_w * 0.95 + swing * 0.2, reach * 0.65, -top_w, 0.28))[1:]])  # fmt: skip
    garment.add("sleeves", sleeve, fabric, panel=True)
    garment.seam(cap * [0.96, 1.0] + [0.0, 0.012])
    if sleeves != "short" and (cut.rib or style.trim == "cuffs"):
        trim = style.trim == "cuffs"
        garment.add(
            "trim" if trim else "cuff",
            rectangle(-cuff_w + swing - 0.012, reach - 0.1, cuff_w + swing + 0.012, reach + 0.003),
            "trim" if trim else "plain",
        )
    if cut.quilt:
        for y in np.arange(0.17, reach, 0.115):
            garment.seam(outline((-0.15, y), (0.0, y + 0.03, 0.15, y)), "quilt")
    return garment


def poncho(face: str, style: Style, *, length: float, collar: str | None = None, placket: bool = False) -> Garment:
    """Sew a poncho or cape: one bell-shaped piece."""
    garment = Garment(hem=length)
    neck = style.neck or "crew"
    width, depth = 0.12, NECK_DEPTH[neck] if collar is None else 0.06
    if face == "side":
        garment.add("body", outline((-0.1, 0.0), (0.08, 0.0), (0.26, 0.1, 0.34, length * 0.55), (0.40, length - 0.06),
            (0.0, length + 0.08, -0.42, length - 0.03), (-0.36, length * 0.5), (-0.26, 0.08, -0.1, 0.0)),
            panel=True)  # fmt: skip
        garment.seam(outline((0.0, 0.1), (0.05, length * 0.5, 0.02, length)), "fold")
    else:
        if face == "front":
            garment.add("inner", np.concatenate([outline((-width, 0.0), (0.0, 0.05, width, 0.0)),
                outline((width, depth * 0.5), (0.0, depth + 0.09, -width, depth * 0.5))]), "inner")  # fmt: skip
        else:
            depth, neck = 0.03, "crew"
        low = length + (0.12 if collar is None else 0.02)
        garment.add("body", both((0.0, depth), *neckline_curve(neck, width, depth), (0.33, 0.04, 0.44, 0.35),
            (0.58, length * 0.86), (0.30, length + 0.05, 0.0, low)), panel=True)  # fmt: skip
        garment.hem = low - 0.04
        for x in (-0.3, -0.12, 0.14, 0.32):
            garment.seam([(x * 0.6, 0.25), (x * 1.35, length)], "fold")
        if placket and face == "front":
            garment.seam([(0.0, depth), (0.0, low)])
        if collar is None:
            edge = outline((0.0, depth), *neckline_curve(neck, width, depth))
            garment.add(
                "neckline" if face == "front" else "neckband",
                ribbon(np.concatenate([mirror(edge)[:-1], edge]), 0.04),
                "plain",
            )
        garment.hanger = (0.25, 0.0)
    add_collar(garment, collar, face, width, style, depth)
    return garment
