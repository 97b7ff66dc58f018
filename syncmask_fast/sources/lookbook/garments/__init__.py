"""PLACE"""

from __future__ import annotations

import functools
from collections.abc import Callable

from syncmask_fast.sources.lookbook.garments.accessories import bag, hat, scarf, shoe
from syncmask_fast.sources.lookbook.garments.lower import dungarees, jumpsuit, legs, poncho, skirt
from syncmask_fast.sources.lookbook.garments.upper import torso
from syncmask_fast.sources.lookbook.geometry import Garment, Style, rectangle
from syncmask_fast.sources.lookbook.subcategories import SUBCATEGORIES

_FAMILIES: dict[str, Callable[..., Garment]] = dict(
    torso=torso,
    poncho=poncho,
    jumpsuit=jumpsuit,
    dungarees=dungarees,
    legs=legs,
    skirt=skirt,
    bag=bag,
    shoe=shoe,
    hat=hat,
    scarf=scarf,
)


@functools.lru_cache(maxsize=64)
def build(subcategory: str, face: str, style: Style) -> Garment:
    """The garment of that subcategory seen from `face`; shared, not to be changed."""
    sub = SUBCATEGORIES[subcategory]
    garment = _FAMILIES[sub.family](face, style, **sub.shape)
    if style.belt and garment.waist is not None:
        y = garment.waist
        garment.add("belt", rectangle(-1.0, y - 0.04, 1.0, y + 0.04), "belt", clip="body")
        if face == "front":
            garment.add("buckle", rectangle(-0.045, y - 0.05, 0.045, y + 0.05), "metal")
    if style.trim == "hem" and garment.hem is not None:
        garment.add("trim", rectangle(-2.0, garment.hem - 0.09, 2.0, garment.hem + 0.3), "trim", clip="body")
    return garment.stretched(*style.proportions)
