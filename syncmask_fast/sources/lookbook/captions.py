"""What the shop says about a product: one text for all its views, with the character span of every attribute.

The text never says left or right, and seldom on which side of the product a detail is. The order of mention is
random. In this file an attribute is marked up as [[name|words]]; `describe` takes the marks out and gives the spans.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from syncmask_fast.sources.lookbook.catalogue import INSIDE, Detail, Product
from syncmask_fast.sources.lookbook.details import KINDS
from syncmask_fast.sources.lookbook.subcategories import SUBCATEGORIES
from syncmask_fast.sources.lookbook.vocabulary import (
    BRANDS,
    COLLARS,
    FILLERS,
    LAST_FILLERS,
    NECKS,
    OCCASIONS,
    PATTERN_ADJECTIVE,
    PATTERN_NOUN,
    PLURAL_TRIMS,
    SLEEVES,
    SYNONYMS,
    TRIMS,
)

PLACE_SAID = 0.05  # share of the mentions of details that tell the face
MENTION = dict(
    color=0.97,
    material=0.72,
    pattern=0.85,
    sleeves=0.5,
    neckline=0.6,
    collar=0.6,
    hood=0.6,
    trim=0.68,
    belt=0.68,
    lining=0.68,
)
MENTION_DETAIL = 0.70
MIN_WORDS, MAX_WORDS = 10, 60
_MARK = re.compile(r"\[\[([^|\]]+)\|([^\]]+)\]\]")


def _choose(g: np.random.Generator, options: tuple) -> Any:
    return options[int(g.integers(len(options)))]


def _article(phrase: str) -> str:
    first = _MARK.sub(r"\2", phrase).lower()
    return ("an " if first[0] in "aeio" or first.startswith(("um", "un")) else "a ") + phrase


def _detail_words(detail: Detail) -> tuple[str, bool]:
    """Return the plain value of a detail ("yellow star print") and whether it takes an article."""
    kind = KINDS[detail.kind]
    words = kind.words.format(color=detail.color, what=detail.what)
    return words.replace(" single stripe", " stripe"), kind.article


def facts(product: Product) -> dict[str, str]:
    """Return the product as a flat dict: attribute name to value."""
    return {name: value_of(product, name) for name in product.names()}


def value_of(product: Product, name: str) -> str:
    """Return the value of an attribute as `facts` gives it."""
    sub = SUBCATEGORIES[product.subcategory]
    simple = {
        "category": product.category,
        "subcategory": product.subcategory,
        "color": product.color,
        "material": product.material,
    }
    if name in simple:
        return simple[name]
    if name == "pattern":
        return f"{product.pattern_color} {product.pattern}" if product.pattern else "solid"
    if name == "sleeves":
        return SLEEVES[product.style.sleeves][0]
    if name == "neckline":
        return NECKS[product.style.neck][0].split(" ", 1)[1]
    if name in ("collar", "hood"):
        return COLLARS[sub.shape["collar"]][0].removeprefix("a ")
    if name == "trim":
        return f"{product.trim_color} {TRIMS[product.trim or 'hem']}"
    if name == "belt":
        return f"{product.belt_color} belt"
    if name == "lining":
        color, pattern = product.lining
        return f"{color} {PATTERN_ADJECTIVE[pattern]} lining" if pattern else f"{color} lining"
    return _detail_words(next(d for d in product.details if d.kind == name))[0]


def _phrase(product: Product, name: str, g: np.random.Generator) -> str:
    """Return a marked-up noun phrase with its article for a sewn-in attribute or a local detail."""

    if name in ("sleeves", "neckline", "collar", "hood"):
        if name == "sleeves":
            words = _choose(g, SLEEVES[product.style.sleeves])
        elif name == "neckline":
            words = _choose(g, NECKS[product.style.neck])
        else:
            words = _choose(g, COLLARS[SUBCATEGORIES[product.subcategory].shape["collar"]])
        article, rest = ("a ", words[2:]) if words.startswith("a ") else ("", words)
        return f"{article}[[{name}|{rest}]]"
    value = value_of(product, name)
    if name == "trim":
        if g.random() < 0.3:
            value = value.replace(" ", " contrast ", 1)
        without_article = product.trim in PLURAL_TRIMS or product.trim == "edge"
        return f"[[trim|{value}]]" if without_article else _article(f"[[trim|{value}]]")
    if name in ("belt", "lining"):
        return _article(f"[[{name}|{value}]]")
    detail = next(d for d in product.details if d.kind == name)
    words, article = _detail_words(detail)
    if name in SYNONYMS:
        old = SYNONYMS[name][0]
        new = _choose(g, SYNONYMS[name])
        article = False if new in (" laces", " fringing") else True if new == " slogan" else article
        words = words.replace(old, new)
    if name == "print" and g.random() < 0.15:
        words = f"printed {detail.color} {detail.what}"
    if name == "embroidery" and g.random() < 0.4:
        words, article = f"embroidered {detail.color} {detail.what}", True
    if name == "zip" and g.random() < 0.12:
        words = "contrast " + words
    if name == "bow" and g.random() < 0.4:
        words = words.replace(" bow", _choose(g, (" bow", " ribbon bow", " tied bow")))
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
    """Return the product in words without an article, such as "red cotton midi dress in white dots"."""
    sub = SUBCATEGORIES[product.subcategory]
    noun = sub.nouns[int(g.integers(len(sub.nouns)))] if g.random() < 0.3 else sub.nouns[0]
    color = f"[[color|{product.color}]] " if "color" in told else ""
    material = f"[[material|{product.material}]]" if "material" in told else ""
    if "pattern" in told and product.pattern:
        words = f"{product.pattern_color} {_choose(g, PATTERN_NOUN[product.pattern])}"
        pattern = f"[[pattern|{words}]]"
        after = " in " + (_article(pattern) if words.endswith("pattern") else pattern)
        before = material and f"{material} "
    elif material and g.random() < 0.4:
        before, after = "", f" in {material}"
    else:
        before, after = material and f"{material} ", ""
    return f"{color}{before}[[category|{noun}]]{after}"


def describe(product: Product, g: np.random.Generator) -> tuple[str, list[Mention]]:
    """Return the text and the attributes that it mentions, in their order in the text."""
    sub = SUBCATEGORIES[product.subcategory]
    kinds = {d.kind for d in product.details}
    told = {
        name
        for name in product.names()
        if not (name == "sleeves" and product.style.sleeves == "none")
        and g.random() < (MENTION_DETAIL if name in kinds else MENTION.get(name, 1.0))
    }
    extra = [
        name
        for name in product.names()
        if name in told and name not in ("category", "subcategory", "color", "material", "pattern")
    ]
    extra = [extra[i] for i in g.permutation(len(extra))]
    while True:
        text = _compose(product, sub.plural, told, extra, g)
        words = len(_MARK.sub(r"\2", text).split())
        if MIN_WORDS <= words <= MAX_WORDS:
            return _unmark(product, text)
        extra = extra[:-1] if words > MAX_WORDS else extra


def _compose(product: Product, plural: bool, told: set[str], extra: list[str], g: np.random.Generator) -> str:
    """Return marked-up sentences that mention `told` and `extra`, in the order of `extra`."""
    phrases = [_phrase(product, name, g) for name in extra]
    head = _head(product, told, g)
    named = ("a pair of " if g.random() < 0.35 else "") + head if plural else _article(head)
    this = f"{'these' if plural else 'this'} {head}"
    cuts = sorted(int(v) for v in g.integers(0, len(phrases) + 1, 2))
    first, rest = (phrases[: cuts[0]], [group for group in (phrases[cuts[0] : cuts[1]], phrases[cuts[1] :]) if group])
    opening = _opening(named, this, plural, first, g)
    openers = g.permutation(len(_FOLLOW_ON) + 2)
    late, free = [], []  # sentences that need the product named before, and those that do not
    for group, kind in zip(rest, openers[: len(rest)], strict=True):
        joined = _join(group)
        if kind >= len(_FOLLOW_ON):
            verb = (("they feature", "they also come with") if plural else ("it features", "it also comes with"))[
                kind - len(_FOLLOW_ON)
            ]
            late.append(f"{verb} {joined}.")
        else:
            free.append(_FOLLOW_ON[kind].format(joined))
    sentences = [*free, opening, *late] if g.random() < 0.3 else [opening, *free, *late]
    count = int(g.choice(4, p=(0.45, 0.40, 0.15, 0.0)))
    for i in g.permutation(len(FILLERS))[:count]:
        sentences.insert(int(g.integers(0, len(sentences) + 1)), _filler(FILLERS[i], plural, g))
    if g.random() < 0.2:
        sentences.append(_filler(_choose(g, LAST_FILLERS), plural, g))
    return " ".join(_capital(sentence) for sentence in sentences)


_FOLLOW_ON = (
    "finished with {}.",
    "note {}.",
    "you will love {}.",
    "we added {}.",
    "complete with {}.",
    "detailed with {}.",
    "spot {}.",
    "set off by {}.",
)


def _opening(named: str, this: str, plural: bool, first: list[str], g: np.random.Generator) -> str:
    """Return the sentence that names the product, with the details `first`.

    named: with an article ("a red dress"). this: with "this".
    """
    if not first:
        return _choose(
            g,
            (
                f"{named}.",
                f"meet {named}.",
                f"discover {named}.",
                f"introducing {named}.",
                f"{this} {'turn' if plural else 'turns'} heads.",
                f"there is nothing like {this}.",
            ),
        )
    joined = _join(first)
    many = len(first) > 1 or _is_plural(first[0])
    return _choose(
        g,
        (
            f"{named} with {joined}.",
            f"{this} {'feature' if plural else 'features'} {joined}.",
            f"with {joined}, {this} {'are' if plural else 'is'} ready for {_choose(g, OCCASIONS)}.",
            f"{joined} {'give' if many else 'gives'} {this} a twist.",
            f"look out for {joined} on {this}.",
            f"{named}, finished with {joined}.",
            f"we made {this} with {joined}.",
            f"{joined} {'make' if many else 'makes'} {this} special.",
        ),
    )


def _filler(forms: tuple[str, ...], plural: bool, g: np.random.Generator) -> str:
    one, other = (OCCASIONS[i] for i in g.permutation(len(OCCASIONS))[:2])
    return forms[-1 if plural else 0].format(o=one, o2=other, b=_choose(g, BRANDS))


def _is_plural(phrase: str) -> bool:
    """Return whether a verb after this phrase is plural: "white buttons", but not "a row of white buttons"."""
    if phrase.startswith(("a ", "an ")):
        return False
    match = _MARK.search(phrase)
    return match is not None and match.group(2).split(" with ")[0].endswith("s")


def _capital(sentence: str) -> str:
    match = re.match(r"\[\[[^|\]]+\|", sentence)
    at = match.end() if match else 0
    return sentence[:at] + sentence[at].upper() + sentence[at + 1 :]


def _unmark(product: Product, marked: str) -> tuple[str, list[Mention]]:
    text, mentions, last = "", [], 0
    for match in _MARK.finditer(marked):
        text += marked[last : match.start()]
        name = match.group(1)
        mentions.append(
            Mention(
                name,
                value_of(product, "subcategory" if name == "category" else name),
                len(text),
                len(text) + len(match.group(2)),
            )
        )
        text += match.group(2)
        last = match.end()
    return text + marked[last:], mentions
