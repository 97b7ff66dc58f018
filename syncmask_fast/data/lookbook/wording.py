"""What the shop says about a product: one text for all its views, with the character span of every attribute in it.

The text never says left or right, and seldom on which side of the product a detail is; the order of mention is random.
Inside this file an attribute is marked up as [[name|words]]; `describe` takes the marks out and gives the spans.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .catalogue import INSIDE, Detail, Product
from .details import CLOTHES
from .garments import SUBCATEGORIES

PLACE_SAID = 0.05             # share of the mentions of details that tell the face
MENTION = dict(colour=0.90, material=0.72, pattern=0.85, sleeves=0.5, neckline=0.6, collar=0.6, hood=0.6, trim=0.68, belt=0.68, lining=0.68)
MENTION_DETAIL = 0.70
MIN_WORDS, MAX_WORDS = 10, 60

_MARK = re.compile(r"\[\[([^|\]]+)\|([^\]]+)\]\]")

SLEEVES = dict(long=("long sleeves", "full-length sleeves"), short=("short sleeves",), puff=("puff sleeves", "puffed sleeves"),
               bell=("bell sleeves", "flared sleeves"), none=("no sleeves",))
NECKS = dict(crew=("a round neck", "a crew neck"), v=("a V-neck", "a plunging V-neck"), scoop=("a scoop neck", "a deep scoop neckline"),
             square=("a square neck", "a square neckline"), boat=("a boat neck", "a wide boat neckline"))
COLLARS = dict(shirt=("a pointed collar", "a shirt collar"), roll=("a roll neck", "a high roll neck"), stand=("a stand-up collar", "a high collar"),
               lapel=("wide lapels", "notched lapels"), round=("a round collar", "a peter pan collar"), hood=("a hood", "a roomy hood"))
PATTERN_NOUN = {"stripes": ("stripes", "horizontal stripes"), "pinstripes": ("pinstripes", "vertical stripes"), "checks": ("gingham checks", "checks"),
                "tartan": ("tartan", "plaid"), "polka dots": ("polka dots", "dots"), "flowers": ("all-over flowers", "floral pattern"),
                "chevrons": ("chevrons", "chevron stripes"), "camouflage": ("camouflage",), "leopard spots": ("leopard spots", "animal spots"),
                "zigzags": ("zigzags", "zigzag lines"), "diamonds": ("diamonds", "harlequin diamonds")}
TRIMS = dict(cuffs="cuffs", hem="hem", collar="collar", sleeves="sleeves", hood="hood", straps="straps", waistband="waistband", handles="handles",
             base="base", flap="flap", ends="ends", sole="soles", brim="brim", hatband="hatband", edge="edging", **{"toe cap": "toe caps", "top band": "top band"})
PLURAL_TRIMS = ("cuffs", "sleeves", "straps", "handles", "ends", "sole", "toe cap")

BRANDS = ("Alder Row", "Norvell & Finch", "Tamsin Vale", "Okapi Lane", "Brightwater", "Studio Marrow", "Petra Holm", "Casa Lumo", "Fenwick Dale", "Ilva Berg",
          "Northquay", "Merle & Co", "Sable Street", "Juno Harrow", "Velda")
OCCASIONS = ("weekends in town", "long lunches", "the school run", "a first date", "city breaks", "the office", "summer festivals", "lazy Sundays",
             "crisp mornings", "holidays by the sea", "evenings out", "garden parties")
FILLERS = ("Perfect for {o}.", "Made for {o}.", "Made for {o} and {o2}.", "A favourite from {b}.", "By {b}.", "Designed by {b} for {o}.", "Easy to wear and easy to love.",
           "Comfortable from morning to night.", "Machine wash at 30 degrees.", "Wipe clean only.", "Dry clean only.", "Part of the new season.",
           "Runs true to size.", "Ethically made in small numbers.", "Wear it with confidence.", "A modern classic.", "Limited edition.", "Designed to last.",
           "New this week at {b}.", "Our buyers love it for {o}.", "Also in other sizes.", "Soft, light and full of character.", "It never goes out of fashion.")


def _article(phrase: str) -> str:
    first = _MARK.sub(r"\2", phrase).lower()
    return ("an " if first[0] in "aeio" or first.startswith(("um", "un")) else "a ") + phrase


def _detail_words(detail: Detail) -> tuple[str, bool]:
    """The plain value of a detail ("yellow star print") and whether it takes an article."""
    c, what = detail.colour, detail.what
    return {
        "print": (f"{c} {what} print", True), "embroidery": (f"{c} {what} embroidery", False), "patch": (f"{what} {c} patch", True),
        "pocket": (f"{c} {what}", True), "zip": (f"{c} zip", True), "buttons": (f"{what} {c} buttons", False), "bow": (f"{c} bow", True),
        "lacing": (f"{c} lacing", False), "band": (f"{c} stripe" if what == "single" else f"{c} double stripe", True), "studs": (f"{c} studs", False),
        "fringe": (f"{c} fringe", True), "lace": (f"{c} lace insert", True), "ruffle": (f"{c} ruffle", True),
        "lettering": (f'{c} "{what}" lettering', False), "strap": (f"{c} buckled strap", True), "tassel": (f"{c} tassel", True),
        "pompoms": (f"{c} pompoms", False), "label": (f"{c} label", True),
        "cut-out": (f"{what} cut-out", True), "quilting": (f"{c} quilted panel", True)}[detail.kind]


_SYNONYMS = {"print": (" print", " motif", " graphic"), "embroidery": (" embroidery", " stitching"), "patch": (" patch", " badge"), "zip": (" zip", " zipper", " zip fastener"),
             "lacing": (" lacing", " laces"), "band": (" stripe", " band"), "fringe": (" fringe", " fringing"), "ruffle": (" ruffle", " frill"),
             "lettering": (" lettering", " slogan"), "label": (" label", " woven label", " tag"), "tassel": (" tassel",), "lace": (" lace insert", " lace panel"),
             "strap": (" buckled strap", " strap with a buckle"), "buttons": (" buttons",), "pompoms": (" pompoms", " bobbles")}


def value_of(product: Product, name: str) -> str:
    """The value of an attribute as `facts` gives it."""
    sub = SUBCATEGORIES[product.subcategory]
    simple = {"category": product.category, "subcategory": product.subcategory, "colour": product.colour, "material": product.material}
    if name in simple:
        return simple[name]
    if name == "pattern":
        return f"{product.pattern_colour} {product.pattern}" if product.pattern else "solid"
    if name == "sleeves":
        return SLEEVES[product.style["sleeves"]][0]
    if name == "neckline":
        return NECKS[product.style["neck"]][0].split(" ", 1)[1]
    if name in ("collar", "hood"):
        return COLLARS[sub.shape["collar"]][0].removeprefix("a ")
    if name == "trim":
        return f"{product.trim_colour} {TRIMS[product.trim or 'hem']}"
    if name == "belt":
        return f"{product.belt_colour} belt"
    if name == "lining":
        return " ".join(filter(None, (product.lining[0], product.lining[1], "lining")))
    return _detail_words(next(d for d in product.details if d.kind == name))[0]


def _phrase(product: Product, name: str, g: np.random.Generator) -> str:
    """A marked-up noun phrase with its article for a sewn-in attribute or a local detail."""

    def choose(options: tuple[str, ...]) -> str:
        return options[int(g.integers(len(options)))]

    if name in ("sleeves", "neckline", "collar", "hood"):
        sub = SUBCATEGORIES[product.subcategory]
        words = choose(SLEEVES[product.style["sleeves"]] if name == "sleeves" else NECKS[product.style["neck"]] if name == "neckline"
                       else COLLARS[sub.shape["collar"]])
        article, rest = ("a ", words[2:]) if words.startswith("a ") else ("", words)
        return f"{article}[[{name}|{rest}]]"
    value = value_of(product, name)
    if name == "trim":
        if g.random() < 0.3:
            value = value.replace(" ", " contrast ", 1)
        return f"[[trim|{value}]]" if product.trim in PLURAL_TRIMS or product.trim == "edge" else _article(f"[[trim|{value}]]")
    if name in ("belt", "lining"):
        return _article(f"[[{name}|{value}]]")
    detail = next(d for d in product.details if d.kind == name)
    words, article = _detail_words(detail)
    if name in _SYNONYMS:
        old = _SYNONYMS[name][0]
        new = choose(_SYNONYMS[name])
        article = False if new in (" laces", " fringing") else True if new == " slogan" else article
        words = words.replace(old, new)
    if name == "print" and g.random() < 0.15:
        words = f"printed {detail.colour} {detail.what}"
    if name == "embroidery" and g.random() < 0.4:
        words, article = f"embroidered {detail.colour} {detail.what}", True
    if name == "zip" and g.random() < 0.12:
        words = "contrast " + words
    if name == "bow" and g.random() < 0.4:
        words = words.replace(" bow", choose((" bow", " ribbon bow", " tied bow")))
    phrase = f"[[{name}|{words}]]"
    phrase = _article(phrase) if article else phrase
    if name == "buttons" and g.random() < 0.3:
        phrase = "a row of " + phrase
    if g.random() < PLACE_SAID:
        face = next(iter(detail.places))
        phrase += {"front": " on the front", "back": " at the back", "side": " at the side", INSIDE: " inside"}[face]
    return phrase


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


@dataclass(frozen=True)
class Mention:
    name: str
    value: str
    start: int
    end: int


def _head(product: Product, told: set[str], g: np.random.Generator) -> str:
    """"red cotton midi dress with white dots", without an article."""
    sub = SUBCATEGORIES[product.subcategory]
    noun = sub.nouns[int(g.integers(len(sub.nouns)))] if g.random() < 0.6 else sub.nouns[0]
    colour = f"[[colour|{product.colour}]] " if "colour" in told else ""
    material = f"[[material|{product.material}]] " if "material" in told else ""
    after = ""
    if material and g.random() < 0.35:
        material, after = "", f" in [[material|{product.material}]]"
    if "pattern" in told and product.pattern:
        noun_words = PATTERN_NOUN[product.pattern]
        words = f"{product.pattern_colour} {noun_words[int(g.integers(len(noun_words)))]}"
        article = _article(f"[[pattern|{words}]]") if words.endswith(("pattern",)) else f"[[pattern|{words}]]"
        after += (" with ", " in ")[int(g.integers(2)) if not after else 0] + article
    return f"{colour}{material}[[category|{noun}]]{after}"


def describe(product: Product, g: np.random.Generator) -> tuple[str, list[Mention]]:
    """The text and, in order of their place in it, the attributes that it mentions."""
    sub = SUBCATEGORIES[product.subcategory]
    kinds = {d.kind for d in product.details}
    told = {name for name in product.names() if g.random() < (MENTION_DETAIL if name in kinds else MENTION.get(name, 1.0))}
    extra = [name for name in product.names() if name in told and name not in ("category", "subcategory", "colour", "material", "pattern")]
    extra = [extra[i] for i in g.permutation(len(extra))]
    while True:
        text = _compose(product, sub.plural, told, extra, g)
        words = len(_MARK.sub(r"\2", text).split())
        if words < MIN_WORDS:
            continue
        if words <= MAX_WORDS:
            break
        extra = extra[:-1]
    return _unmark(product, text)


def _compose(product: Product, plural: bool, told: set[str], extra: list[str], g: np.random.Generator) -> str:
    def choose(options: tuple[str, ...]) -> str:
        return options[int(g.integers(len(options)))]

    phrases = [_phrase(product, name, g) for name in extra]
    head = _head(product, told, g)
    a_head = head if plural else _article(head)
    if plural and g.random() < 0.35:
        a_head = "a pair of " + head
    they, these, feature, them = ("they", "these", "feature", "them") if plural else ("it", "this", "features", "it")
    cuts = sorted(int(g.integers(0, len(phrases) + 1)) for _ in range(2))
    groups = [phrases[: cuts[0]], phrases[cuts[0] : cuts[1]], phrases[cuts[1] :]]
    first, rest = groups[0], [group for group in groups[1:] if group]
    style = int(g.integers(6))
    sentences: list[str] = []
    if not first:
        sentences.append(choose((f"{a_head}.", f"meet {a_head}.", f"discover {a_head}.", f"introducing {a_head}.", f"{these} {head} {choose(('turn', 'turns')[:1] if plural else ('turns',))} heads.")))
    elif style == 0:
        sentences.append(f"{a_head} with {_join(first)}.")
    elif style == 1:
        sentences.append(f"{these} {head} {feature} {_join(first)}.")
    elif style == 2:
        sentences.append(f"with {_join(first)}, {these} {head} {'are' if plural else 'is'} ready for {choose(OCCASIONS)}.")
    elif style == 3:
        sentences.append(f"{_join(first)} {'give' if len(first) > 1 or 'row of' not in first[0] and _is_plural(first[0]) else 'gives'} {these} {head} a twist.")
    elif style == 4:
        sentences.append(f"look out for {_join(first)} on {these} {head}.")
    else:
        sentences.append(f"{a_head}, finished with {_join(first)}.")
    for group in rest:
        joined = _join(group)
        sentences.append(choose((f"{they} {feature} {joined}.", f"{they} also {'come' if plural else 'comes'} with {joined}.", f"finished with {joined}.", f"note {joined}.",
                                 f"there {'are' if len(group) == 1 and _is_plural(group[0]) else 'is'} {joined} too." if len(group) == 1 else f"you will love {joined}.",
                                 f"we added {joined}.", f"complete with {joined}.")))
    fillers = [choose(FILLERS) for _ in range(int(g.choice((0, 1, 2, 3), p=(0.18, 0.42, 0.30, 0.10))))]
    fillers = list(dict.fromkeys(fillers))
    filled = []
    for filler in fillers:
        o, o2 = (OCCASIONS[i] for i in g.choice(len(OCCASIONS), 2, replace=False))
        if plural:
            filler = filler.replace("Wear it", "Wear them").replace("love it", "love them").replace("It never goes", "They never go").replace("Runs", "True").replace(
                "True true", "True") if filler != "A modern classic." else "Modern classics."
        filled.append(filler.format(o=o, o2=o2, b=choose(BRANDS)))
    order = g.random()
    if order < 0.25 and rest:             # details first, then what they are on
        sentences = [s for s in sentences[1:] if not s.startswith((they, f"{they} also"))] + [s for s in sentences[:1]] + [
            s for s in sentences[1:] if s.startswith((they, f"{they} also"))]
    for filler in filled:
        at = int(g.integers(0, len(sentences) + 1))
        if filler.startswith(("Wear", "It ", "They ", "Our buyers")):
            at = len(sentences)
        sentences.insert(at, filler)
    return " ".join(_capital(s) for s in sentences)


def _is_plural(phrase: str) -> bool:
    words = _MARK.search(phrase)
    return bool(words) and words.group(2).split(" with ")[0].endswith("s") and not phrase.startswith(("a ", "an "))


def _capital(sentence: str) -> str:
    match = re.match(r"\[\[[^|\]]+\|", sentence)
    at = match.end() if match else 0
    return sentence[:at] + sentence[at].upper() + sentence[at + 1 :]


def _unmark(product: Product, marked: str) -> tuple[str, list[Mention]]:
    text, mentions, last = "", [], 0
    for match in _MARK.finditer(marked):
        text += marked[last : match.start()]
        name = match.group(1)
        mentions.append(Mention(name, value_of(product, "subcategory" if name == "category" else name), len(text), len(text) + len(match.group(2))))
        text += match.group(2)
        last = match.end()
    return text + marked[last:], mentions


__all__ = ["CLOTHES", "Mention", "describe", "value_of"]
