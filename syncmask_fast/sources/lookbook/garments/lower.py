"""Trousers, skirts, jumpsuits and dungarees, from the front, the back and the side."""

from __future__ import annotations

import numpy as np

from syncmask_fast.sources.lookbook.garments.upper import (
    NECK_DEPTH,
    NECK_WIDTH,
    Cut,
    add_arms,
    neckline_curve,
    torso_side,
)
from syncmask_fast.sources.lookbook.geometry import Garment, Style, both, ellipse, mirror, outline, rectangle, ribbon


def _leg_half(
    top: float, hip: float, crotch: float, knee: float, leg: float, length: float, spread: float
) -> list[tuple[float, ...]]:
    """Return segments of the right leg from the hip's outside down, around the hem and up to the crotch."""
    middle = spread + 0.17
    knee_y = crotch + (length - crotch) * 0.5
    return [
        (hip + 0.005, top + 0.10, hip, top + 0.22),
        ((hip + middle + knee) / 2 + 0.01, knee_y - 0.1, middle + knee * 0.92, knee_y),
        (middle + leg, length),
        (middle, length + 0.025, middle - leg, length),
        (max(middle - knee, 0.012), knee_y),
        (max(middle - knee, 0.012) * 0.6, crotch + 0.1, 0.0, crotch),
    ]


def _trouser_seams(garment: Garment, face: str, top: float, crotch: float, length: float, middle: float) -> None:
    if face == "front":
        garment.seam(outline((0.0, top + 0.07), (0.0, crotch)))
        garment.seam(outline((0.06, top + 0.08), (0.06, crotch - 0.12, 0.0, crotch - 0.06)), "stitch")
        for side in (-1, 1):
            garment.seam(outline((side * 0.17, top + 0.07), (side * 0.19, top + 0.2, side * 0.29, top + 0.2)))
    else:
        garment.seam(outline((0.0, top + 0.07), (0.0, crotch)))
        for side in (-1, 1):
            garment.seam([(0.0, top + 0.18), (side * 0.28, top + 0.12)])
    for side in (-1, 1):
        garment.seam([(side * middle, crotch + 0.15), (side * middle, length)], "fold")


def legs(face: str, style: Style, *, length: float, knee: float, leg: float, rib: bool = False) -> Garment:
    """Sew trousers and shorts. `knee`, `leg`: half widths of the leg at the knee and at the hem."""
    garment = Garment(waist=0.045, hem=length)
    crotch = 0.42 if length > 0.7 else 0.38
    spread = 0.02 + max(0.0, knee - 0.17) + style.arm * 0.003
    waistband = "trim" if style.trim == "waistband" else "plain"
    if face == "side":
        body = outline((-0.20, 0.0), (0.20, 0.0), (0.25, 0.15, 0.24, 0.26),
            (knee + 0.04, crotch + (length - crotch) * 0.5), (leg + 0.04, length),
            (0.0, length + 0.02, -leg - 0.03, length), (-knee - 0.03, crotch + (length - crotch) * 0.5),
            (-0.30, 0.32, -0.28, 0.2), (-0.26, 0.1, -0.20, 0.0))  # fmt: skip
        garment.add("body", body, panel=True)
        garment.seam(outline((0.0, 0.08), (0.0, length)))
        garment.seam(outline((0.13, 0.07), (0.11, 0.24, -0.01, 0.26)))
    else:
        garment.add(
            "body",
            both(
                (0.0, 0.02 if face == "front" else 0.0),
                (0.15, 0.0, 0.25, 0.0),
                *_leg_half(0.0, 0.315, crotch, knee, leg, length, spread),
            ),
            panel=True,
        )
        _trouser_seams(garment, face, 0.0, crotch, length, spread + 0.17)
    garment.add(
        "trim" if waistband == "trim" else "waistband", rectangle(-0.6, -0.1, 0.6, 0.085), waistband, clip="body"
    )
    if rib and style.trim != "hem":
        garment.add("rib", rectangle(-1, length - 0.08, 1, length + 0.1), "plain", clip="body")
    garment.hanger = None
    return garment


def skirt(
    face: str, style: Style, *, length: float, hem: float, hip: float = 0.0, pleats: int = 0, tiers: int = 0
) -> Garment:
    garment = Garment(waist=0.045, hem=length)
    factor = 0.86 if face == "side" else 1.0
    waist = 0.23
    hip = hip or waist + (hem - waist) * 0.5 + 0.02
    top = 0.025 if face == "front" else 0.0
    body = both((0.0, top), (waist * 0.6, 0.0, waist, 0.0), (hip, 0.12, hip, 0.32 * min(1.0, length / 0.7)),
        (hem, length - 0.03), (hem * 0.5, length + 0.045, 0.0, length + 0.04))  # fmt: skip
    garment.add("body", body * [factor, 1.0], panel=True)
    waistband = "trim" if style.trim == "waistband" else "plain"
    garment.add(
        "trim" if waistband == "trim" else "waistband", rectangle(-0.6, -0.1, 0.6, 0.09), waistband, clip="body"
    )
    for x in np.linspace(-0.85, 0.85, pleats) if pleats else []:
        garment.seam(np.array([(x * waist, 0.09), (x * hem, length + 0.03)]) * [factor, 1.0], "pleat")
    for i in range(1, tiers):
        y = 0.09 + (length - 0.09) * i / tiers
        garment.seam(np.array(outline((-0.6, y), (0.0, y + 0.04, 0.6, y))), "quilt")
    if not pleats:
        for x in (-0.6, -0.2, 0.25, 0.65):
            garment.seam(np.array([(x * waist, 0.18), (x * hem * 1.05, length)]) * [factor, 1.0], "fold")
    if face == "front" and not pleats and not tiers:
        for side in (-1, 1):
            garment.seam([(side * 0.11, 0.09), (side * 0.13, 0.22)])
    elif face == "back" and not tiers:
        garment.seam([(0.0, 0.09), (0.0, length)])
    return garment


def jumpsuit(face: str, style: Style, *, length: float, leg: float) -> Garment:
    """Sew a bodice with trouser legs."""
    garment = Garment(waist=0.53, hem=length)
    neck, sleeves = style.neck or "crew", style.sleeves or "none"
    width, depth = NECK_WIDTH[neck], NECK_DEPTH[neck]
    shoulder = 0.30 if sleeves != "none" else 0.25
    crotch = 0.86 if length > 1.2 else 0.80
    if face == "side":
        torso_side(garment, style, Cut(length=0.80, waist=0.25, hip=0.28, hem=0.29), width, 0.53, 0.68)
        lower = outline((-0.20, 0.52), (0.20, 0.52), (0.25, 0.64, 0.235, 0.75), (leg + 0.03, length),
            (0.0, length + 0.02, -leg - 0.03, length), (-0.29, 0.84, -0.27, 0.72),
            (-0.24, 0.6, -0.20, 0.52))  # fmt: skip
        first = garment.pieces.index(next(piece for piece in garment.pieces if piece.name == "body"))
        body = garment.pieces[first]
        upper = body.polygon[body.polygon[:, 1] < 0.56]
        garment.pieces[first] = type(body)("body", upper, "main", True)
        garment.pieces.insert(first, type(body)("body", lower, "main", True))
        garment.seam([(-0.2, 0.53), (0.2, 0.53)])
        return garment
    if sleeves != "none":
        add_arms(garment, sleeves, shoulder, 0.30, style.arm, style, False, False)
    if face == "front":
        garment.add("inner", np.concatenate([outline((-width, 0.0), (0.0, 0.05, width, 0.0)),
            outline((width, depth * 0.5), (0.0, depth + 0.09, -width, depth * 0.5))]), "inner")  # fmt: skip
    else:
        depth, neck = 0.03, "crew"
    spread = 0.02 + max(0.0, leg - 0.17) + style.arm * 0.003
    garment.add("body", both((0.0, depth), *neckline_curve(neck, width, depth), (shoulder, 0.05),
        (shoulder - 0.03, 0.2, 0.29, 0.31), (0.25, 0.42, 0.24, 0.53), *_leg_half(0.53, 0.31, crotch, leg, leg, length,
        spread)), panel=True)  # fmt: skip
    _trouser_seams(garment, face, 0.5, crotch, length, spread + 0.17)
    garment.seam([(-0.24, 0.53), (0.24, 0.53)])
    edge = outline((0.0, depth), *neckline_curve(neck, width, depth))
    garment.add(
        "neckline" if face == "front" else "neckband", ribbon(np.concatenate([mirror(edge)[:-1], edge]), 0.035), "plain"
    )
    if style.trim == "cuffs":
        garment.add("trim", rectangle(-1, length - 0.09, 1, length + 0.1), "trim", clip="body")
    garment.hanger = (shoulder, 0.0)
    return garment


def dungarees(face: str, style: Style, *, length: float) -> Garment:
    garment = Garment(hem=length)
    straps = "trim" if style.trim == "straps" else "plain"
    name = "trim" if straps == "trim" else "straps"
    leg, crotch, spread = 0.165, 0.84, 0.02 + style.arm * 0.003
    if face == "side":
        garment.add(
            name, ribbon(outline((-0.12, 0.42), (-0.1, 0.02, 0.02, 0.0), (0.12, 0.02, 0.15, 0.2)), 0.06), straps
        )
        garment.add("body", outline((0.02, 0.2), (0.19, 0.16), (0.20, 0.5), (0.25, 0.62, 0.235, 0.72),
            (leg + 0.04, length), (0.0, length + 0.02, -leg - 0.03, length), (-0.29, 0.84, -0.27, 0.70), (-0.22, 0.55),
            (-0.19, 0.40), (-0.05, 0.44, 0.02, 0.2)), panel=True)  # fmt: skip
        garment.seam([(0.0, 0.5), (0.0, length)])
        return garment
    lower = _leg_half(0.50, 0.31, crotch, leg, leg, length, spread)
    strap = (
        outline((0.17, 0.2), (0.15, 0.05, 0.10, 0.0))
        if face == "front"
        else outline((0.06, 0.4), (0.12, 0.15, 0.10, 0.0))
    )
    for line in (strap, strap * [-1, 1]):
        garment.add(name, ribbon(line, 0.07), straps)
    bib = (
        [(0.0, 0.16), (0.20, 0.16), (0.21, 0.36), (0.27, 0.44)]
        if face == "front"
        else [(0.0, 0.34), (0.10, 0.34), (0.22, 0.44)]
    )
    garment.add("body", both(*bib, (0.25, 0.5), *lower), panel=True)
    garment.seam([(-0.26, 0.5), (0.26, 0.5)])
    if face == "front":
        for side in (-1, 1):
            garment.add("buckle", ellipse(side * 0.17, 0.205, 0.034, 0.034), "metal")
    _trouser_seams(garment, face, 0.45, crotch, length, spread + 0.17)
    return garment
