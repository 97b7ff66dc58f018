"""Hats and scarves: their parts from the front, the back and the side."""

from __future__ import annotations

import numpy as np

from .garments_carried import trimmed
from .geometry import both, ellipse, mirror, outline, rectangle, ribbon
from .parts import Garment, Style


def hat(face: str, style: Style, *, kind: str) -> Garment:
    garment = Garment()
    name, fabric = trimmed(style, "brim")
    if kind == "beanie":
        garment.add(
            "body",
            both((0.0, 0.0), (0.36, 0.0, 0.40, 0.46), (0.41, 0.72), (0.0, 0.76))
            * ([1.06, 1] if face == "side" else [1, 1]),
            panel=True,
        )
        garment.add(
            name, both((0.0, 0.50), (0.25, 0.50, 0.43, 0.46), (0.45, 0.60, 0.43, 0.72), (0.2, 0.77, 0.0, 0.77)), fabric
        )
        for x in (-0.24, 0.0, 0.24):
            garment.seam(outline((x * 0.2, 0.02), (x * 1.1, 0.2, x * 1.3, 0.48)), "fold")
    elif kind == "bucket":
        garment.add(
            "body",
            both((0.0, 0.0), (0.26, 0.0), (0.30, 0.0, 0.31, 0.06), (0.37, 0.44), (0.0, 0.49, 0.0, 0.49)),
            panel=True,
        )
        garment.add(
            name, both((0.0, 0.44), (0.25, 0.44, 0.36, 0.38), (0.52, 0.66), (0.3, 0.74, 0.0, 0.74)), fabric, panel=True
        )
        garment.seam(outline((-0.44, 0.53), (0.0, 0.64, 0.44, 0.53)), "stitch")
        garment.seam(outline((-0.32, 0.08), (0.0, 0.12, 0.32, 0.08)))
    elif kind == "cap":
        if face == "side":
            garment.add(
                "body",
                outline((-0.40, 0.48), (-0.44, 0.0, 0.0, 0.0), (0.34, 0.02, 0.36, 0.46), (0.0, 0.54, -0.40, 0.48)),
                panel=True,
            )
            garment.add(
                name,
                outline((0.10, 0.47), (0.40, 0.38, 0.74, 0.52), (0.76, 0.56, 0.70, 0.58), (0.4, 0.52, 0.12, 0.54)),
                fabric,
            )
        else:
            garment.add("body", both((0.0, 0.0), (0.38, 0.0, 0.40, 0.46), (0.2, 0.54, 0.0, 0.54)), panel=True)
            if face == "front":
                garment.add(
                    name,
                    both((0.0, 0.44), (0.28, 0.44, 0.38, 0.50), (0.42, 0.58, 0.40, 0.66), (0.2, 0.60, 0.0, 0.60)),
                    fabric,
                )
            else:
                garment.add("gap", both((0.0, 0.34), (0.14, 0.34, 0.15, 0.47), (0.0, 0.485)), "inner")
                garment.add(name, rectangle(-0.16, 0.47, 0.16, 0.535), fabric)
        for x in (-0.6, 0.0, 0.6):
            garment.seam(outline((0.0, 0.0), (x * 0.5, 0.1, x * 0.55, 0.5)))
        garment.add("button", ellipse(0.0, 0.0, 0.035, 0.02), "plain")
    elif kind == "sun":
        garment.add(name, ellipse(0.0, 0.50, 0.66, 0.22), fabric if fabric == "trim" else "main", panel=False)
        garment.add("body", both((0.0, 0.0), (0.26, 0.0, 0.30, 0.20), (0.36, 0.50), (0.2, 0.58, 0.0, 0.58)), panel=True)
        band, fabric = trimmed(style, "hatband")
        garment.add(band, both((0.0, 0.46), (0.2, 0.46, 0.345, 0.38), (0.36, 0.50), (0.2, 0.58, 0.0, 0.58)), fabric)
    else:
        tilt = 1.0 if face != "back" else -1.0
        garment.add(
            "body",
            outline(
                (-0.34, 0.46),
                (-0.62, 0.44, -0.56, 0.22),
                (-0.44, 0.0, 0.02, 0.02),
                (0.46, 0.02, 0.56, 0.26),
                (0.60, 0.50, 0.34, 0.50),
            )
            * [tilt, 1.0],
            panel=True,
        )
        garment.add(name, both((0.0, 0.47), (0.2, 0.47, 0.35, 0.43), (0.36, 0.54), (0.2, 0.59, 0.0, 0.59)), fabric)
        garment.add("stalk", ribbon(outline((0.0, 0.03), (0.01, -0.02, 0.04, -0.05)), 0.035), "plain")
    return garment


def scarf(face: str, style: Style, *, kind: str) -> Garment:
    """Scarves lie flat; they have no side view."""
    garment = Garment()
    flip = np.array([1.0 if face == "front" else -1.0, 1.0])
    if kind == "long":
        under = outline((-0.20, 0.0), (0.16, 0.02, 0.34, 0.9), (0.02, 0.96), (-0.12, 0.4, -0.34, 0.16))
        over = outline((0.20, 0.0), (-0.16, 0.04, -0.38, 0.82), (-0.04, 0.90), (0.10, 0.45, 0.34, 0.16))
        for piece in (under, over):
            garment.add("body", piece * flip, panel=True)
        garment.add(
            "neck",
            outline(
                (-0.34, 0.16),
                (-0.28, -0.14, 0.0, -0.14),
                (0.28, -0.14, 0.34, 0.16),
                (0.22, 0.26),
                (0.0, 0.02, 0.0, 0.02),
                (-0.22, 0.26),
            )
            * flip,
            "main",
        )
        trim = style.trim == "ends"
        for a, b, drop in (((-0.38, 0.82), (-0.04, 0.90), 0.12), ((0.02, 0.96), (0.34, 0.9), 0.12)):
            start, end = np.array(a), np.array(b)
            for t in np.linspace(0.03, 0.97, 9):
                top = start + (end - start) * t
                garment.add(
                    "trim" if trim else "ends",
                    rectangle(top[0] - 0.014, top[1] - 0.02, top[0] + 0.014, top[1] + drop) * flip,
                    "trim" if trim else "plain",
                )
    elif kind == "shawl":
        body = both((0.0, 0.0), (0.62, 0.04), (0.34, 0.5, 0.0, 0.82)) * flip
        garment.add("body", body, panel=True)
        for x in (-0.3, 0.0, 0.3):
            garment.seam([(x, 0.05), (x * 0.4, 0.6)], "fold")
        trim = style.trim == "edge"
        edge = outline((0.62, 0.04), (0.34, 0.5, 0.0, 0.82))
        for line in (edge, mirror(edge)):
            garment.add("trim" if trim else "edge", ribbon(line, 0.07), "trim" if trim else "plain")
    else:
        body = (
            both((0.0, 0.0), (0.46, 0.43), (0.0, 0.88))
            if face == "front"
            else both((0.0, 0.0), (0.45, 0.0), (0.42, 0.40, 0.44, 0.82), (0.0, 0.84))
        )
        garment.add("body", body, panel=True)
        garment.seam(outline((-0.2, 0.2), (0.0, 0.5, 0.1, 0.7)), "fold")
        trim = style.trim == "edge"
        inner = (body - body.mean(axis=0)) * 0.96 + body.mean(axis=0)
        garment.add(
            "trim" if trim else "edge", ribbon(np.concatenate([inner, inner[:1]]), 0.06), "trim" if trim else "plain"
        )
    return garment
