"""What a report shows: its examples as plain data, and the geometry that the page and the picture share.

Letters: S side of a picture in pixels, G patches per side, P = G * G patches in row-major order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Which = Literal["random", "sync"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class WordMark:
    """One word, or one piece of a word, of an example's text.

    start, end: character span in the text.     maskable: False for pieces that are never masked.
    visible:    can the view show what the word names; None where it names no attribute.
    random, sync: masked by the random mask, by the synchronised mask.     score: the teacher's, -inf allowed.
    """

    text: str
    start: int
    end: int
    maskable: bool
    visible: bool | None
    random: bool
    sync: bool
    score: float


@dataclass(frozen=True, eq=False)
class MaskExample:
    """One picture with its text, masked at random and by the teacher's attention.

    image: uint8 [S, S, 3].     random_patches, sync_patches: bool [P].     patch_score: float32 [P].
    boxes: (name, (x0, y0, x1, y1)) in pixels of `image`; empty where no ground truth is known.
    errors: ValueError where a shape does not fit.
    """

    image: np.ndarray
    text: str
    words: list[WordMark]
    grid: int
    random_patches: np.ndarray
    sync_patches: np.ndarray
    patch_score: np.ndarray
    boxes: list[tuple[str, Box]] = field(default_factory=list)
    view: str = ""
    product: str = ""

    def __post_init__(self) -> None:
        check_picture(self.image, "image")
        if self.image.shape[0] != self.image.shape[1]:
            raise ValueError(f"image must be square, got {self.image.shape}")
        for name in ("random_patches", "sync_patches", "patch_score"):
            shape = getattr(self, name).shape
            if shape != (self.grid * self.grid,):
                raise ValueError(f"{name} must have shape ({self.grid * self.grid},), got {shape}")

    def patches(self, which: Which) -> np.ndarray:
        """bool [P]: the patches masked by `which`."""
        return self.random_patches if which == "random" else self.sync_patches


@dataclass(frozen=True, eq=False)
class RetrievedItem:
    """One answer of a search: a picture (uint8 [H, W, 3]) or a text, its score, and whether it is right."""

    image: np.ndarray | None
    text: str | None
    score: float
    correct: bool

    def __post_init__(self) -> None:
        if (self.image is None) == (self.text is None):
            raise ValueError("a retrieved item has either an image or a text")
        if self.image is not None:
            check_picture(self.image, "image")


@dataclass(frozen=True, eq=False)
class RetrievalExample:
    """One query with its best answers, best first. rank_of_truth counts from 1."""

    direction: Literal["t2i", "i2t"]
    query_text: str | None
    query_image: np.ndarray | None
    results: list[RetrievedItem]
    rank_of_truth: int

    def __post_init__(self) -> None:
        if self.direction not in ("t2i", "i2t"):
            raise ValueError(f"direction must be 't2i' or 'i2t', got {self.direction!r}")
        if self.rank_of_truth < 1:
            raise ValueError(f"rank_of_truth counts from 1, got {self.rank_of_truth}")
        if (self.query_text if self.direction == "t2i" else self.query_image) is None:
            raise ValueError(f"a {self.direction} example needs query_{'text' if self.direction == 't2i' else 'image'}")
        if self.query_image is not None:
            check_picture(self.query_image, "query_image")


def check_picture(image: np.ndarray, name: str) -> None:
    """ValueError unless `image` is uint8 [H, W, 3] and not empty."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{name} must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")


@dataclass(frozen=True)
class Segment:
    """A run of text drawn in one style. score: 0..1 within its sample, None where the teacher gave none."""

    text: str
    masked: bool
    visible: bool | None
    score: float | None


def segments(example: MaskExample, which: Which) -> list[Segment]:
    """The whole text cut into styled runs; joined they give `example.text` again.

    Pieces of one word that touch and look alike become one run (with the higher score). Spans out of order
    are sorted; those that overlap an earlier one or leave the text are dropped.
    """
    scale = _score_scale(example.words)
    runs: list[tuple[int, int, bool, bool | None, float | None]] = []
    position = 0
    for word in sorted(example.words, key=lambda word: word.start):
        if word.start < position or word.end <= word.start or word.end > len(example.text):
            continue
        masked = word.random if which == "random" else word.sync
        score = scale(word.score) if word.maskable else None
        last = runs[-1] if runs else None
        if last and last[1] == word.start and last[2:4] == (masked, word.visible):
            scores = [value for value in (last[4], score) if value is not None]
            runs[-1] = (last[0], word.end, masked, word.visible, max(scores, default=None))
        else:
            runs.append((word.start, word.end, masked, word.visible, score))
        position = word.end
    out: list[Segment] = []
    position = 0
    for start, end, masked, visible, score in runs:
        if start > position:
            out.append(Segment(example.text[position:start], False, None, None))
        out.append(Segment(example.text[start:end], masked, visible, score))
        position = end
    if position < len(example.text):
        out.append(Segment(example.text[position:], False, None, None))
    return out


def _score_scale(words: list[WordMark]):
    """A function from a teacher's score to 0..1: least to greatest finite score of the maskable words."""
    finite = [word.score for word in words if word.maskable and np.isfinite(word.score)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return lambda score: (score - low) / (high - low) if high > low and np.isfinite(score) else 0.0


def patch_count(example: MaskExample, which: Which) -> str:
    """How many patches are hidden, and how many of those show what the text names, by `mask_quality.mask_truth`."""
    from syncmask_fast.tasks import mask_quality  # imports torch, which reading a report must not

    patches, side = example.patches(which), example.image.shape[0]
    hidden = int(patches.sum())
    if not example.boxes:
        return f"{hidden} of {patches.size} patches hidden"
    attributes = [{"span": (0, 0), "box": box} for _, box in example.boxes]
    truth = mask_quality.mask_truth(np.zeros((0, 2), dtype=np.int64), attributes, side, side, example.grid)
    named, small = (int((patches & on).sum()) for on in (truth.patches_any_attribute, truth.patches))
    said = f"{named} of {hidden} hidden patches show what the text names"
    return said + (f", {small} a numbered detail" if any(frame.detail for frame in frames(example)) else "")


@dataclass(frozen=True)
class Frame:
    """An outlined box. names: all that it shows. badge: centre of its number. In pixels of the image.

    detail: small (`mask_quality.PLACE_AREA`); colour, material and such fill the whole garment.
    """

    names: str
    box: Box
    badge: tuple[float, float]
    detail: bool


def frames(example: MaskExample, radius: float = 1.0) -> list[Frame]:
    """The boxes clipped to the picture, equal ones (to a pixel) merged; first the details, then the others.

    radius: of a number's disc, in pixels of the image; the numbers are kept apart.
    """
    from syncmask_fast.tasks import mask_quality  # imports torch, which reading a report must not

    side = float(example.image.shape[0])
    merged: dict[tuple[int, ...], tuple[list[str], Box]] = {}
    for name, box in example.boxes:
        x0, y0, x1, y1 = inside = tuple(float(np.clip(value, 0, side)) for value in box)
        if x1 > x0 and y1 > y0:
            names, _ = merged.setdefault(tuple(round(value) for value in inside), ([], inside))
            if name not in names:
                names.append(name)
    out: list[Frame] = []
    for names, (x0, y0, x1, y1) in merged.values():
        detail = (x1 - x0) * (y1 - y0) < mask_quality.PLACE_AREA * side * side
        badge = _free_corner((x0, y0, x1, y1), [frame.badge for frame in out if frame.detail], radius, side)
        out.append(Frame(", ".join(names), (x0, y0, x1, y1), badge, detail))
    return sorted(out, key=lambda frame: not frame.detail)


def _free_corner(box: Box, taken: list[tuple[float, float]], radius: float, side: float) -> tuple[float, float]:
    """The first corner of `box` where a disc meets no other, or else the one farthest from the others."""
    corners = [(box[0], box[1]), (box[2], box[1]), (box[0], box[3]), (box[2], box[3])]
    places = [tuple(float(np.clip(value, radius, side - radius)) for value in corner) for corner in corners]
    gaps = [min([np.hypot(x - u, y - v) for u, v in taken] + [2.1 * radius]) for x, y in places]
    return places[int(np.argmax(gaps))]


def key_of(example: MaskExample) -> tuple[list[str], str]:
    """What the outlines mean: a name for each numbered detail, and all that fills larger boxes, joined."""
    found = frames(example)
    large = dict.fromkeys(name for frame in found if not frame.detail for name in frame.names.split(", "))
    return [frame.names for frame in found if frame.detail], ", ".join(large)


def word_counts(parts: list[Segment]) -> tuple[int, int, int]:
    """(masked runs, of them naming something in view, of them naming something out of view)."""
    masked = [part for part in parts if part.masked]
    return len(masked), sum(p.visible is True for p in masked), sum(p.visible is False for p in masked)
