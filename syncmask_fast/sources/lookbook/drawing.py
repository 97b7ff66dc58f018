"""A view of a product: its image, with the box of every attribute that it shows.

Shapes are painted flat on a larger canvas, and also on a map of numbers: which thing is visible at which pixel. Boxes
and visible fractions are counted on that map, after turning, covering and cropping. Light comes after (light.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from syncmask_fast.sources.lookbook.canvas import Box, Canvas, Regions, among, as_image, where
from syncmask_fast.sources.lookbook.catalogue import INSIDE, Detail, Product, garment_of, stream
from syncmask_fast.sources.lookbook.details import KINDS, Brush
from syncmask_fast.sources.lookbook.fabric import COLORS, RGB, darker, draw_pattern, lighter, mix
from syncmask_fast.sources.lookbook.geometry import Affine, Garment, Piece, affine, area, contains, outline, rectangle
from syncmask_fast.sources.lookbook.light import crease, photograph

VISIBLE_SHARE = 0.30  # less of a thing than this counts as hidden
SMALLEST = 4.0  # a box below this (pixels at size 96) counts as hidden
FLAT = ("print", "lettering", "embroidery", "band", "lacing", "cut-out", "quilting", "lace")  # cast no shadow
FLAP_OUTER = outline(
    (-0.3, -0.3), (1.0, -0.3), (1.0, 0.02), (1.02, 0.34, 0.95, 0.62), (0.5, 0.69, -0.02, 0.62), (-0.3, 0.6)
)
FLAP_INNER = outline(
    (-0.3, -0.3), (0.95, -0.3), (0.95, 0.02), (0.965, 0.32, 0.90, 0.57), (0.5, 0.635, -0.02, 0.57), (-0.3, 0.55)
)


@dataclass
class View:
    """One image before it is encoded. `boxes` has every attribute: [x0, y0, x1, y1] in pixels, or None if hidden."""

    image: Image.Image
    boxes: dict[str, Box | None]
    share: float  # of the picture's area that the garment's box takes


def render(product: Product, index: int, size: int, seed: int, split: str, *, without: str | None = None) -> View:
    """Draw view `index` of `product.views` at `size` x `size` pixels. `without`: skip one kind of detail, for tests."""
    g = stream(seed, split, product.number, "view", index)
    close = product.views[index] == "detail"
    face, target, flap = _subject(product, index, g)
    garment = garment_of(product, face)
    canvas = Canvas(size, 2, product.rgb)
    fit = _fit(garment, canvas.n, g)
    place = _zoom(garment, fit, face, target, flap is not None, canvas.n, g) if close else fit
    hanger = not close and g.random() < 0.16
    scene = _Scene(product, garment, canvas, place, face, close, without)
    if hanger and garment.hanger:
        scene.hang(*garment.hanger, (150, 106, 66) if g.random() < 0.6 else (70, 70, 74))
    scene.paint_pieces()
    if flap is not None:
        scene.turn_over(affine(canvas.n).after(flap))
    scene.base = canvas.seen.copy()
    scene.paint_details(None if flap is None else affine(canvas.n).after(flap))
    crease(canvas, place, garment.bounds(), product.material, scene.unit, g)
    picture = photograph(canvas, product.rgb, product.material, close, g)
    base = Regions(scene.base)
    x0, y0, x1, y1 = base.all or (0, 0, 0, 0)
    return View(picture, scene.boxes(base), (x1 - x0) * (y1 - y0) / canvas.n**2)


def _subject(product: Product, index: int, g: np.random.Generator) -> tuple[str, Detail | None, Affine | None]:
    """Return the face of a view, and for a close-up its detail and its turned-over flap, or None.

    The flap is a map from its units to the image's, which is one unit wide.
    """
    view = product.views[index]
    if view != "detail":
        return view, None, None
    shown = [(face, d) for d in product.details for face in d.places if face != INSIDE]
    hidden = product.lining_named or any(INSIDE in d.places for d in product.details)
    face, target = ("front" if g.random() < 0.6 else "back"), None
    if shown:
        face, target = shown[int(g.integers(len(shown)))]
    if not hidden or g.random() >= 0.8:
        return face, target, None
    corner, wide = int(g.integers(4)), g.uniform(0.66, 0.82)
    turn = g.uniform(-10, 10) + (180 if corner >= 2 else 0)
    spot = ((-0.05, -0.04), (1.06 - wide, -0.04), (1.05, 1.04), (wide - 0.06, 1.04))[corner]
    return face, target, affine(wide, turn, offset=spot)


def _fit(garment: Garment, n: int, g: np.random.Generator) -> Affine:
    """Map garment units to pixels in a full view: turned, leaning, its box 35 to 64 % of the image, anywhere."""
    turn = affine(1.0, float(np.clip(g.normal(0, 5.5), -13, 13)), float(g.uniform(-0.06, 0.06)))
    points = turn(np.concatenate([piece.polygon for piece in garment.pieces if piece.clip is None]))
    low, high = points.min(axis=0), points.max(axis=0)
    extent = high - low
    scale = min(math.sqrt(g.uniform(0.40, 0.64) / float(extent.prod())), g.uniform(0.90, 0.965) / float(extent.max()))
    corner = (1.0 - scale * extent) * g.uniform(0.06, 0.94, 2)
    return affine(n).after(Affine(turn.matrix * scale, corner - scale * low))


def _zoom(
    garment: Garment, fit: Affine, face: str, target: Detail | None, flapped: bool, n: int, g: np.random.Generator
) -> Affine:
    """Map garment units to pixels in a close-up, 1.5 to 2.7 times as large as `fit`.

    The target, or else the middle of the garment, is near the middle.
    """
    if target is not None:
        spot = target.places[face]
        center, reach = np.array([spot.x, spot.y]), max(spot.width, spot.height)
    else:
        panel = max((piece.polygon for piece in garment.pieces if piece.panel), key=area)
        center, reach = panel.mean(axis=0) + g.uniform(-0.05, 0.05, 2), 0.25
    matrix = fit.matrix * float(np.clip(g.uniform(0.30, 0.46) * n / (reach * fit.scale), 1.5, 2.7))
    at = np.array([g.uniform(0.35, 0.65), 0.5]) if flapped else 0.5 + g.uniform(-0.12, 0.12, 2)
    return Affine(matrix, n * at - matrix @ center)


class _Scene:
    """A garment on its canvas: first the pieces (`base` is their map of numbers), then the details."""

    def __init__(
        self,
        product: Product,
        garment: Garment,
        canvas: Canvas,
        place: Affine,
        face: str,
        close: bool,
        without: str | None,
    ) -> None:
        self.product, self.garment, self.canvas, self.place = product, garment, canvas, place
        self.face, self.close, self.without = face, close, without
        self.unit = canvas.size / 96 * (1.7 if close else 1.0)
        self.thin = max(1, round(canvas.n / 300))
        self.edge = darker(product.rgb, 0.45)
        self.full: dict[str, float] = {}  # pixels of whole details, unhidden and uncut
        self.spots: dict[str, tuple[int, int, int, int]] = {}  # where details were laid on
        self.base = canvas.seen
        self._pattern: Image.Image | None = None

    # Parts

    def _fill(self, fabric: str) -> RGB | Image.Image:
        p = self.product
        if fabric == "main" and p.pattern:
            if self._pattern is None:
                x0, y0, x1, y1 = self.garment.bounds()
                self._pattern = self._printed(p.pattern, p.rgb, mix(COLORS[p.pattern_color or "white"], p.rgb, 0.08),
                    self.place, (x0 - 0.1, y0 - 0.1, x1 + 0.1, y1 + 0.1), p.pattern_scale * max(x1 - x0,
                    y1 - y0) / 1.1)  # fmt: skip
            return self._pattern
        sole = (236, 232, 226) if sum(p.rgb) < 560 else (176, 128, 84)
        return {
            "main": p.rgb,
            "plain": darker(p.rgb, 0.06),
            "inner": darker(p.rgb, 0.5),
            "trim": COLORS[p.trim_color or "white"],
            "belt": COLORS[p.belt_color or "brown"],
            "metal": COLORS["silver"],
            "sole": sole,
        }[fabric]

    def _printed(
        self, pattern: str, ground: RGB, ink: RGB, place: Affine, box: tuple[float, float, float, float], scale: float
    ) -> Image.Image:
        image = Image.new("RGB", (self.canvas.n, self.canvas.n))
        draw_pattern(
            image,
            pattern,
            ground,
            ink,
            place,
            box,
            scale,
            np.random.Generator(np.random.Philox(self.product.pattern_seed)),
        )
        return image

    def paint_pieces(self) -> None:
        groups: list[list[Piece]] = []
        for piece in self.garment.pieces:
            if groups and (groups[-1][0].name, groups[-1][0].fabric, groups[-1][0].clip) == (
                piece.name,
                piece.fabric,
                piece.clip,
            ):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        band = "behind"
        for group in groups:
            piece, polygons = group[0], [self.place(each.polygon) for each in group]
            band = "body" if piece.name == "body" else "front" if band != "behind" else band
            volume = piece.clip is None and piece.name not in ("neckline", "neckband", "cuff")
            on = self.canvas.numbers_of(f"piece:{piece.clip}:") if piece.clip else None
            self.canvas.polygons(
                f"piece:{piece.name}:{piece.fabric}",
                polygons,
                self._fill(piece.fabric),
                on=on,
                band=band if volume else None,
            )
            line = self.edge if piece.fabric in ("main", "plain") else (70, 66, 66)
            for polygon in polygons:
                if piece.clip is None and piece.fabric != "inner":
                    self.canvas.stroke(np.concatenate([polygon, polygon[:1]]), line, self.thin)
                elif piece.clip and len(polygon) == 4:
                    own = self.canvas.numbers_of(f"piece:{piece.name}:")
                    self._edge_on(polygon[:2], own | (on or set()))
                    self._edge_on(polygon[2:], own | (on or set()))
        for seam in self.garment.seams:
            self._seam(self.place(seam.line), seam.style)

    def _edge_on(self, pair: np.ndarray, on: set[int]) -> None:
        """Draw a dark line between two points where it is on the garment."""
        rim = self.thin + 1
        x0, y0 = (max(0, math.floor(v) - rim) for v in pair.min(axis=0))
        x1, y1 = (min(self.canvas.n, math.ceil(v) + rim) for v in pair.max(axis=0))
        if x0 >= x1 or y0 >= y1:
            return
        mask, box = Image.new("L", (x1 - x0, y1 - y0)), (x0, y0, x1, y1)
        ImageDraw.Draw(mask).line([tuple(p) for p in (pair - [x0, y0]).tolist()], fill=255, width=self.thin)
        on_it = where(self.canvas.seen.crop(box), on)
        self.canvas.paint.paste(self.edge, box, ImageChops.multiply(mask, on_it))

    def hang(self, half: float, top: float, wood: RGB) -> None:
        """Draw a hanger behind the garment."""
        canvas = self.canvas
        hook = outline(
            (0.0, -0.02), (0.0, -0.09), (0.05, -0.11, 0.05, -0.15), (0.05, -0.2, 0.0, -0.2), (-0.05, -0.2, -0.05, -0.15)
        )
        bar = np.array([(-half * 0.92, 0.07), (0.0, -0.05), (half * 0.92, 0.07), (half * 0.9, 0.10), (0.0, 0.0),
            (-half * 0.9, 0.10)])  # fmt: skip
        canvas.props = canvas.blank()
        on_props = ImageDraw.Draw(canvas.props)
        for draw, metal, timber in ((canvas.on_paint, (150, 152, 158), wood), (on_props, 255, 255)):
            draw.line(
                [tuple(p) for p in self.place(hook + [0.0, top])],
                fill=metal,
                width=max(2, round(0.018 * self.place.scale)),
                joint="curve",
            )
            draw.polygon(self.place(bar + [0.0, top]).ravel().tolist(), fill=timber)

    def _seam(self, line: np.ndarray, style: str) -> None:
        canvas, unit = self.canvas, self.unit * self.canvas.factor
        if style == "seam":
            canvas.stroke(line, self.edge, self.thin)
        elif style == "stitch":
            light = lighter(self.product.rgb, 0.4)
            for a, b in zip(line[:-1], line[1:], strict=True):
                count = max(1, int(np.hypot(*(b - a)) / (1.6 * unit)))
                for k in range(count):
                    canvas.stroke(
                        np.array([a + (b - a) * (k / count), a + (b - a) * ((k + 0.55) / count)]), light, self.thin
                    )
        elif style == "cord":
            canvas.stroke(line, darker(self.product.rgb, 0.6), self.thin * 3)
            canvas.stroke(line, lighter(self.product.rgb, 0.55), self.thin * 2)
        else:
            shift, wide, light, narrow, dark = dict(
                quilt=((0, 1.6), 2.0, 158, 1.0, 58),
                pleat=((1.5, 0), 2.0, 158, 1.0, 56),
                fold=((1.5, 0), 2.6, 142, 2.2, 104),
            )[style]
            draw = canvas.on_lines
            draw.line(
                [tuple(p) for p in (line + np.array(shift) * unit).tolist()], fill=light, width=round(wide * unit)
            )
            draw.line([tuple(p) for p in line.tolist()], fill=dark, width=round(narrow * unit))

    def turn_over(self, flap: Affine) -> None:
        """Draw a turned-over piece of the garment on a close-up. Its inside is the lining."""
        canvas, p = self.canvas, self.product
        color, pattern = p.lining
        ground = COLORS[color]
        fill: RGB | Image.Image = ground
        if pattern:
            ink = lighter(ground, 0.55) if sum(ground) < 380 else darker(ground, 0.5)
            fill = self._printed(pattern, ground, ink, flap, (-0.4, -0.4, 1.1, 0.8), 0.10)
        canvas.polygons("piece:flap:plain", [flap(FLAP_OUTER)], darker(p.rgb, 0.12), band="front")
        canvas.polygons("piece:lining:lining", [flap(FLAP_INNER)], fill)
        canvas.stroke(flap(FLAP_INNER[2:]), darker(p.rgb, 0.5), self.thin)
        for step in range(3):  # the flap is a little above the cloth
            rim = flap(FLAP_OUTER[2:]) + np.array([0.4, 1.0]) * (step + 1) * self.canvas.factor
            canvas.on_lines.line([tuple(q) for q in rim.tolist()], fill=40 + 25 * step, width=2 * canvas.factor)

    # Details

    def paint_details(self, flap: Affine | None) -> None:
        p = self.product
        for detail in p.details:
            for face, spot in detail.places.items():
                if face == self.face:
                    on = self.canvas.numbers_of(f"piece:{spot.piece}:")
                    self._detail(detail, self.place.after(spot.unit_map), spot.width / spot.height, on, p.rgb)
                elif face == INSIDE and flap is not None:
                    on = self.canvas.numbers_of("piece:lining:")
                    self._detail(detail, flap.after(spot.unit_map), spot.width / spot.height, on, COLORS[p.lining[0]])

    def _detail(self, detail: Detail, unit_map: Affine, aspect: float, on: set[int], ground: RGB) -> None:
        canvas = self.canvas
        corners = unit_map(rectangle(-0.6, -0.6, 0.6, 0.6))
        x0, y0 = (math.floor(v) for v in corners.min(axis=0))
        x1, y1 = (math.ceil(v) for v in corners.max(axis=0))
        if detail.kind == self.without or x1 <= 0 or y1 <= 0 or x0 >= canvas.n or y0 >= canvas.n:
            return
        box = (x0, y0, x1, y1)
        brush = Brush((x1 - x0, y1 - y0), Affine(unit_map.matrix, unit_map.offset - [x0, y0]), aspect, ground)
        KINDS[detail.kind].draw(brush, detail.what, COLORS[detail.color])
        mask, name = brush.image.getchannel("A"), f"detail:{detail.kind}"
        painted, free = np.asarray(mask), among(np.asarray(self.base.crop(box)), on).view(np.uint8)
        self.full[name] = float(np.count_nonzero(painted))
        seen = as_image(painted * free)
        if detail.kind not in FLAT:
            off = max(1, round(canvas.n / 130))
            shadow = ImageChops.offset(mask.filter(ImageFilter.BoxBlur(off)), off // 2, off)
            dim = as_image(free * np.uint8(120))
            canvas.paint.paste((20, 16, 20), box, ImageChops.multiply(shadow, dim))
        canvas.paint.paste(brush.image.convert("RGB"), box, seen)
        canvas.seen.paste(canvas.number(name), box, seen)
        canvas.details = canvas.details or canvas.blank()
        canvas.details.paste(255, box, seen)
        within = (max(0, x0), max(0, y0), min(canvas.n, x1), min(canvas.n, y1))
        self.spots[name] = within

    # Ground truth

    def boxes(self, base: Regions) -> dict[str, Box | None]:
        """Return the box of every attribute of the product. `base`: what is visible of the pieces."""
        canvas, product = self.canvas, self.product
        least = SMALLEST * canvas.size / 96

        def region(numbers: set[int], full: float, regions: Regions = base) -> Box | None:
            box, visible = regions.box(numbers, canvas.factor)
            if box is None or visible < full * VISIBLE_SHARE:
                return None
            return box if min(box[2] - box[0], box[3] - box[1]) >= least else None

        sorts: dict[str, set[int]] = {}
        for name, number in canvas.numbers.items():
            if name.startswith("piece:"):
                sorts.setdefault(name.rsplit(":", 1)[1], set()).add(number)
        main = sorts.get("main", set())
        plain, trim = main | sorts.get("plain", set()), sorts.get("trim", set())
        some = canvas.n**2 * 0.04 / VISIBLE_SHARE if self.close else 0.0
        result: dict[str, Box | None] = {}
        for name in product.names():
            if name in ("category", "subcategory"):
                result[name] = None if self.close else region(canvas.numbers_of("piece:"), 0.0)
            elif name in ("color", "material"):
                result[name] = region(plain | trim if name == "material" else plain, some)
            elif name == "pattern":
                result[name] = region(main, some) if product.pattern else None
            elif any(detail.kind == name for detail in product.details):
                full, spot = self.full.get(f"detail:{name}", 0.0), self.spots.get(f"detail:{name}")
                box = region(canvas.numbers_of(f"detail:{name}"), full, Regions(canvas.seen, spot)) if spot else None
                result[name] = box
            else:
                result[name] = region(canvas.numbers_of(f"piece:{name}:"), self._full_area(name))
        return result

    def _full_area(self, name: str) -> float:
        """Return the pixels that the piece would take if the image did not crop it; 0 in a full view."""
        pieces = [piece for piece in self.garment.pieces if piece.name == name]
        if not self.close or not pieces:
            return 0.0
        x0, y0, x1, y1 = self.garment.bounds()
        cells = np.linspace(x0, x1, 36), np.linspace(y0, y1, 36)
        own = np.zeros((36, 36), bool)
        for piece in pieces:
            within = contains(piece.polygon, *cells)
            if piece.clip:
                within &= np.any(
                    [contains(other.polygon, *cells) for other in self.garment.pieces if other.name == piece.clip],
                    axis=0,
                )
            own |= within
        return float(own.mean()) * (x1 - x0) * (y1 - y0) * self.place.scale**2
