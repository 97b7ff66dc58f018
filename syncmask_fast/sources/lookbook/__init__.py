"""The lookbook: a drawn fashion catalogue that records, for every word of a text, where an image shows it."""

from __future__ import annotations

from syncmask_fast.sources.lookbook.source import draw_lookbook

__all__ = ["draw_lookbook"]
