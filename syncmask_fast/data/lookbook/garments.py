"""What is sewn: the list of subcategories and the parts of each garment as seen from the front, the back and the side.

A garment is drawn in its own units (a shirt is about one unit wide), y down from the shoulder or the waist. `build` gives its
parts from the rearmost to the foremost; the picture's place, size and light come later (drawing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .garments_carried import bag, hat, scarf, shoe
from .garments_worn import dungarees, jumpsuit, legs, poncho, skirt, torso
from .geometry import rectangle
from .parts import Garment, Part, Seam

FACES = ("front", "back", "side")


@dataclass(frozen=True)
class Subcategory:
    """`nouns` are the words that a text may call it; `shape` are the arguments of its drawing function; `sleeves` and
    `necks` what it may be sewn with; `trims` the places where a second colour may sit."""

    name: str
    category: str
    family: str
    nouns: tuple[str, ...]
    shape: dict
    materials: tuple[str, ...]
    sleeves: tuple[str, ...] = ()
    necks: tuple[str, ...] = ()
    trims: tuple[str, ...] = ()
    belt: bool = False
    plural: bool = False


LIGHT = ("cotton", "linen", "satin", "denim", "velvet")
WARM = ("wool", "knit", "fleece", "corduroy")
COAT = ("tweed", "leather", "denim", "corduroy", "cotton", "velvet", "wool")
SOLE = ("leather", "denim", "velvet", "cotton", "satin", "suede")
LEG = ("denim", "cotton", "corduroy", "linen", "tweed", "leather", "satin", "velvet")
ALL_SLEEVES = ("long", "short", "puff", "bell", "none")
ARMS = ("long", "short", "puff", "bell")


def _list() -> tuple[Subcategory, ...]:
    s = Subcategory
    top = ("cuffs", "hem", "collar", "sleeves")
    return (
        s("t-shirt", "top", "torso", ("t-shirt", "tee"), dict(length=0.86, hem=0.30), ("cotton", "linen", "velvet", "fleece"),
          ("short", "long", "bell"), ("crew", "v", "scoop"), ("sleeves", "hem")),
        s("tank top", "top", "torso", ("tank top", "vest top"), dict(length=0.84, strap=0.10, hem=0.28), LIGHT, (),
          ("scoop", "v", "square"), ("hem",)),
        s("shirt", "top", "torso", ("shirt",), dict(length=0.92, collar="shirt", placket=True, tail=0.06), LIGHT,
          ("long", "short"), (), top),
        s("blouse", "top", "torso", ("blouse",), dict(length=0.80, waist=0.25, hem=0.33), LIGHT, ("puff", "bell", "long"),
          ("v", "boat", "square"), ("cuffs", "hem", "sleeves")),
        s("polo shirt", "top", "torso", ("polo shirt", "polo"), dict(length=0.86, collar="shirt", placket="short"),
          ("cotton", "knit", "velvet"), ("short", "long"), (), ("collar", "sleeves", "hem")),
        s("crop top", "top", "torso", ("crop top",), dict(length=0.54, waist=0.27, hem=0.28), LIGHT + ("knit",), ALL_SLEEVES,
          ("crew", "square", "v"), ("hem", "sleeves")),
        s("tunic", "top", "torso", ("tunic",), dict(length=1.16, hem=0.42, waist=0.29), LIGHT, ("long", "bell", "none"),
          ("v", "boat", "scoop"), ("hem", "cuffs"), belt=True),

        s("sweater", "knitwear", "torso", ("sweater", "jumper", "pullover"), dict(length=0.86, chest=0.33, waist=0.32, rib=True),
          WARM, ("long", "bell", "puff"), ("crew", "v", "boat"), ("cuffs", "hem", "sleeves")),
        s("turtleneck", "knitwear", "torso", ("turtleneck", "roll-neck jumper"), dict(length=0.86, collar="roll", rib=True), WARM,
          ("long", "puff", "none"), (), ("cuffs", "hem", "collar", "sleeves")),
        s("cardigan", "knitwear", "torso", ("cardigan",), dict(length=0.95, chest=0.33, waist=0.32, placket=True, deep=True), WARM,
          ("long", "puff"), ("v",), ("cuffs", "hem", "sleeves")),
        s("sweater vest", "knitwear", "torso", ("sweater vest", "knitted vest"), dict(length=0.78, rib=True), WARM, (),
          ("v", "crew"), ("hem",)),
        s("hoodie", "knitwear", "torso", ("hoodie", "hooded sweatshirt"), dict(length=0.86, chest=0.33, waist=0.32, collar="hood",
          rib=True), ("fleece", "cotton", "velvet"), ("long",), (), ("cuffs", "hem", "sleeves", "hood")),
        s("poncho", "knitwear", "poncho", ("poncho",), dict(length=0.95), WARM, (), ("v", "crew"), ("hem",)),

        s("bomber jacket", "jacket", "torso", ("bomber jacket", "bomber"), dict(length=0.78, chest=0.35, waist=0.36, hem=0.29,
          collar="stand", placket=True, rib=True), COAT, ("long",), (), ("cuffs", "hem", "sleeves", "collar")),
        s("blazer", "jacket", "torso", ("blazer",), dict(length=0.98, waist=0.26, hem=0.32, collar="lapel", placket=True), COAT,
          ("long",), (), ("collar", "cuffs")),
        s("trucker jacket", "jacket", "torso", ("trucker jacket", "western jacket"), dict(length=0.74, collar="shirt", placket=True,
          yoke=True, hem=0.27), COAT, ("long",), (), ("collar", "cuffs", "sleeves", "hem")),
        s("gilet", "jacket", "torso", ("gilet", "padded vest"), dict(length=0.82, chest=0.33, waist=0.32, collar="stand",
          placket=True, quilt=True), ("satin", "cotton", "corduroy", "leather"), (), (), ("collar", "hem")),
        s("puffer jacket", "jacket", "torso", ("puffer jacket", "quilted jacket"), dict(length=0.84, chest=0.36, waist=0.36, hem=0.34,
          collar="stand", placket=True, quilt=True), ("satin", "cotton", "leather", "velvet"), ("long",), (), ("sleeves", "collar")),

        s("trench coat", "coat", "torso", ("trench coat", "trench"), dict(length=1.28, waist=0.27, hem=0.42, collar="lapel",
          placket=True), COAT, ("long",), (), ("collar", "cuffs", "hem"), belt=True),
        s("parka", "coat", "torso", ("parka", "hooded coat"), dict(length=1.10, chest=0.34, waist=0.33, hem=0.37, collar="hood",
          placket=True), COAT, ("long",), (), ("hood", "cuffs", "sleeves")),
        s("cape", "coat", "poncho", ("cape", "cape coat"), dict(length=1.05, collar="stand", placket=True), COAT, (), (),
          ("collar", "hem")),
        s("swing coat", "coat", "torso", ("swing coat", "a-line coat"), dict(length=1.10, waist=0.34, hem=0.54, collar="round",
          placket=True), COAT, ("long", "bell"), (), ("collar", "cuffs", "hem")),

        s("mini dress", "dress", "torso", ("mini dress", "short dress"), dict(length=1.00, waist=0.23, hem=0.44, seam=0.50), LIGHT,
          ALL_SLEEVES, ("v", "crew", "square", "scoop"), ("hem", "sleeves"), belt=True),
        s("midi dress", "dress", "torso", ("midi dress", "tea dress"), dict(length=1.25, waist=0.23, hem=0.54, seam=0.50), LIGHT,
          ALL_SLEEVES, ("v", "boat", "square"), ("hem", "sleeves", "cuffs"), belt=True),
        s("maxi dress", "dress", "torso", ("maxi dress", "evening gown"), dict(length=1.50, waist=0.24, hem=0.66, seam=0.46), LIGHT,
          ("none", "long", "bell"), ("v", "scoop", "square"), ("hem",), belt=True),
        s("slip dress", "dress", "torso", ("slip dress",), dict(length=1.22, strap=0.03, waist=0.25, hem=0.36, neck_width=0.19),
          ("satin", "velvet", "linen"), (), ("v", "scoop"), ("hem",)),
        s("pencil dress", "dress", "torso", ("pencil dress", "sheath dress"), dict(length=1.22, waist=0.24, hip=0.31, hem=0.25,
          seam=0.50), LIGHT + ("wool", "tweed"), ("short", "none", "long"), ("boat", "crew", "square"), ("hem", "cuffs"), belt=True),
        s("shirt dress", "dress", "torso", ("shirt dress",), dict(length=1.18, waist=0.26, hem=0.40, collar="shirt", placket=True,
          tail=0.05), LIGHT, ("long", "short"), (), ("collar", "cuffs", "hem"), belt=True),

        s("jumpsuit", "jumpsuit", "jumpsuit", ("jumpsuit", "boiler suit"), dict(length=1.42, leg=0.17), LIGHT + ("corduroy",),
          ("long", "short", "none"), ("v", "crew", "square"), ("cuffs", "sleeves"), belt=True),
        s("playsuit", "jumpsuit", "jumpsuit", ("playsuit", "romper"), dict(length=0.98, leg=0.26), LIGHT, ("short", "puff", "none"),
          ("v", "scoop", "square"), ("sleeves",), belt=True),
        s("dungarees", "jumpsuit", "dungarees", ("dungarees", "overalls"), dict(length=1.38), ("denim", "corduroy", "cotton"),
          trims=("straps",), plural=True),

        s("jeans", "trousers", "legs", ("straight jeans", "straight trousers"), dict(length=1.12, knee=0.16, leg=0.15), LEG,
          trims=("waistband", "hem"), belt=True, plural=True),
        s("wide-leg trousers", "trousers", "legs", ("wide-leg trousers", "palazzo trousers"), dict(length=1.14, knee=0.21, leg=0.26),
          LEG, trims=("waistband", "hem"), belt=True, plural=True),
        s("flared trousers", "trousers", "legs", ("flared trousers", "flares"), dict(length=1.14, knee=0.13, leg=0.25), LEG,
          trims=("waistband", "hem"), belt=True, plural=True),
        s("joggers", "trousers", "legs", ("joggers", "sweatpants"), dict(length=1.06, knee=0.19, leg=0.10, rib=True),
          ("fleece", "cotton", "velvet", "knit"), trims=("waistband", "hem"), plural=True),
        s("leggings", "trousers", "legs", ("leggings", "skinny trousers"), dict(length=1.08, knee=0.125, leg=0.095),
          ("cotton", "leather", "velvet", "knit"), trims=("waistband", "hem"), plural=True),

        s("shorts", "shorts", "legs", ("shorts",), dict(length=0.60, knee=0.22, leg=0.22), LEG, trims=("waistband", "hem"),
          belt=True, plural=True),
        s("bermuda shorts", "shorts", "legs", ("bermuda shorts", "bermudas"), dict(length=0.80, knee=0.20, leg=0.19), LEG,
          trims=("waistband", "hem"), belt=True, plural=True),
        s("culottes", "shorts", "legs", ("culottes",), dict(length=0.86, knee=0.24, leg=0.31), LEG, trims=("waistband", "hem"),
          belt=True, plural=True),

        s("mini skirt", "skirt", "skirt", ("mini skirt",), dict(length=0.52, hem=0.38), LEG + ("wool",),
          trims=("waistband", "hem"), belt=True),
        s("pencil skirt", "skirt", "skirt", ("pencil skirt",), dict(length=0.86, hem=0.24, hip=0.33), LEG + ("wool",),
          trims=("waistband", "hem"), belt=True),
        s("a-line skirt", "skirt", "skirt", ("a-line skirt", "flared skirt"), dict(length=0.80, hem=0.54), LEG + ("wool",),
          trims=("waistband", "hem"), belt=True),
        s("pleated skirt", "skirt", "skirt", ("pleated skirt",), dict(length=0.78, hem=0.48, pleats=9), LIGHT + ("wool",),
          trims=("waistband", "hem")),
        s("tiered skirt", "skirt", "skirt", ("tiered skirt",), dict(length=0.96, hem=0.52, tiers=3), LIGHT,
          trims=("waistband", "hem")),

        s("tote bag", "bag", "bag", ("tote bag", "tote", "shopper"), dict(kind="tote"), SOLE, trims=("handles", "base")),
        s("satchel", "bag", "bag", ("satchel",), dict(kind="satchel"), SOLE, trims=("handles", "flap")),
        s("backpack", "bag", "bag", ("backpack", "rucksack"), dict(kind="backpack"), SOLE, trims=("base", "handles")),
        s("bucket bag", "bag", "bag", ("bucket bag",), dict(kind="bucket"), SOLE, trims=("handles", "base")),
        s("clutch", "bag", "bag", ("clutch", "clutch bag"), dict(kind="clutch"), SOLE, trims=("base",)),
        s("duffel bag", "bag", "bag", ("duffel bag", "weekend bag"), dict(kind="duffel"), SOLE, trims=("handles", "ends")),

        s("sneaker", "shoe", "shoe", ("sneakers", "trainers"), dict(kind="sneaker"), SOLE, trims=("sole", "toe cap"), plural=True),
        s("ankle boot", "shoe", "shoe", ("ankle boots",), dict(kind="ankle"), SOLE, trims=("sole", "top band"), plural=True),
        s("tall boot", "shoe", "shoe", ("tall boots", "knee-high boots"), dict(kind="tall"), SOLE, trims=("sole", "top band"),
          plural=True),
        s("pump", "shoe", "shoe", ("high heels", "pumps"), dict(kind="pump"), SOLE, trims=("sole", "toe cap"), plural=True),
        s("loafer", "shoe", "shoe", ("loafers",), dict(kind="loafer"), SOLE, trims=("sole", "toe cap"), plural=True),

        s("beanie", "hat", "hat", ("beanie", "woolly hat"), dict(kind="beanie"), WARM, trims=("brim",)),
        s("bucket hat", "hat", "hat", ("bucket hat",), dict(kind="bucket"), ("cotton", "denim", "corduroy", "fleece", "velvet"),
          trims=("brim",)),
        s("baseball cap", "hat", "hat", ("baseball cap", "cap"), dict(kind="cap"), ("cotton", "denim", "corduroy", "leather",
          "velvet"), trims=("brim",)),
        s("sun hat", "hat", "hat", ("sun hat", "wide-brimmed hat"), dict(kind="sun"), ("linen", "cotton", "tweed", "velvet"),
          trims=("brim", "hatband")),
        s("beret", "hat", "hat", ("beret",), dict(kind="beret"), ("wool", "velvet", "leather", "knit", "tweed"), trims=("brim",)),

        s("long scarf", "scarf", "scarf", ("long scarf", "winter scarf"), dict(kind="long"), WARM + ("tweed",), trims=("ends",)),
        s("shawl", "scarf", "scarf", ("shawl", "triangle scarf"), dict(kind="shawl"), ("knit", "satin", "wool", "linen"),
          trims=("edge",)),
        s("square scarf", "scarf", "scarf", ("square scarf", "neckerchief"), dict(kind="square"), ("satin", "cotton", "linen"),
          trims=("edge",)),
    )


SUBCATEGORIES = {sub.name: sub for sub in _list()}
CATEGORIES = tuple(dict.fromkeys(sub.category for sub in SUBCATEGORIES.values()))


_FAMILIES: dict[str, Callable[..., Garment]] = dict(
    torso=torso, poncho=poncho, jumpsuit=jumpsuit, dungarees=dungarees, legs=legs, skirt=skirt, bag=bag, shoe=shoe, hat=hat,
    scarf=scarf)


def build(subcategory: str, face: str, style: dict) -> Garment:
    """The garment of that subcategory seen from `face`. `style` holds "sleeves", "neck", "arm" (degrees from the body), "trim"
    (place of the second colour or None), "belt" (bool) and "proportions" (factors of width and height)."""
    sub = SUBCATEGORIES[subcategory]
    garment = _FAMILIES[sub.family](face, style, **sub.shape)
    if style.get("belt") and garment.waist is not None:
        y = garment.waist
        garment.add("belt", rectangle(-1.0, y - 0.04, 1.0, y + 0.04), "belt", clip="body")
        if face == "front":
            garment.add("buckle", rectangle(-0.045, y - 0.05, 0.045, y + 0.05), "metal")
    if style.get("trim") == "hem" and garment.hem is not None:
        garment.add("trim", rectangle(-2.0, garment.hem - 0.09, 2.0, garment.hem + 0.3), "trim", clip="body")
    wide, tall = style.get("proportions", (1.0, 1.0))
    return garment.stretched(wide, tall)
