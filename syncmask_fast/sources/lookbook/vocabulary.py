"""The vocabulary of the texts."""

from __future__ import annotations

SLEEVES = dict(
    long=("long sleeves", "full-length sleeves"),
    short=("short sleeves",),
    puff=("puff sleeves", "puffed sleeves"),
    bell=("bell sleeves", "flared sleeves"),
    none=("no sleeves",),
)

NECKS = dict(
    crew=("a round neck", "a crew neck"),
    v=("a V-neck", "a plunging V-neck"),
    scoop=("a scoop neck", "a deep scoop neckline"),
    square=("a square neck", "a square neckline"),
    boat=("a boat neck", "a wide boat neckline"),
)

COLLARS = dict(
    shirt=("a pointed collar", "a shirt collar"),
    roll=("a roll neck", "a high roll neck"),
    stand=("a stand-up collar", "a high collar"),
    lapel=("wide lapels", "notched lapels"),
    round=("a round collar", "a peter pan collar"),
    hood=("a hood", "a roomy hood"),
)

PATTERN_NOUN = {
    "stripes": ("stripes", "horizontal stripes"),
    "pinstripes": ("pinstripes", "vertical stripes"),
    "checks": ("gingham checks", "checks"),
    "tartan": ("tartan", "plaid"),
    "polka dots": ("polka dots", "dots"),
    "flowers": ("all-over flowers", "floral pattern"),
    "chevrons": ("chevrons", "chevron stripes"),
    "camouflage": ("camouflage",),
    "leopard spots": ("leopard spots", "animal spots"),
    "zigzags": ("zigzags", "zigzag lines"),
    "diamonds": ("diamonds", "harlequin diamonds"),
}

PATTERN_ADJECTIVE = {
    "stripes": "striped",
    "pinstripes": "pinstriped",
    "checks": "checked",
    "tartan": "tartan",
    "polka dots": "dotted",
    "flowers": "floral",
    "chevrons": "chevron",
    "camouflage": "camouflage",
    "leopard spots": "spotted",
    "zigzags": "zigzag",
    "diamonds": "diamond",
}

TRIMS = dict(
    cuffs="cuffs",
    hem="hem",
    collar="collar",
    sleeves="sleeves",
    hood="hood",
    straps="straps",
    waistband="waistband",
    handles="handles",
    base="base",
    flap="flap",
    ends="ends",
    sole="soles",
    brim="brim",
    hatband="hatband",
    edge="edging",
    **{"toe cap": "toe caps", "top band": "top band"},
)

PLURAL_TRIMS = ("cuffs", "sleeves", "straps", "handles", "ends", "sole", "toe cap")

BRANDS = (
    "Alder Row",
    "Norvell & Finch",
    "Tamsin Vale",
    "Okapi Lane",
    "Brightwater",
    "Studio Marrow",
    "Petra Holm",
    "Casa Lumo",
    "Fenwick Dale",
    "Ilva Berg",
    "Northquay",
    "Merle & Co",
    "Sable Street",
    "Juno Harrow",
    "Velda",
)

OCCASIONS = (
    "weekends in town",
    "long lunches",
    "the school run",
    "a first date",
    "city breaks",
    "the office",
    "summer festivals",
    "lazy Sundays",
    "crisp mornings",
    "holidays by the sea",
    "evenings out",
    "garden parties",
)

FILLERS = (  # of things that no picture shows; where two are given, the second is for plural nouns
    ("Perfect for {o}.",),
    ("Made for {o}.",),
    ("Made for {o} and {o2}.",),
    ("A favorite from {b}.", "Favorites from {b}."),
    ("By {b}.",),
    ("Designed by {b} for {o}.",),
    ("Easy to wear and easy to love.",),
    ("Comfortable from morning to night.",),
    ("Machine wash at 30 degrees.",),
    ("Wipe clean only.",),
    ("Dry clean only.",),
    ("Part of the new season.",),
    ("True to size.",),
    ("Ethically made in small numbers.",),
    ("A modern classic.", "Modern classics."),
    ("Limited edition.",),
    ("Designed to last.",),
    ("New this week at {b}.",),
    ("Also in other sizes.",),
    ("Full of character.",),
    ("Our buyers cannot get enough.",),
    ("Free returns within a month.",),
    ("From the latest collection by {b}.",),
)

LAST_FILLERS = (  # these speak of the product as it or them: only after it was named
    ("Wear it with confidence.", "Wear them with confidence."),
    ("Our buyers love it for {o}.", "Our buyers love them for {o}."),
    ("It never goes out of fashion.", "They never go out of fashion."),
    ("Take it along for {o}.", "Take them along for {o}."),
)

SYNONYMS = {
    "print": (" print", " motif", " graphic"),
    "embroidery": (" embroidery", " stitching"),
    "patch": (" patch", " badge"),
    "zip": (" zip", " zipper", " zip fastener"),
    "lacing": (" lacing", " laces"),
    "band": (" stripe", " band"),
    "fringe": (" fringe", " fringing"),
    "ruffle": (" ruffle", " frill"),
    "lettering": (" lettering", " slogan"),
    "label": (" label", " woven label", " tag"),
    "tassel": (" tassel",),
    "lace": (" lace insert", " lace panel"),
    "strap": (" buckled strap", " strap with a buckle"),
    "buttons": (" buttons",),
    "pompoms": (" pompoms", " bobbles"),
}
