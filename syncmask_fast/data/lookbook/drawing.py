"""The photograph: a product's view as a picture, with the box of every attribute that it shows.

Shapes are painted without shades on a canvas a few times as large, each also on a map of numbers (which attribute is seen
at which pixel), so that boxes and visible shares follow from what was painted, whatever turned, covered or cut it. Light,
shadow, cloth and background are then laid over the reduced picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .catalogue import INSIDE, Detail, Product, garment_of, stream
from .details import KINDS, Brush
from .fabric import COLOURS, GLOSS, RGB, background, darker, draw_pattern, lighter, mix, texture
from .geometry import Affine, affine, area, outline
from .parts import Garment

VISIBLE_SHARE = 0.30          # less of a thing than this counts as hidden
SMALLEST = 4.0                # a box below this (pixels at size 96) counts as hidden
FLAT = ("print", "lettering", "embroidery", "band", "lacing", "cut-out", "quilting", "lace")   # cast no shadow

Box = list[float]


def supersampling(size: int) -> int:
    return 3 if size <= 128 else 2


@dataclass
class Canvas:
    """`paint` RGB, `seen` L (number of the thing on top, 0 none), `props` L (255 where a hanger or the like was painted)."""

    size: int
    factor: int
    ground: RGB
    numbers: dict[str, int] = field(default_factory=dict)
    full: dict[str, float] = field(default_factory=dict)       # pixels of the whole thing, unhidden and uncut

    def __post_init__(self) -> None:
        n = self.size * self.factor
        self.n = n
        self.paint = Image.new("RGB", (n, n), self.ground)
        self.props = Image.new("L", (n, n), 0)
        self.seen = Image.new("L", (n, n), 0)

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    def mask(self, polygons: list[np.ndarray]) -> Image.Image:
        mask = Image.new("L", (self.n, self.n), 0)
        draw = ImageDraw.Draw(mask)
        for polygon in polygons:
            draw.polygon(polygon.ravel().tolist(), fill=255)
        return mask

    def lay(self, name: str | None, mask: Image.Image, fill: RGB | Image.Image) -> None:
        """Paints `fill` where `mask` is set, as the thing `name` (None: a prop)."""
        box = mask.getbbox()
        if box is None:
            return
        cut = mask.crop(box)
        self.paint.paste(fill.crop(box) if isinstance(fill, Image.Image) else fill, box, cut)
        if name:
            self.seen.paste(self.number(name), box, cut)
        else:
            self.props.paste(255, box, cut)

    def cover(self) -> Image.Image:
        """255 where anything was painted."""
        return Image.fromarray(np.where(np.asarray(self.seen) > 0, np.uint8(255), np.asarray(self.props)))


class Regions:
    """Which pixels of a map of numbers (L) carry which number: how many, and the box around them."""

    def __init__(self, seen: Image.Image) -> None:
        cells = np.asarray(seen)
        self.counts = seen.histogram()
        self._boxes: dict[int, tuple[int, int, int, int]] = {}
        for number in range(1, 256):
            if self.counts[number]:
                own = (cells == number).view(np.uint8)
                self._boxes[number] = Image.frombuffer("L", seen.size, own, "raw", "L", 0, 1).getbbox()   # type: ignore[assignment]

    def box(self, numbers: set[int], factor: int) -> Box | None:
        """The tight box around all pixels that carry one of `numbers`, in pixels of the reduced picture."""
        found = np.array([self._boxes[number] for number in numbers if number in self._boxes])
        if not len(found):
            return None
        return [float(v) / factor for v in (*found[:, :2].min(axis=0), *found[:, 2:].max(axis=0))]

    def count(self, numbers: set[int]) -> int:
        return int(sum(self.counts[number] for number in numbers))


@dataclass
class View:
    """One photograph before it is encoded. `boxes` has every attribute of the product: its box in pixels, or None."""

    image: Image.Image
    boxes: dict[str, Box | None]
    share: float                # of the picture's area that the garment's box takes


def render(product: Product, index: int, size: int, seed: int, split: str, *, without: str | None = None) -> View:
    """View `index` of `product.views` at `size` x `size` pixels. `without` leaves one local detail unpainted (for tests)."""
    g = stream(seed, split, product.number, "view", index)
    close = product.views[index] == "detail"
    face, target, flap = _subject(product, index, g)
    garment = garment_of(product, face)
    factor = supersampling(size)
    canvas = Canvas(size, factor, product.rgb)
    fit = _fit(garment, canvas.n, g)
    place = _zoom(product, garment, fit, face, target, flap is not None, canvas.n, g) if close else fit
    scene = _Scene(product, garment, canvas, place, face, close, g, without)
    scene.paint(hanger=not close and g.random() < 0.16)
    if flap is not None:
        scene.turn_over(flap)
    picture = scene.photograph()
    base = Regions(scene.base)
    boxes = scene.boxes(base, Regions(canvas.seen))
    whole = base.box(scene.garment_numbers(), factor)
    share = 0.0 if whole is None else (whole[2] - whole[0]) * (whole[3] - whole[1]) / size**2
    return View(picture, boxes, share)


def _subject(product: Product, index: int, g: np.random.Generator) -> tuple[str, Detail | None, Affine | None]:
    """Which face a view looks at; for a close-up also the detail it is about and whether a flap is turned over
    (as a map from the flap's units to the unit picture)."""
    view = product.views[index]
    if view != "detail":
        return view, None, None
    shown = [(face, d) for d in product.details for face in d.places if face != INSIDE]
    hidden = any(INSIDE in d.places for d in product.details) or product.lining_named
    face, target = ("front" if g.random() < 0.6 else "back"), None
    if shown:
        face, target = shown[int(g.integers(len(shown)))]
    flap = None
    if hidden and g.random() < 0.8:
        corner = int(g.integers(4))
        wide = g.uniform(0.66, 0.82)
        turn = g.uniform(-10, 10) + (180 if corner in (2, 3) else 0)
        x, y = ((-0.05, -0.04), (1.0 - wide + 0.06, -0.04), (1.05, 1.04), (wide - 0.06, 1.04))[corner]
        flap = affine(wide, turn, offset=(x, y))
    return face, target, flap


def _fit(garment: Garment, n: int, g: np.random.Generator) -> Affine:
    """Garment units to canvas pixels in a full view: turned, leaning, 36 to 64 % of the picture, anywhere in it."""
    turn = affine((1.0, 1.0), float(np.clip(g.normal(0, 5.5), -13, 13)), float(g.uniform(-0.06, 0.06)))
    points = np.concatenate([turn(part.polygon) for part in garment.parts if part.clip is None])
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    wide, tall = x1 - x0, y1 - y0
    scale = min(math.sqrt(g.uniform(0.40, 0.64) / (wide * tall)), g.uniform(0.90, 0.965) / max(wide, tall))
    free = 1.0 - scale * np.array([wide, tall])
    corner = free * g.uniform(0.06, 0.94, 2)
    return affine(n).after(Affine(turn.matrix * scale, corner - scale * np.array([x0, y0])))


def _zoom(product: Product, garment: Garment, fit: Affine, face: str, target: Detail | None, flapped: bool, n: int,
          g: np.random.Generator) -> Affine:
    """A close-up: larger than `fit`, with the target (or a random piece of the garment) somewhere near the middle."""
    if target is not None:
        spot = target.places[face]
        centre, reach = np.array([[spot.x, spot.y]]), max(spot.width, spot.height)
    else:
        panel = max((part.polygon for part in garment.parts if part.panel), key=area)
        centre, reach = panel.mean(axis=0, keepdims=True) + g.uniform(-0.05, 0.05, (1, 2)), 0.25
    larger = np.clip(g.uniform(0.30, 0.46) * n / (reach * fit.scale), 1.5, 2.7)
    matrix = fit.matrix * larger
    spread = 0.12 if not flapped else 0.06
    at = n * (0.5 + g.uniform(-spread, spread, 2))
    if flapped:
        at = n * np.array([g.uniform(0.35, 0.65), 0.5])
    return Affine(matrix, at - (centre @ matrix.T)[0])


class _Scene:
    """A garment on its canvas, from the first part to the finished picture."""

    def __init__(self, product: Product, garment: Garment, canvas: Canvas, place: Affine, face: str, close: bool, g: np.random.Generator,
                 without: str | None) -> None:
        self.product, self.garment, self.canvas, self.place = product, garment, canvas, place
        self.face, self.close, self.g, self.without = face, close, g, without
        self.masks: dict[str, Image.Image] = {}             # of every part, by name
        self.layers: list[Image.Image] = []                 # masks in the order of painting, for light and shadow
        self.fabrics: dict[str, set[int]] = {}              # numbers by fabric
        self.lines = Image.new("L", (canvas.n, canvas.n), 128)
        self.stroke = max(1, round(canvas.n / 300))

    # The garment

    def _fill(self, fabric: str) -> RGB | Image.Image:
        p = self.product
        if fabric == "main" and p.pattern:
            if not hasattr(self, "_pattern"):
                self._pattern = Image.new("RGB", (self.canvas.n, self.canvas.n))
                x0, y0, x1, y1 = self.garment.bounds()
                pad = 0.1
                draw_pattern(self._pattern, p.pattern, p.rgb, mix(COLOURS[p.pattern_colour or "white"], p.rgb, 0.08), self.place,
                             (x0 - pad, y0 - pad, x1 + pad, y1 + pad), p.pattern_scale * max(x1 - x0, y1 - y0) / 1.1,
                             stream(0, "train", p.number, "product", 1))
            return self._pattern
        light_sole = (236, 232, 226) if sum(p.rgb) < 560 else (176, 128, 84)
        return {"main": p.rgb, "plain": darker(p.rgb, 0.06), "inner": darker(p.rgb, 0.5), "trim": COLOURS[p.trim_colour or "white"],
                "belt": COLOURS[p.belt_colour or "brown"], "metal": COLOURS["silver"], "sole": light_sole}[fabric]

    def paint(self, hanger: bool) -> None:
        canvas, place = self.canvas, self.place
        if hanger and self.garment.hanger:
            self._hang()
        edge = darker(self.product.rgb, 0.45)
        groups: list[list] = []
        for part in self.garment.parts:
            if groups and groups[-1][0].name == part.name and groups[-1][0].fabric == part.fabric and part.clip is None:
                groups[-1].append(part)
            else:
                groups.append([part])
        for group in groups:
            part = group[0]
            polygons = [place(each.polygon) for each in group]
            mask = canvas.mask(polygons)
            if part.clip:
                mask = ImageChops.multiply(mask, self.masks[part.clip])
            name = f"part:{part.name}:{part.fabric}"
            canvas.lay(name, mask, self._fill(part.fabric))
            self.fabrics.setdefault(part.fabric, set()).add(canvas.number(name))
            self.masks[part.name] = ImageChops.lighter(self.masks[part.name], mask) if part.name in self.masks else mask
            if part.clip is None and part.name not in ("neckline", "neckband", "cuff"):
                self.layers.append(mask)
            if part.clip is None and part.fabric != "inner":
                draw = ImageDraw.Draw(canvas.paint)
                for polygon in polygons:
                    points = polygon.ravel().tolist()
                    draw.line(points + points[:2], fill=edge if part.fabric in ("main", "plain") else (70, 66, 66), width=self.stroke)
            elif part.clip and part.fabric in ("plain", "trim", "belt"):
                draw = ImageDraw.Draw(canvas.paint)
                box = place(part.polygon).tolist()
                draw.line([tuple(box[0]), tuple(box[1])], fill=edge, width=self.stroke)
                draw.line([tuple(box[2]), tuple(box[3])], fill=edge, width=self.stroke)
        for seam in self.garment.seams:
            self._seam(place(seam.line), seam.style, edge)
        for detail in self.product.details:
            if self.face in detail.places:
                spot = detail.places[self.face]
                self._detail(detail, place.after(spot.unit_map), spot.width / spot.height, self.masks[spot.part], self.product.rgb)
        self.base = canvas.seen.copy()
        names = {number for name, number in canvas.numbers.items() if name.startswith("part:")}
        if len(names) < len(canvas.numbers):
            self.base = self._parts_only

    def _hang(self) -> None:
        half, top = self.garment.hanger or (0.25, 0.0)
        canvas = self.canvas
        wood = (150, 106, 66) if self.g.random() < 0.6 else (70, 70, 74)
        hook = outline((0.0, -0.02), (0.0, -0.09), (0.05, -0.11, 0.05, -0.15), (0.05, -0.2, 0.0, -0.2), (-0.05, -0.2, -0.05, -0.15))
        mask = Image.new("L", (canvas.n, canvas.n), 0)
        draw = ImageDraw.Draw(mask)
        draw.line([tuple(p) for p in self.place(hook + [0.0, top])], fill=255, width=max(2, round(0.018 * self.place.scale)), joint="curve")
        canvas.lay(None, mask, (150, 152, 158))
        bar = canvas.mask([self.place(np.array([(-half * 0.92, 0.07), (0.0, -0.05), (half * 0.92, 0.07), (half * 0.9, 0.10), (0.0, 0.0), (-half * 0.9, 0.10)]) + [0.0, top])])
        canvas.lay(None, bar, wood)

    def _seam(self, line: np.ndarray, style: str, edge: RGB) -> None:
        draw = ImageDraw.Draw(self.canvas.paint)
        points = [tuple(p) for p in line.tolist()]
        shade = ImageDraw.Draw(self.lines)
        unit = self.canvas.n / 96 * (1.8 if self.close else 1.0)
        if style == "seam":
            draw.line(points, fill=edge, width=self.stroke)
        elif style == "stitch":
            light = lighter(self.product.rgb, 0.4)
            for a, b in zip(line[:-1], line[1:]):
                count = max(1, int(np.hypot(*(b - a)) / (1.6 * unit)))
                for k in range(count):
                    p, q = a + (b - a) * (k / count), a + (b - a) * ((k + 0.55) / count)
                    draw.line([tuple(p), tuple(q)], fill=light, width=self.stroke)
        elif style == "cord":
            draw.line(points, fill=darker(self.product.rgb, 0.6), width=self.stroke * 3, joint="curve")
            draw.line(points, fill=lighter(self.product.rgb, 0.55), width=self.stroke * 2, joint="curve")
        elif style == "quilt":
            shade.line([(x, y + 1.6 * unit) for x, y in points], fill=158, width=round(2.0 * unit))
            shade.line(points, fill=58, width=round(1.0 * unit))
        elif style == "pleat":
            shade.line([(x + 1.5 * unit, y) for x, y in points], fill=158, width=round(2 * unit))
            shade.line(points, fill=56, width=round(1.0 * unit))
        else:
            shade.line([(x + 1.5 * unit, y) for x, y in points], fill=142, width=round(2.6 * unit))
            shade.line(points, fill=104, width=round(2.2 * unit))

    # Details

    def _detail(self, detail: Detail, unit_map: Affine, aspect: float, clip: Image.Image, ground: RGB) -> None:
        if not hasattr(self, "_parts_only"):
            self._parts_only = self.canvas.seen.copy()
        canvas = self.canvas
        corners = unit_map(np.array([(-0.6, -0.6), (0.6, -0.6), (0.6, 0.6), (-0.6, 0.6)]))
        x0, y0 = (int(math.floor(v)) for v in corners.min(axis=0))
        x1, y1 = (int(math.ceil(v)) for v in corners.max(axis=0))
        cut = canvas.paint.crop((x0, y0, x1, y1))
        mask = Image.new("L", cut.size, 0)
        brush = Brush(cut, mask, Affine(unit_map.matrix, unit_map.offset - [x0, y0]), aspect, ground)
        KINDS[detail.kind].draw(brush, detail.what, COLOURS[detail.colour])
        name = f"detail:{detail.kind}"
        canvas.full[name] = canvas.full.get(name, 0.0) + mask.histogram()[255]
        if detail.kind == self.without:
            return
        seen = ImageChops.multiply(mask, clip.crop((x0, y0, x1, y1)))
        if detail.kind not in FLAT:
            off = max(1, round(canvas.n / 130))
            shadow = _fainter(seen.filter(ImageFilter.BoxBlur(off)))
            shadow = ImageChops.multiply(shadow, clip.crop((x0 + off // 2, y0 + off, x1 + off // 2, y1 + off)))
            canvas.paint.paste((20, 16, 20), (x0 + off // 2, y0 + off, x1 + off // 2, y1 + off), shadow)
        canvas.paint.paste(cut, (x0, y0, x1, y1), seen)
        canvas.seen.paste(canvas.number(name), (x0, y0, x1, y1), seen)

    def turn_over(self, flap: Affine) -> None:
        """Lays a turned-over piece of the garment on a close-up: the lining, and what lies on it."""
        canvas, p = self.canvas, self.product
        to_pixels = affine(canvas.n).after(flap)
        outer = outline((-0.3, -0.3), (1.0, -0.3), (1.0, 0.02), (1.02, 0.34, 0.95, 0.62), (0.5, 0.69, -0.02, 0.62), (-0.3, 0.6))
        inner = outline((-0.3, -0.3), (0.95, -0.3), (0.95, 0.02), (0.965, 0.32, 0.90, 0.57), (0.5, 0.635, -0.02, 0.57), (-0.3, 0.55))
        rim, cloth = canvas.mask([to_pixels(outer)]), canvas.mask([to_pixels(inner)])
        colour, pattern = p.lining
        fill: RGB | Image.Image = COLOURS[colour]
        if pattern:
            fill = Image.new("RGB", (canvas.n, canvas.n))
            ink = lighter(COLOURS[colour], 0.55) if sum(COLOURS[colour]) < 380 else darker(COLOURS[colour], 0.5)
            draw_pattern(fill, pattern, COLOURS[colour], ink, to_pixels, (-0.4, -0.4, 1.1, 0.8), 0.10, stream(0, "train", p.number, "product", 2))
        shadow = _fainter(rim.filter(ImageFilter.BoxBlur(canvas.n // 28)))
        canvas.paint.paste((16, 12, 16), (0, 0, canvas.n, canvas.n), shadow)
        canvas.lay("part:flap:plain", rim, darker(p.rgb, 0.12))
        canvas.lay("part:lining:lining", cloth, fill)
        self.base.paste(canvas.number("part:flap:plain"), (0, 0, canvas.n, canvas.n), rim)
        self.base.paste(canvas.number("part:lining:lining"), (0, 0, canvas.n, canvas.n), cloth)
        self.fabrics.setdefault("plain", set()).add(canvas.number("part:flap:plain"))
        ImageDraw.Draw(canvas.paint).line([tuple(q) for q in to_pixels(inner[2:])], fill=darker(p.rgb, 0.5), width=self.stroke)
        self.layers += [rim, cloth]
        for detail in p.details:
            if INSIDE in detail.places:
                spot = detail.places[INSIDE]
                self._detail(detail, to_pixels.after(spot.unit_map), spot.width / spot.height, cloth, COLOURS[colour])

    # Light

    def photograph(self) -> Image.Image:
        canvas, g, product = self.canvas, self.g, self.product
        size, factor = canvas.size, canvas.factor
        unit = size / 96 * (1.7 if self.close else 1.0)
        angle = g.uniform(0, 2 * math.pi)
        light = np.array([math.cos(angle), math.sin(angle) * 0.6 - 0.4])

        shade = np.ones((size, size), np.float32)
        gloss = GLOSS.get(product.material, 0.0)
        for layer in self.layers:
            if layer.getbbox() is None:
                continue
            m8 = layer.reduce(factor)
            m = np.asarray(m8, np.float32) * (1 / 255)
            narrow, wide = _soft(m8, 1.6 * unit, 1), _soft(m8, 4.0 * unit)
            sx, sy = (int(round(v * 5 * unit)) for v in light)
            relief = wide - np.roll(wide, (-sy, -sx), (0, 1))
            own = 0.80 + 0.11 * np.maximum(2 * narrow - 1, 0) + 0.10 * np.maximum(2 * wide - 1, 0) + (0.17 + 0.10 * gloss) * relief
            cast = np.roll(narrow, (max(1, round(1.2 * unit)), round(0.8 * unit)), (0, 1))
            shade *= 1 - 0.30 * cast * (1 - m)
            shade += (own - shade) * m
        folds = self._folds(unit)
        shade = shade * folds
        cloth = texture(product.material, size, self.close)
        top, left = (int(v) for v in g.integers(0, size, 2))
        cloth = cloth[top : top + size, left : left + size]
        rgb = np.asarray(canvas.paint.reduce(factor), np.float32)
        cover = canvas.cover().reduce(factor)
        factor_map = shade * cloth * g.uniform(0.94, 1.10)
        rgb = rgb * factor_map[..., None]
        if gloss:
            rgb = rgb + (gloss * 150 * np.clip(factor_map - 1.06, 0, 0.6))[..., None]
        picture = background(size, product.rgb, g)
        strength, reach = g.uniform(0.22, 0.5), g.uniform(2.0, 6.0)
        shadow = _soft(cover, g.uniform(1.8, 5.0) * size / 96)
        dx, dy = (int(round(v)) for v in -light * reach * size / 96 + np.array([0.0, 1.2 * size / 96]))
        shadow = _shifted(shadow, dx, dy)
        contact = _soft(cover, 1.3 * size / 96, 1)
        picture = picture * (1 - strength * shadow)[..., None] * (1 - 0.22 * contact)[..., None]
        alpha = np.asarray(cover, np.float32)[..., None] * (1 / 255)
        picture = picture * (1 - alpha) + rgb * alpha
        warm = g.normal(0, 0.018)
        picture = picture * np.array([1 + warm, 1.0, 1 - warm], np.float32) + g.standard_normal((size, size, 1)).astype(np.float32) * 1.6
        return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))

    def _folds(self, unit: float) -> np.ndarray:
        """Soft creases: brightness factors around 1."""
        g, canvas = self.g, self.canvas
        draw = ImageDraw.Draw(self.lines)
        x0, y0, x1, y1 = self.garment.bounds()
        supple = {"satin": 7, "velvet": 6, "cotton": 5, "linen": 6, "wool": 4, "fleece": 3}.get(self.product.material, 4)
        for _ in range(supple):
            x, y = g.uniform(x0, x1), g.uniform(y0 + 0.15 * (y1 - y0), y1)
            dx, dy = g.normal(0, 0.07), g.uniform(0.10, 0.32) * (y1 - y0)
            crease = self.place(outline((x, y), (x + dx * 2 + g.normal(0, 0.03), y + dy * 0.5, x + dx, y + dy)))
            wide = max(1, round(g.uniform(1.2, 2.6) * unit * canvas.factor))
            points = crease.tolist()
            draw.line([(a + wide, b) for a, b in points], fill=int(g.uniform(142, 164)), width=wide)
            draw.line([tuple(q) for q in points], fill=int(g.uniform(84, 110)), width=wide)
        small = self.lines.reduce(canvas.factor).filter(ImageFilter.GaussianBlur(0.75 * unit))
        return 1 + (np.asarray(small, np.float32) - 128) / 150

    # Ground truth

    def garment_numbers(self) -> set[int]:
        return {number for name, number in self.canvas.numbers.items() if name.startswith("part:") and not name.endswith(":lining")}

    def _part_numbers(self, name: str) -> set[int]:
        return {number for key, number in self.canvas.numbers.items() if key.split(":")[:2] == ["part", name]}

    def boxes(self, base: Regions, top: Regions) -> dict[str, Box | None]:
        canvas, product = self.canvas, self.product
        least = SMALLEST * canvas.size / 96
        small = canvas.n**2 * 0.04 if self.close else 0.0

        def region(numbers: set[int], full: float, regions: Regions) -> Box | None:
            visible = regions.count(numbers)
            if visible == 0 or visible < full * VISIBLE_SHARE:
                return None
            box = regions.box(numbers, canvas.factor)
            return box if box and min(box[2] - box[0], box[3] - box[1]) >= least else None

        fabric = self.fabrics
        cloth = fabric.get("main", set()) | fabric.get("plain", set())
        result: dict[str, Box | None] = {}
        for name in product.names():
            if name in ("category", "subcategory"):
                result[name] = None if self.close else region(self.garment_numbers(), 0.0, base)
            elif name in ("colour", "material"):
                result[name] = region(cloth | (fabric.get("trim", set()) if name == "material" else set()), small, base)
            elif name == "pattern":
                result[name] = region(fabric.get("main", set()), small, base) if product.pattern else None
            elif f"detail:{name}" in canvas.full:
                number = canvas.numbers.get(f"detail:{name}")
                result[name] = None if number is None else region({number}, canvas.full[f"detail:{name}"], top)
            else:
                numbers = self._part_numbers(name)
                result[name] = region(numbers, self._full_area(name), base) if numbers else None
        return result

    def _full_area(self, name: str) -> float:
        """Pixels that the part would take if the picture did not cut it; 0 in a full view, where nothing is cut."""
        if not self.close:
            return 0.0
        if name == "lining":
            return 0.0
        x0, y0, x1, y1 = self.garment.bounds()
        n = 160
        fit = affine(n / max(x1 - x0, y1 - y0)).after(affine(1.0, offset=(-x0, -y0)))
        masks = Canvas(n, 1, (0, 0, 0))
        own = masks.mask([fit(part.polygon) for part in self.garment.parts if part.name == name])
        clips = {part.clip for part in self.garment.parts if part.name == name and part.clip}
        for clip in clips:
            own = ImageChops.multiply(own, masks.mask([fit(part.polygon) for part in self.garment.parts if part.name == clip]))
        return own.histogram()[255] * (self.place.scale / fit.scale) ** 2


def _fainter(mask: Image.Image) -> Image.Image:
    return ImageChops.multiply(mask, Image.new("L", mask.size, 120))


def _soft(mask: Image.Image, radius: float, times: int = 2) -> np.ndarray:
    """A blurred L mask as float32 from 0 to 1; `radius` in pixels, about that of a Gaussian."""
    for _ in range(times):
        mask = mask.filter(ImageFilter.BoxBlur(radius * 1.1))
    return np.asarray(mask, np.float32) * (1 / 255)


def _shifted(field_: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The array moved by whole pixels; what comes in from outside is 0."""
    result = np.zeros_like(field_)
    h, w = field_.shape
    result[max(0, dy) : h + min(0, dy), max(0, dx) : w + min(0, dx)] = field_[max(0, -dy) : h + min(0, -dy), max(0, -dx) : w + min(0, -dx)]
    return result
