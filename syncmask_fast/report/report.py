"""Write a finished run as one self-contained HTML file: plain data in, one file out, no torch.

Letters: S side of an image in pixels, G patches per side, P = G * G patches in row-major order.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from syncmask_fast.report.charts import is_finite, number, training_charts
from syncmask_fast.report.contact_sheet import ACCENT, SLATE, Box, Cell, Frame, Segment, contact_sheet, frames
from syncmask_fast.utils.files import atomic_file

RECALL = re.compile(r"retrieval/(i2t|t2i|mean)/([^/]+)/R@(\d+)(/std)?")
DIRECTIONS = {"i2t": "photo → text", "t2i": "text → photo", "mean": "mean of both"}
RATES = {"precision": "precision", "shuffled": "shuffled", "random": "random", "auc": "AUC"}
RATES["auc/shuffled"] = "AUC, shuffled"
MASK_CARDS = {
    "patches": (
        "Hides the right patches",
        "Share of hidden patches on something that the text names and the photo shows.",
    ),
    "words": ("Hides the right words", "Share of hidden detail words that this photo can answer."),
}
SYNC = re.compile(r"(sync/.+?)/(precision|shuffled|random|auc/shuffled|auc)(/std)?")


@dataclass(frozen=True)
class WordMark:
    """One token of an example's text: characters start to end, whether each mask hides it, and the teacher's score.

    visible: whether the view shows what the token names, None where it names no attribute. score: -inf is allowed.
    """

    start: int
    end: int
    visible: bool | None
    random: bool
    sync: bool
    score: float


@dataclass(frozen=True, eq=False)
class MaskExample:
    """One photo with its text, masked at random and by the teacher.

    image: uint8 [S, S, 3]. random, sync: bool [P], hidden patches. score: float32 [P].
    boxes: (name, (x0, y0, x1, y1)) in pixels of `image`, empty where no truth is known.
    named, detail: bool [P], patches on what the text names, and on small details of it; None without truth.
    """

    image: np.ndarray
    text: str
    words: list[WordMark]
    grid: int
    random: np.ndarray
    sync: np.ndarray
    score: np.ndarray
    boxes: list[tuple[str, Box]] = field(default_factory=list)
    named: np.ndarray | None = None
    detail: np.ndarray | None = None
    view: str = ""
    product: str = ""

    def frames(self) -> list[Frame]:
        """Return the outlined boxes, details first."""
        side = self.image.shape[0]
        return frames(self.boxes, side, side, 1.1 * side / 24)

    def key(self) -> tuple[list[str], str]:
        """Return the names of the numbered details, and all other names, joined."""
        found = self.frames()
        large = dict.fromkeys(name for frame in found if not frame.detail for name in frame.names.split(", "))
        return [frame.names for frame in found if frame.detail], ", ".join(large)

    def segments(self, which: Literal["random", "sync"]) -> list[Segment]:
        """Return the text cut into styled runs; joined they give the text again.

        Tokens that touch and look alike become one run, with the higher score. Spans that overlap an earlier one or
        leave the text are dropped.
        """
        finite = [word.score for word in self.words if np.isfinite(word.score)] or [0.0]
        low, span = min(finite), max(finite) - min(finite) or 1.0
        runs, position = [], 0
        for word in sorted(self.words, key=lambda word: word.start):
            if word.start < position or not word.start < word.end <= len(self.text):
                continue
            score = max(0.0, (word.score - low) / span) if np.isfinite(word.score) else 0.0
            run = Segment(self.text[word.start : word.end], getattr(word, which), word.visible, score)
            if word.start > position:
                runs.append(Segment(self.text[position : word.start]))
            elif runs and (runs[-1].masked, runs[-1].visible) == (run.masked, run.visible):
                last = runs.pop()
                run = Segment(last.text + run.text, run.masked, run.visible, max(last.score or 0.0, score))
            runs.append(run)
            position = word.end
        return [*runs, *([Segment(self.text[position:])] if position < len(self.text) else [])]

    def patch_count(self, which: Literal["random", "sync"]) -> str:
        """Return how many patches are hidden, and how many of them show what the text names."""
        patches = getattr(self, which)
        hidden = int(patches.sum())
        if self.named is None or not self.boxes:
            return f"{hidden} of {patches.size} patches hidden"
        said = f"{int((patches & self.named).sum())} of {hidden} hidden patches show what the text names"
        small = f", {int((patches & self.detail).sum())} a numbered detail"
        return said + small * any(frame.detail for frame in self.frames())

    def word_count(self, which: Literal["random", "sync"]) -> str:
        """Return how many words are hidden, and how many of them name what the view shows, or does not show."""
        hidden = [run.visible for run in self.segments(which) if run.masked]
        said = f"{len(hidden)} hidden word{'s' * (len(hidden) != 1)}"
        seen = f": {hidden.count(True)} can be seen here, {hidden.count(False)} cannot"
        return said + seen * (True in hidden or False in hidden)

    def cells(self, which: Literal["random", "sync"]) -> str:
        """Return the hidden patches as an SVG path; a twentieth of a patch stays free between two."""
        side = self.image.shape[0] / self.grid
        rows, columns = np.divmod(np.flatnonzero(getattr(self, which)), self.grid)
        corners = zip((columns + 0.025) * side, (rows + 0.025) * side, strict=True)
        return "".join(f"M{x:.4g} {y:.4g}h{0.95 * side:.4g}v{0.95 * side:.4g}h{-0.95 * side:.4g}z" for x, y in corners)


@dataclass(frozen=True, eq=False)
class RetrievedItem:
    """One answer of a search: an image (uint8 [H, W, 3]) or a text, its score, and whether it is right."""

    image: np.ndarray | None
    text: str | None
    score: float
    correct: bool


@dataclass(frozen=True, eq=False)
class RetrievalExample:
    """One query, a text or an image, with its best answers, best first. rank_of_truth counts from 1."""

    query: str | np.ndarray
    results: list[RetrievedItem]
    rank_of_truth: int


def write_report(
    path: Path,
    *,
    title: str,
    config: dict,
    metrics: list[dict],
    results: dict[str, float],
    masks: list[MaskExample],
    retrieval: list[RetrievalExample],
    summary: dict[str, str],
) -> None:
    """Write the report of a run. What is empty is left out with its heading.

    config: a JSON-like dict. metrics: rows of metrics.jsonl; a curve leaves out what is not finite.
    results: results.json, in percent. masks, retrieval: about 12 examples each; the first are shown open.
    summary: facts in the order to show them. "about" (one sentence) goes under the title, "command" gets a button.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"photo": photo_uri, "scores": score_uri, "number": number, "percent": percent}
    page = environment.get_template("template.html.j2").render(
        title=title,
        summary=summary,
        settings=flatten(config),
        masks=masks,
        queries={
            "From words to photos": [example for example in retrieval if isinstance(example.query, str)],
            "From a photo to words": [example for example in retrieval if not isinstance(example.query, str)],
        },
        charts=training_charts(metrics),
        results={key: repr(value) for key, value in results.items()},
        recall=recall_card(results),
        mask_cards=[card for kind in MASK_CARDS if (card := mask_card(results, kind))],
        recalls=recall_table(results),
        measures=mask_table(results),
        other={
            key: f"{value:,.0f}" if is_finite(value) and value == int(value) else number(value)
            for key, value in results.items()
            if not (RECALL.fullmatch(key) or SYNC.fullmatch(key))
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(page.encode("utf-8", "replace"))


def flatten(config: dict, prefix: str = "") -> dict[str, str]:
    """Return {"a.b": "1"} for {"a": {"b": 1}}."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": str(value)}
        )
    return flat


# Numbers -----------------------------------------------------------------------------------------------------------


def measured(results: dict[str, float], key: str) -> float | None:
    """Return the finite number under `key`, or None."""
    return float(results[key]) if is_finite(results.get(key)) else None


def percent(value: float) -> str:
    """Return one decimal and a narrow space: 63.2 %."""
    return f"{value:.1f}\u202f%"


def protocols(results: dict[str, float]) -> list[str]:
    """Return the retrieval protocols in order of appearance, 101-candidate first."""
    found = dict.fromkeys(match[2] for key in results if (match := RECALL.fullmatch(key)))
    return sorted(found, key=lambda name: name != "101-candidate")


def chance(protocol: str, k: int) -> float | None:
    """Return the recall at k of blind guessing in percent; None unless the protocol tells its number of candidates."""
    count = candidates(protocol)
    return 100.0 * min(k, count) / count if count else None


def candidates(protocol: str) -> int:
    """Return 101 for "101-candidate", 0 where the name does not tell."""
    match = re.fullmatch(r"(\d+)-candidate", protocol)
    return int(match[1]) if match else 0


def recall_card(results: dict[str, float]) -> dict[str, Any] | None:
    """Return the card of the first protocol with a recall: the mean of both directions next to chance."""
    for protocol in protocols(results):
        rows = []
        for k in (1, 5, 10):
            keys = [f"retrieval/{direction}/{protocol}/R@{k}" for direction in ("mean", "i2t", "t2i")]
            mean, *both = (measured(results, key) for key in keys)
            both = [value for value in both if value is not None]
            if mean is not None or both:
                rows.append((k, sum(both) / len(both) if mean is None else mean, chance(protocol, k)))
        if rows:
            return {"protocol": protocol, "candidates": candidates(protocol), "rows": rows}
    return None


def mask_card(results: dict[str, float], kind: str) -> dict[str, Any] | None:
    """Return the card of a precision: its multiples of the two base rates, and whether it is above them."""
    value, auc = measured(results, f"sync/{kind}/precision"), measured(results, f"sync/{kind}/auc")
    if value is None and auc is None:
        return None
    rates = {name: measured(results, f"sync/{kind}/{name}") for name in ("random", "shuffled")}
    rates = {name: rate for name, rate in rates.items() if rate is not None and value is not None}
    lost = [name for name, rate in rates.items() if value <= rate]
    title, what = MASK_CARDS[kind]
    return {
        "title": title,
        "what": what,
        "value": value,
        "auc": auc,
        "rates": rates,
        "above": "both" if len(rates) == 2 else "".join(rates),
        "lost": " and ".join(lost),
    }


def recall_table(results: dict[str, float]) -> dict[str, Any] | None:
    """Return a row for each protocol and direction, and what each protocol means."""
    columns = sorted({int(match[3]) for key in results if (match := RECALL.fullmatch(key))})
    rows, counts, terms = [], [measured(results, f"retrieval/{kind}") for kind in ("images", "products")], {}
    for protocol in protocols(results):
        for direction, label in DIRECTIONS.items():
            cells = [table_cell(results, f"retrieval/{direction}/{protocol}/R@{k}") for k in columns]
            if any(cells):
                rows.append((f"{protocol}, {label}", cells))
        if count := candidates(protocol):
            rows.append((f"{protocol}, blind guessing", [(f"{chance(protocol, k):.2f}", "") for k in columns]))
            terms[protocol] = (
                f"A query is ranked against its true partner and {count - 1} other products. They are of the same "
                "subcategory as far as it has enough. ± is the standard deviation over repeated draws."
            )
        elif protocol == "full":
            size = "" if None in counts else f" ({counts[0]:,.0f} photos of {counts[1]:,.0f} products)"
            terms[protocol] = (
                f"A query is ranked against the whole evaluation set{size}. A photo is ranked among the texts of all "
                "products. A text is ranked among all photos, and the best photo of its product counts."
            )
    return {"columns": [f"R@{k}" for k in columns], "rows": rows, "terms": terms} if rows else None


def mask_table(results: dict[str, float]) -> dict[str, Any] | None:
    """Return a row for each kind of hidden thing, with its base rates and the multiples of them."""
    found = [match for key in results if (match := SYNC.fullmatch(key))]
    names, rows = [name for name in RATES if name in {match[2] for match in found}], []
    for head in dict.fromkeys(match[1] for match in found):
        value, *bases = (measured(results, f"{head}/{name}") for name in ("precision", "random", "shuffled"))
        lifts = [value / base if value is not None and base else None for base in bases]
        rows.append((head.removeprefix("sync/"), [table_cell(results, f"{head}/{name}") for name in names], lifts))
    return {"columns": [RATES[name] for name in names], "rows": rows} if rows else None


def table_cell(results: dict[str, float], key: str) -> tuple[str, str] | None:
    """Return a number and its standard deviation as texts; None where it is missing."""
    std = measured(results, f"{key}/std")
    return (f"{results[key]:.2f}", "" if std is None else f"± {std:.2f}") if key in results else None


# Images ------------------------------------------------------------------------------------------------------------


def photo_uri(image: np.ndarray, side: int, budget: int) -> str:
    """Return a JPEG data URI of at most `side` pixels; the quality falls from 90 to 30 until `budget` bytes suffice."""
    photo = Image.fromarray(np.ascontiguousarray(image))
    photo.thumbnail((side, side), Image.Resampling.LANCZOS)
    for quality in (90, 80, 65, 45, 30):
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=quality, subsampling=0 if quality > 80 else 2)
        if file.tell() <= budget:
            break
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def score_uri(scores: np.ndarray, grid: int) -> str:
    """Return a PNG data URI of patch scores, float [P], a pixel a patch: the denser, the higher."""
    finite = scores[np.isfinite(scores)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    share = np.nan_to_num((scores - low) / ((high - low) or 1.0), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    pixels = np.full((grid, grid, 4), (*ACCENT, 0), dtype=np.uint8)
    pixels[..., 3] = np.round(235 * share).reshape(grid, grid)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def mask_sheet(example: MaskExample, side: int = 288) -> Image.Image:
    """Return README's picture: the photo with its boxes, the random mask, the sync mask."""
    details, large = example.key()
    names = [f"{place} {name}" for place, name in enumerate(details, 1)] + [f"also {large}"] * bool(large)
    outlined = example.frames()
    text, legend = [Segment(" · ".join(names))], "Struck: hidden. Dotted: not in this view."
    cells = [Cell(example.image, "The photo", f"{example.view} view", text, legend, outlined, True)]
    for which, title, tint in (("random", "Random mask", SLATE), ("sync", "SyncMask", ACCENT)):
        footer = f"{example.patch_count(which)}. {example.word_count(which)}."
        text, patches = example.segments(which), getattr(example, which)
        cells.append(Cell(example.image, title, "", text, footer, outlined, False, patches, tint))
    return contact_sheet(cells, columns=3, side=side, lines=9)
