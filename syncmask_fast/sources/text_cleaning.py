"""Make the texts of catalogues readable, by the same steps in the same order for every source."""

from __future__ import annotations

import functools
import html
import re

_BREAK = re.compile(r"<\s*(?:br|/?p|/?li|/?div|/?ul)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\ufeff]+")
_SPACE = re.compile(r"\s+")
_CUT_OFF = re.compile(r"(?:<[^<>]*|\s*[^\W_]+)$")


def clean(text: str) -> str:
    """Return one line of plain text.

    1. Tags that break a line (<br>, <p>, <li> ...) become a blank, all other tags vanish.
    2. HTML entities become their characters.
    3. Control characters become blanks, runs of blanks one, outer blanks none.
    """
    text = _TAG.sub("", _BREAK.sub(" ", text))
    return _SPACE.sub(" ", _CONTROL.sub(" ", html.unescape(text))).strip()


@functools.lru_cache(maxsize=4096)  # images of a product share their texts
def decode_field(raw: bytes, width: int, encoding: str = "iso-8859-1") -> str:
    """Return a fixed-width field of bytes as clean text.

    Padding (zero bytes, blanks) is removed. A long text that fills its whole field was truncated when the file was
    written, so its last word or tag is removed too.
    """
    raw = raw.rstrip(b"\0")
    text = raw.decode(encoding, "replace")
    if len(raw) == width > 16:
        text = _CUT_OFF.sub("", text)
    return clean(text)


def join(parts: list[str]) -> str:
    """Join texts without empty and repeated ones, with a full stop between those that end without a mark."""
    kept: list[str] = []
    for part in parts:
        if part and part not in kept:
            kept.append(part)
    return " ".join(
        part if part[-1] in ".!?:;," or place == len(kept) - 1 else f"{part}." for place, part in enumerate(kept)
    )


def label(text: str) -> str:
    """Return a category's name: clean, in lower case."""
    return clean(text).lower()
