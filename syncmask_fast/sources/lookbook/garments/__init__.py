"""Which function draws a garment: its pieces as seen from the front, the back and the side.

A garment is drawn in its own units (a shirt is about one unit wide), y down from the shoulder or the waist. `build`
gives its pieces from the rearmost to the foremost. Position, size and light come later (drawing.py).

A new garment is a function (face, style, **shape) -> Garment here, and a line in subcategories.csv.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from syncmask_fast.sources.lookbook.garments.accessories import bag, hat, scarf, shoe
from syncmask_fast.sources.lookbook.garments.lower import dungarees, jumpsuit, legs, skirt
from syncmask_fast.sources.lookbook.garments.upper import poncho, torso
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
    """Return the garment of a subcategory seen from `face`. It is shared: do not change it."""
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
