"""Bags, shoes, hats and scarves, from the front, the back and the side."""

from __future__ import annotations

import numpy as np

from syncmask_fast.sources.lookbook.geometry import Garment, Style, both, ellipse, mirror, outline, rectangle, ribbon


def trimmed(style: Style, place: str) -> tuple[str, str]:
    """Return name and fabric of a piece that may be the contrasting one."""
    return ("trim", "trim") if style.trim == place else (place, "plain")


def bag(face: str, style: Style, *, kind: str) -> Garment:
    garment = Garment()
    name, fabric = trimmed(style, "handles")
    side = face == "side"
    if kind == "tote":
        x = 0.24 if side else 0.42
        if side:
            garment.add(name, ribbon(outline((-0.07, 0.02), (0.0, -0.72, 0.07, 0.02)), 0.045), fabric)
        else:
            garment.add(
                name,
                ribbon(outline((-0.22, 0.14), (-0.22, -0.42, 0.0, -0.42), (0.22, -0.42, 0.22, 0.14)), 0.05),
                fabric,
            )
        garment.add("body", both((0.0, 0.012), (x * 0.96, 0.0), (x, 0.80), (0.0, 0.86, 0.0, 0.86)), panel=True)
        garment.seam([(-x, 0.07), (x, 0.07)], "stitch")
        if side:
            garment.seam([(0.0, 0.0), (0.0, 0.8)], "fold")
        if not side:
            for s in (-1, 1):
                garment.add(name, rectangle(s * 0.22 - 0.025, 0.0, s * 0.22 + 0.025, 0.16), fabric)
    elif kind == "satchel":
        x = 0.26 if side else 0.47
        if side:
            garment.add(name, ribbon(outline((-0.03, 0.05), (0.0, -0.5, 0.03, 0.05)), 0.05), fabric)
        else:
            garment.add(
                name, ribbon(outline((-0.2, 0.04), (-0.19, -0.24, 0.0, -0.24), (0.19, -0.24, 0.2, 0.04)), 0.055), fabric
            )
        garment.add("body", both((0.0, 0.0), (x - 0.05, 0.0), (x, 0.0, x, 0.06), (x + 0.02, 0.62),
            (x, 0.70, x - 0.06, 0.70), (0.0, 0.70)), panel=True)  # fmt: skip
        name, fabric = trimmed(style, "flap")
        if face == "front":
            garment.add(
                name,
                both((0.0, -0.01), (x, -0.01), (x + 0.012, 0.2), (x, 0.40, x - 0.12, 0.40), (0.0, 0.42)),
                fabric if fabric == "trim" else "main",
                panel=True,
            )
            garment.add("clasp", rectangle(-0.05, 0.37, 0.05, 0.47), "metal")
        elif side:
            garment.add(
                name, outline((-0.2, -0.01), (0.27, -0.01), (0.29, 0.4), (0.22, 0.4), (0.2, 0.08), (-0.2, 0.06)), fabric
            )
            garment.seam(outline((0.0, 0.08), (-0.08, 0.4, 0.0, 0.7)), "fold")
        else:
            garment.seam([(-x, 0.12), (x, 0.12)])
            garment.add(name, rectangle(-x, -0.012, x, 0.05), fabric)
    elif kind == "backpack":
        x = 0.27 if side else 0.40
        if face == "back":
            garment.add(
                "body",
                both((0.0, 0.0), (x * 0.95, 0.0, x, 0.26), (x + 0.02, 0.85), (x, 0.97, x - 0.1, 0.97), (0.0, 0.97)),
                panel=True,
            )
            for s in (-1, 1):
                garment.add(name, ribbon(outline((s * 0.12, 0.06), (s * 0.40, 0.35, s * 0.30, 0.88)), 0.085), fabric)
        else:
            body = both((0.0, 0.0), (x * 0.95, 0.0, x, 0.26), (x + 0.02, 0.85), (x, 0.97, x - 0.1, 0.97), (0.0, 0.97))
            if side:
                garment.add(name, ribbon(outline((-0.16, 0.1), (-0.46, 0.35, -0.24, 0.88)), 0.07), fabric)
            garment.add("body", body, panel=True)
            garment.seam(outline((-x * 0.9, 0.2), (0.0, -0.02, x * 0.9, 0.2)))
            if face == "front":
                garment.seam(both((0.0, 0.50), (x * 0.8, 0.5), (x * 0.85, 0.9), (0.0, 0.9)))
        garment.add(name, ribbon(outline((-0.07, 0.02), (0.0, -0.2, 0.07, 0.02)), 0.04), fabric)
        base, fabric = trimmed(style, "base")
        if base == "trim":
            garment.add("trim", rectangle(-1.0, 0.80, 1.0, 1.1), "trim", clip="body")
        return garment
    elif kind == "bucket":
        x = 0.34 if side else 0.37
        garment.add(
            name,
            ribbon(
                outline((-0.3, 0.06), (0.0, -0.85 if not side else -0.8, 0.3, 0.06)) * ([0.4, 1] if side else [1, 1]),
                0.045,
            ),
            fabric,
        )
        garment.add("inner", ellipse(0.0, 0.03, x * 0.93, 0.06), "inner")
        garment.add("body", both((0.0, 0.09), (x * 0.6, 0.09, x * 0.94, 0.03), (x * 0.8, 0.3), (x, 0.6, x * 0.98, 0.74),
            (x * 0.6, 0.83, 0.0, 0.83)), panel=True)  # fmt: skip
        garment.seam(outline((-x, 0.14), (0.0, 0.22, x, 0.14)), "cord")
    elif kind == "clutch":
        x = 0.22 if side else 0.54
        garment.add(
            "body",
            both((0.0, 0.0), (x - 0.04, 0.0), (x, 0.0, x, 0.05), (x, 0.52), (x, 0.57, x - 0.05, 0.57), (0.0, 0.57)),
            panel=True,
        )
        if face == "front":
            garment.seam([(-x, 0.02), (0.0, 0.36), (x, 0.02)])
            garment.add("clasp", ellipse(0.0, 0.36, 0.04, 0.04), "metal")
        elif face == "back":
            garment.seam([(-x, 0.1), (x, 0.1)])
        else:
            garment.seam([(0.0, 0.0), (-0.06, 0.3), (0.0, 0.57)], "fold")
    else:
        x = 0.32 if side else 0.56
        if side:
            garment.add(name, ribbon(outline((-0.06, 0.1), (0.0, -0.5, 0.06, 0.1)), 0.05), fabric)
            garment.add("body", ellipse(0.0, 0.33, 0.36, 0.33), panel=True)
            end, fabric = trimmed(style, "ends")
            if end == "trim":
                garment.add("trim", ribbon(ellipse(0.0, 0.33, 0.335, 0.305, 48)[list(range(48)) + [0]], 0.06), "trim")
            return garment
        garment.add(
            name, ribbon(outline((-0.22, 0.3), (-0.22, -0.32, 0.0, -0.32), (0.22, -0.32, 0.22, 0.3)), 0.055), fabric
        )
        garment.add(
            "body",
            both((0.0, 0.0), (x - 0.16, 0.0), (x, 0.0, x, 0.2), (x, 0.46), (x, 0.64, x - 0.14, 0.64), (0.0, 0.64)),
            panel=True,
        )
        for s in (-1, 1):
            garment.add(name, rectangle(s * 0.22 - 0.0275, 0.0, s * 0.22 + 0.0275, 0.64), fabric)
        end, fabric = trimmed(style, "ends")
        for s in (-1, 1):
            garment.seam([(s * 0.42, 0.0), (s * 0.42, 0.64)])
            if end == "trim":
                garment.add("trim", rectangle(s * 0.42, -0.1, s * 0.8, 0.9), "trim", clip="body")
    if style.trim == "base":
        low = garment.bounds()[3]
        garment.add("trim", rectangle(-1.0, low - 0.16, 1.0, low + 0.2), "trim", clip="body")
    return garment


def shoe(face: str, style: Style, *, kind: str) -> Garment:
    """Sew one shoe. "front" is its outer side with the toe to the right, "back" its inner side; no side view."""
    if face == "back":
        return shoe("front", style, kind=kind).stretched(-1.0, 1.0)
    garment = Garment()
    sole, fabric = trimmed(style, "sole")
    fabric = fabric if sole == "trim" else "sole"
    if kind == "pump":
        garment.add(
            "inner",
            outline((-0.50, 0.05), (-0.30, 0.16, -0.12, 0.34), (0.02, 0.40), (-0.1, 0.42, -0.46, 0.16)),
            "inner",
        )
        garment.add("body", outline((-0.50, 0.04), (-0.40, 0.24, -0.12, 0.36), (0.02, 0.42, 0.14, 0.36),
            (0.42, 0.42, 0.56, 0.63), (0.55, 0.70, 0.46, 0.70), (0.2, 0.70), (-0.05, 0.60, -0.22, 0.46), (-0.44, 0.36),
            (-0.54, 0.2, -0.50, 0.04)), panel=True)  # fmt: skip
        garment.add(sole, outline((-0.50, 0.30), (-0.24, 0.46), (-0.36, 0.52, -0.405, 0.80), (-0.47, 0.80),
            (-0.47, 0.5, -0.50, 0.30)), fabric)  # fmt: skip
        garment.add(sole, outline((0.57, 0.66), (0.54, 0.755, 0.42, 0.755), (0.16, 0.755), (-0.06, 0.64, -0.22, 0.47),
            (-0.05, 0.60, 0.2, 0.70), (0.46, 0.70)), fabric)  # fmt: skip
        base = 0.76
    else:
        tall = dict(sneaker=0.46, ankle=0.66, tall=1.10, loafer=0.38)[kind]
        base = tall + 0.14
        if kind in ("sneaker", "loafer"):
            tongue = 0.30 if kind == "sneaker" else 0.20
            garment.add(
                "inner",
                outline((-0.48, 0.05), (-0.2, -0.06, 0.02, 0.02), (0.08, 0.10), (-0.2, 0.18, -0.48, 0.08)),
                "inner",
            )
            garment.add("body", outline((-0.50, 0.03), (-0.30, 0.14, -0.14, 0.10), (0.02, 0.0),
                (0.14, 0.16, 0.28, tongue - 0.02), (0.52, tall - 0.2, 0.56, tall - 0.04), (0.56, tall + 0.03),
                (-0.52, tall + 0.03), (-0.56, tall - 0.2, -0.50, 0.03)), panel=True)  # fmt: skip
            garment.add(sole, outline((-0.54, tall), (0.57, tall), (0.61, tall + 0.05, 0.57, tall + 0.13),
                (-0.52, tall + 0.13), (-0.57, tall + 0.08, -0.54, tall)), fabric)  # fmt: skip
            garment.seam(
                outline((0.26, tongue + 0.02), (0.30, tall - 0.04, 0.18, tall))
                if kind == "sneaker"
                else outline((0.12, 0.12), (0.28, 0.34, 0.52, tall - 0.1))
            )
        else:
            garment.add("inner", ellipse(-0.25, 0.0, 0.22, 0.045), "inner")
            garment.add("body", outline((-0.48, 0.0), (-0.25, 0.06, -0.02, 0.0), (0.0, tall - 0.36),
                (0.04, tall - 0.26, 0.22, tall - 0.22), (0.52, tall - 0.20, 0.56, tall - 0.03), (0.56, tall + 0.03),
                (-0.50, tall + 0.03), (-0.54, tall - 0.25, -0.46, tall - 0.4)), panel=True)  # fmt: skip
            garment.add(sole, outline((-0.54, tall), (0.58, tall), (0.60, tall + 0.08, 0.54, tall + 0.12),
                (-0.1, tall + 0.12), (-0.2, tall + 0.10), (-0.22, base), (-0.52, base),
                (-0.56, tall + 0.06, -0.54, tall)), fabric)  # fmt: skip
        garment.seam(outline((-0.30, 0.12), (-0.24, 0.25, -0.36, tall)))
    if style.trim == "toe cap":
        garment.add("trim", ellipse(0.62, base - 0.13, 0.30, 0.30), "trim", clip="body")
    if style.trim == "top band":
        garment.add("trim", rectangle(-1.0, -0.1, 1.0, 0.13), "trim", clip="body")
    return garment


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
        garment.add("body", outline((-0.34, 0.46), (-0.62, 0.44, -0.56, 0.22), (-0.44, 0.0, 0.02, 0.02),
            (0.46, 0.02, 0.56, 0.26), (0.60, 0.50, 0.34, 0.50)) * [tilt, 1.0], panel=True)  # fmt: skip
        garment.add(name, both((0.0, 0.47), (0.2, 0.47, 0.35, 0.43), (0.36, 0.54), (0.2, 0.59, 0.0, 0.59)), fabric)
        garment.add("stalk", ribbon(outline((0.0, 0.03), (0.01, -0.02, 0.04, -0.05)), 0.035), "plain")
    return garment


def scarf(face: str, style: Style, *, kind: str) -> Garment:
    """Sew a scarf. It is flat and has no side view."""
    garment = Garment()
    flip = np.array([1.0 if face == "front" else -1.0, 1.0])
    if kind == "long":
        under = outline((-0.20, 0.0), (0.16, 0.02, 0.34, 0.9), (0.02, 0.96), (-0.12, 0.4, -0.34, 0.16))
        over = outline((0.20, 0.0), (-0.16, 0.04, -0.38, 0.82), (-0.04, 0.90), (0.10, 0.45, 0.34, 0.16))
        for piece in (under, over):
            garment.add("body", piece * flip, panel=True)
        garment.add("neck", outline((-0.34, 0.16), (-0.28, -0.14, 0.0, -0.14), (0.28, -0.14, 0.34, 0.16), (0.22, 0.26),
            (0.0, 0.02, 0.0, 0.02), (-0.22, 0.26)) * flip, "main")  # fmt: skip
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
