"""The lookbook: a drawn fashion catalogue whose every word knows where it is seen, or that it is not."""

from __future__ import annotations

from .build import draw_lookbook

__all__ = ["draw_lookbook"]
