"""Which product is number i: its kind, colors, cloth and details, and where they are. No images or words yet.

Product i of a split is a pure function of (seed, split, i). In every group of four the last is a sibling of
one of the three before: the same but for one attribute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from syncmask_fast.sources.lookbook.details import CLOTHES, KINDS
from syncmask_fast.sources.lookbook.fabric import CLOTH, COLORS, METALS, PATTERNS, RGB, distance
from syncmask_fast.sources.lookbook.garments import build
from syncmask_fast.sources.lookbook.geometry import Affine, Garment, Style, affine, bounds
from syncmask_fast.sources.lookbook.subcategories import SUBCATEGORIES

SPLITS = ("train", "eval")
GROUP = 4  # one product in so many is a sibling
CONTRAST = 42.0  # color difference between a detail and the cloth below
MIN_DETAILS, MAX_DETAILS = 2, 5  # of a product, with what is sewn in (trim, belt, lining)
MAX_LOCAL = 4
STUDS = (*METALS, "black")
COLORLESS = ("cut-out",)  # kinds whose color no text mentions
SIDELESS = ("scarf", "shoe")  # categories without a side view
INSIDE = "inside"  # on the turned-over flap of a close-up: lining, label, hidden pocket
SECOND_FACE = 0.14  # share of details that are on two faces
CIRCLE = 0.42  # radius of the room that a detail takes, as a share of its diagonal
_RIM = 0.47 * np.stack(np.meshgrid(np.linspace(-1, 1, 7), np.linspace(-1, 1, 7)), axis=-1).reshape(-1, 2)
_STREAMS = ("product", "text", "view")


def stream(seed: int, split: str, number: int, use: str, index: int = 0) -> np.random.Generator:
    """Return the random numbers of one use of one product, independent of all others."""
    key = (seed, SPLITS.index(split), number, _STREAMS.index(use), index)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class Placement:
    """A detail on a face: its center, width and height in garment units (on the flap: in flap widths), its turn."""

    piece: str
    x: float
    y: float
    width: float
    height: float
    degrees: float

    @property
    def unit_map(self) -> Affine:
        """The map from the detail's unit square to the garment."""
        turn = affine(1.0, self.degrees, offset=(self.x, self.y))
        return turn.after(affine((self.width, self.height)))


@dataclass(frozen=True)
class Detail:
    """A local detail. `kind` is unique in a product, `what` its variant. `places`: face ("inside" too) to place."""

    kind: str
    what: str
    color: str
    places: dict[str, Placement]


@dataclass(frozen=True)
class Product:
    number: int
    subcategory: str
    style: Style
    color: str
    rgb: RGB
    material: str
    pattern: str | None
    pattern_color: str | None
    pattern_scale: float
    pattern_seed: int
    trim: str | None  # place of the second color
    trim_color: str | None
    belt_color: str | None
    lining: tuple[str, str | None]  # color and pattern of the inside
    lining_named: bool  # the lining counts as a detail
    details: tuple[Detail, ...]
    views: tuple[str, ...]
    sibling_of: int | None = None

    @property
    def category(self) -> str:
        return SUBCATEGORIES[self.subcategory].category

    def names(self) -> list[str]:
        """Return the names of all its attributes: whole-garment ones first, then sewn-in ones, then local details."""
        names = ["category", "subcategory", "color", "material", "pattern"]
        sub = SUBCATEGORIES[self.subcategory]
        names += ["sleeves"] if sub.sleeves else []
        names += ["neckline"] if sub.necks else []
        collar = sub.shape.get("collar")
        names += ["hood" if collar == "hood" else "collar"] if collar else []
        names += ["trim"] if self.trim else []
        names += ["belt"] if self.belt_color else []
        names += ["lining"] if self.lining_named else []
        return names + [detail.kind for detail in self.details]


def garment_of(product: Product, face: str) -> Garment:
    return build(product.subcategory, face, product.style)


def _pick(g: np.random.Generator, options: tuple[str, ...] | list[str], weights: list[float] | None = None) -> str:
    if weights is None:
        return options[int(g.integers(len(options)))]
    p = np.array(weights) / sum(weights)
    return options[int(g.choice(len(options), p=p))]


def _tinted(g: np.random.Generator, color: str) -> RGB:
    return tuple(int(v) for v in np.clip(np.array(COLORS[color]) + g.uniform(-9, 9, 3) + g.uniform(-7, 7), 8, 250))  # type: ignore[return-value]


def contrasting(
    g: np.random.Generator, grounds: list[str], options: tuple[str, ...] = CLOTH, least: float = CONTRAST
) -> str:
    """Choose a color that differs from all `grounds` by `least`, or else the one that differs most."""
    gap = {name: min(distance(COLORS[name], COLORS[ground]) for ground in grounds) for name in options}
    fit = [name for name in options if gap[name] >= least]
    return _pick(g, fit) if fit else max(gap, key=lambda name: gap[name])


class PanelMap:
    """Where details may be on a garment: a coarse map of the piece on top, and the circles already taken."""

    CELLS = 176

    def __init__(self, garment: Garment) -> None:
        x0, y0, x1, y1 = garment.bounds()
        self.garment = garment
        self.side = max(x1 - x0, y1 - y0)
        self.origin = np.array([x0, y0])
        self.taken: list[tuple[float, float, float]] = []
        scale = (self.CELLS - 2) / self.side
        top = Image.new("L", (self.CELLS, self.CELLS), 0)
        draw = ImageDraw.Draw(top)
        for i, piece in enumerate(garment.pieces):
            points = ((piece.polygon - self.origin) * scale + 1).ravel().tolist()
            if piece.clip is None:
                draw.polygon(points, fill=i + 1)
                continue
            mask = Image.new("L", top.size, 0)
            ImageDraw.Draw(mask).polygon(points, fill=255)
            below = [j + 1 for j, other in enumerate(garment.pieces) if other.name == piece.clip]
            listed = np.zeros(256, np.uint8)
            listed[below] = 255
            on_it = ImageChops.multiply(mask, Image.fromarray(listed[np.asarray(top)]))
            top.paste(i + 1, (0, 0, *top.size), on_it)
        self.top = np.zeros((self.CELLS + 2, self.CELLS + 2), np.uint8)  # with a rim of zeros
        self.top[1:-1, 1:-1] = np.asarray(top)
        self.panels = [i for i, piece in enumerate(garment.pieces) if piece.panel]
        self.spans = np.array([bounds([garment.pieces[i].polygon]) for i in self.panels])
        self.weights = (self.spans[:, 2] - self.spans[:, 0]) * (self.spans[:, 3] - self.spans[:, 1])
        self.weights /= self.weights.sum()

    def at(self, points: np.ndarray) -> np.ndarray:
        """Return number + 1 of the piece on top at points [..., 2]; 0 outside the garment."""
        cells = ((points - self.origin) * ((self.CELLS - 2) / self.side) + 1).astype(np.int64)
        np.maximum(cells, -1, out=cells)
        np.minimum(cells, self.CELLS, out=cells)
        cells += 1
        return self.top[cells[..., 1], cells[..., 0]]

    def place(self, g: np.random.Generator, kind: str) -> Placement | None:
        """Choose a free place for a detail of this kind, smaller if there is little room; None if there is none."""
        rule = KINDS[kind]
        tries = 48
        height = g.uniform(*rule.size) * self.side * (0.9 ** np.repeat(np.arange(6), 8))
        width = height * g.uniform(*rule.aspect)
        panel = g.choice(len(self.panels), tries, p=self.weights)
        span = self.spans[panel]
        center = span[:, :2] + (span[:, 2:] - span[:, :2]) * g.uniform(size=(tries, 2))
        degrees = g.uniform(-rule.tilt, rule.tilt, tries)
        cos, sin = np.cos(np.radians(degrees))[:, None], np.sin(np.radians(degrees))[:, None]
        numbers = np.array(self.panels)[panel] + 1
        radius = CIRCLE * np.hypot(width, height)
        free = self.at(center) == numbers
        if self.taken:
            others = np.array(self.taken)
            gap = np.hypot(*(center[:, None] - others[None, :, :2]).transpose(2, 0, 1)) - others[None, :, 2]
            free &= (gap >= radius[:, None]).all(axis=1)
        left = np.flatnonzero(free)
        for start in range(0, len(left), 6):  # the first that fits is mostly among the first few
            few = left[start : start + 6]
            dx, dy = _RIM[:, 0] * width[few, None], _RIM[:, 1] * height[few, None]
            points = center[few, None] + np.stack(
                [cos[few] * dx - sin[few] * dy, sin[few] * dx + cos[few] * dy], axis=-1
            )
            whole = few[(self.at(points) == numbers[few, None]).all(axis=1)]
            if len(whole):
                break
        else:
            return None
        i = int(whole[0])
        self.taken.append((float(center[i, 0]), float(center[i, 1]), float(radius[i])))
        name = self.garment.pieces[self.panels[int(panel[i])]].name
        return Placement(
            name, float(center[i, 0]), float(center[i, 1]), float(width[i]), float(height[i]), float(degrees[i])
        )


def _place_inside(g: np.random.Generator, taken: list[tuple[float, float, float]], kind: str) -> Placement | None:
    """Choose a place on the flap, which is one unit wide and 0.62 high."""
    rule = KINDS[kind]
    aspect = g.uniform(*rule.aspect)
    height = min(0.34, 0.62 / aspect) * g.uniform(0.85, 1.1)
    if aspect < 0.35:
        height = 0.5
    for _ in range(20):
        width = height * aspect
        x, y = g.uniform(0.14 + width / 2, 0.90 - width / 2), g.uniform(0.04 + height / 2, 0.60 - height / 2)
        radius = CIRCLE * float(np.hypot(width, height))
        if any(np.hypot(x - a, y - b) < radius + r for a, b, r in taken):
            continue
        taken.append((x, y, radius))
        return Placement(INSIDE, x, y, width, height, g.uniform(-6, 6))
    return None


def _sample_views(g: np.random.Generator, category: str) -> tuple[str, ...]:
    views = ["front", "back"]
    if category not in SIDELESS and g.random() < 0.62:
        views.append("side")
    views += ["detail"] * int(g.choice((0, 1, 2), p=(0.22, 0.55, 0.23)))
    return tuple(views if len(views) > 2 else [*views, "detail"])


def _sample_details(g: np.random.Generator, product: Product, count: int) -> list[Detail]:
    """Choose `count` local details in addition to those of `product`, each on a face that some view shows."""
    maps = {face: PanelMap(garment_of(product, face)) for face in product.views if face != "detail"}
    flap: list[tuple[float, float, float]] = []
    for detail in product.details:
        for face, p in detail.places.items():
            (flap if face == INSIDE else maps[face].taken).append(
                (p.x, p.y, CIRCLE * float(np.hypot(p.width, p.height)))
            )
    faces, already = list(maps), {detail.kind for detail in product.details}
    kinds = [
        name for name, kind in KINDS.items() if name not in already and (not kind.only or product.category in kind.only)
    ]
    grounds = [product.color] + ([product.pattern_color] if product.pattern_color else [])
    details: list[Detail] = []
    for _ in range(4 * count):
        if len(details) == count or not kinds:
            break
        kind = _pick(g, kinds, [KINDS[name].weight for name in kinds])
        rule = KINDS[kind]
        what = _pick(g, rule.variants)
        inside = "detail" in product.views and rule.inside and g.random() < 0.15
        face = INSIDE if inside else _pick(g, faces)
        chosen = [face]
        if not inside and g.random() < SECOND_FACE:
            chosen.append(_pick(g, [other for other in faces if other != face]))
        under = grounds if not inside else [product.lining[0]]
        if product.trim == "sleeves" and product.trim_color and not inside:
            under = [*under, product.trim_color]
        color = contrasting(g, under, STUDS if rule.metal else CLOTH + (METALS if kind in ("zip", "buttons") else ()))
        places = {}
        for each in chosen:
            place = _place_inside(g, flap, kind) if each == INSIDE else maps[each].place(g, kind)
            if place:
                places[each] = place
        if places:
            details.append(Detail(kind, what, color, places))
            kinds.remove(kind)
    return details


def _sample_base(seed: int, split: str, number: int) -> Product:
    g = stream(seed, split, number, "product")
    categories = list(dict.fromkeys(sub.category for sub in SUBCATEGORIES.values()))
    weights = [2.0 if category in CLOTHES else 1.6 for category in categories]
    category = _pick(g, categories, weights)
    sub = SUBCATEGORIES[_pick(g, [s.name for s in SUBCATEGORIES.values() if s.category == category])]
    color = _pick(g, CLOTH)
    material = _pick(g, sub.materials)
    pattern = None if g.random() < 0.48 else _pick(g, PATTERNS)
    pattern_color = contrasting(g, [color], least=30.0) if pattern else None
    grounds = [color] + ([pattern_color] if pattern_color else [])
    trim = _pick(g, sub.trims) if sub.trims and g.random() < 0.42 else None
    sleeves = _pick(g, sub.sleeves) if sub.sleeves else None
    if trim in ("cuffs", "sleeves") and sleeves in ("none", "short", "puff"):
        trim = "sleeves" if sleeves != "none" and "sleeves" in sub.trims else None
    style = Style(
        sleeves,
        _pick(g, sub.necks) if sub.necks else None,
        float(g.uniform(6, 30)),
        trim,
        bool(sub.belt and g.random() < 0.30),
        (float(g.uniform(0.95, 1.12)), float(g.uniform(0.92, 1.06))),
    )
    views = _sample_views(g, category)
    product = Product(
        number,
        sub.name,
        style,
        color,
        _tinted(g, color),
        material,
        pattern,
        pattern_color,
        float(g.uniform(0.085, 0.13)),
        int(g.integers(2**31)),
        trim,
        contrasting(g, grounds) if trim else None,
        contrasting(g, grounds) if style.belt else None,
        (contrasting(g, [color], least=20.0), _pick(g, PATTERNS) if g.random() < 0.35 else None),
        "detail" in views and bool(g.random() < 0.35),
        (),
        views,
    )
    sewn = bool(trim) + bool(style.belt) + product.lining_named
    count = int(np.clip(g.integers(MIN_DETAILS, MAX_DETAILS + 1) - sewn, 1, MAX_LOCAL))
    return replace(product, details=tuple(_sample_details(g, product, count)))


def _changed(g: np.random.Generator, base: Product, number: int) -> Product:
    """Return `base` with exactly one attribute changed."""
    clean = replace(base, number=number, sibling_of=base.number)
    grounds = [base.color] + ([base.pattern_color] if base.pattern_color else [])
    worn = [d.color for d in base.details] + [c for c in (base.trim_color, base.belt_color, base.pattern_color) if c]
    changes = (
        ["color", "detail", "detail", "detail", "add", "remove"]
        + (["pattern"] if base.pattern else [])
        + (["trim"] if base.trim else [])
    )
    while True:
        change = _pick(g, changes)
        if change == "color":
            new_color = contrasting(g, [base.color, *worn], least=30.0)
            if min(distance(COLORS[new_color], COLORS[other]) for other in [base.color, *worn]) > 26:
                return replace(clean, color=new_color, rgb=_tinted(g, new_color))
        if change == "pattern":
            return replace(clean, pattern=_pick(g, [p for p in PATTERNS if p != base.pattern]))
        if change == "trim":
            return replace(clean, trim_color=contrasting(g, [*grounds, base.trim_color or base.color]))
        if change == "remove" and len(base.details) > 1:
            gone = int(g.integers(len(base.details)))
            return replace(clean, details=base.details[:gone] + base.details[gone + 1 :])
        if change == "add" and len(base.details) < MAX_LOCAL:
            new_details = _sample_details(g, base, 1)
            if new_details:
                return replace(clean, details=base.details + tuple(new_details))
        if change == "detail" and base.details:
            at = int(g.integers(len(base.details)))
            old = base.details[at]
            rule = KINDS[old.kind]
            others = [what for what in rule.variants if what != old.what]
            if others and (old.kind in COLORLESS or g.random() < 0.5):
                new = replace(old, what=_pick(g, others))
            else:
                under = [base.lining[0]] if INSIDE in old.places else grounds
                new = replace(
                    old,
                    color=contrasting(
                        g, [*under, old.color], tuple(c for c in (STUDS if rule.metal else CLOTH) if c != old.color)
                    ),
                )
            if new != old:
                return replace(clean, details=base.details[:at] + (new,) + base.details[at + 1 :])


def sample_product(seed: int, split: str, number: int) -> Product:
    """Return product `number` (from 0) of `split` ("train" or "eval") of the lookbook of `seed`."""
    if number % GROUP != GROUP - 1:
        return _sample_base(seed, split, number)
    g = stream(seed, split, number, "product")
    base = _sample_base(seed, split, number - 1 - int(g.integers(GROUP - 1)))
    return _changed(g, base, number)
