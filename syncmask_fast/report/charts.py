"""Draw the curves of a run with matplotlib: SVG inside the page, in the page's own colors."""

from __future__ import annotations

import io
import json
import math
import re
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

OBJECTIVES = {
    "itc": ("Contrast (ITC)", "Photo and text of one product should be close, all others apart."),
    "itm": ("Matching (ITM)", "Are true pairs told from near misses? With one true pair in three, 0.64 is guessing."),
    "mlm": ("Hidden words (MLM)", "Surprise at the hidden words, given the photo and the other words."),
    "mim": ("Hidden patches (MIM)", "Error in filling the hidden patches, given the whole text."),
    "presence": ("Words in view", "Does the photo show the word? 0.69 is guessing."),
}
MEASURED = {
    "sync/words": ("Hidden words in view (%)", "Of the hidden detail words, the share that the photo shows."),
    "sync/words/auc": ("Word AUC (%)", "Do words in view score above words out of view? 50 is a coin toss."),
    "sync/masked-words": ("All hidden words in view (%)", "The same of all hidden words: “a” counts against it."),
    "sync/patches": ("Hidden patches on target (%)", "Share on a detail that the text names and the photo shows."),
    "sync/patches-any-attribute": ("Hidden patches on anything named (%)", "With color, material and category too."),
}
SPEED = {  # key -> title, note, unit
    "pairs_per_s": ("Throughput", "Image-text pairs a second.", " /s"),
    "data_wait_share": ("Waiting for data", "Share of each step. Near 0 % the model sets the pace.", " %"),
    "lr": ("Learning rate", "Size of the steps.", ""),
}
BASE_RATES = {"precision": "SyncMask", "shuffled": "shuffled", "random": "random"}
COLORS = {"accent": "#000001", "slate": "#000002", "pale": "#000003", "line": "#000004", "muted": "#000005"}
STYLES = {"shuffled": "slate", "random": "pale"}  # all other lines: accent
WIDTH, HEIGHT, POINTS = 340, 180, 240  # pixels; points of a line for the read-out


class Chart(NamedTuple):
    """A chart for the page. ends: (style, label, last value). points: JSON for the read-out."""

    title: str
    note: str
    svg: Markup
    ends: list[tuple[str, str, str]]
    points: str


def training_charts(metrics: list[dict]) -> list[Chart]:
    """Return charts of the losses, the measures, and the speed; none for what has no finite number."""
    names = list(dict.fromkeys(key for row in metrics for key in row))
    charts = [line_chart(metrics, "Total loss", "The sum that training pushes down.", {"": "loss"})]
    losses = {match[1]: match[0] for key in names if (match := re.fullmatch(r"loss[/_](.+)", key))}
    for name in sorted(losses, key=lambda name: [*OBJECTIVES, name].index(name)):
        title, note = OBJECTIVES.get(name, (f"Loss: {name}", "A part of the total loss."))
        charts.append(line_chart(metrics, title, note, {"": losses[name]}))
    groups: dict[str, dict[str, str]] = {}  # a precision shares its chart with its base rates
    for key in names:
        if key.startswith(("sync/", "eval/")):
            head, _, tail = key.rpartition("/")
            group, label = (head, BASE_RATES[tail]) if tail in BASE_RATES else (key, "")
            groups.setdefault(group, {})[label] = key
    for group, keys in groups.items():
        title, note = MEASURED.get(group, (group, "Measured now and then during training."))
        charts.append(line_chart(metrics, title, note, keys))
    charts += [line_chart(metrics, title, note, {"": key}, unit) for key, (title, note, unit) in SPEED.items()]
    return [chart for chart in charts if chart]


def line_chart(metrics: list[dict], title: str, note: str, keys: dict[str, str], unit: str = "") -> Chart | None:
    """Return one chart. keys: label -> key of `metrics`. With a unit the axis starts at 0, and " %" are shares."""
    lines = {label: curve(metrics, keys[label]) for label in ("", *BASE_RATES.values()) if label in keys}
    lines = {label: (steps, values * (100 if unit == " %" else 1)) for label, (steps, values) in lines.items()}
    lines = {label: (steps, values, smooth(values)) for label, (steps, values) in lines.items() if len(steps)}
    if not lines:
        return None
    if len(lines) > 1 and "" in lines:
        lines = {label or "SyncMask": line for label, line in lines.items()}
    # 1. Axes: every smooth value and 98 % of the raw ones are inside.
    found, raw, smoothed = (np.concatenate(column) for column in zip(*lines.values(), strict=True))
    low = min(np.percentile(raw, 1), smoothed.min(), *([0.0] if unit else []))
    high = max(np.percentile(raw, 99), smoothed.max())
    if high - low <= 1e-9 * abs(high):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)  # so that a point is a pixel
    axes = figure.add_axes((0.125, 0.13, 0.84, 0.81))
    first, last = int(found.min()), int(found.max())
    axes.set(xlim=(first, max(last, first + 1)), ylim=(ticks[0], ticks[-1]))
    steps = sorted({first, (first + last) // 2, last})
    axes.set_xticks(steps, [f"step {steps[0]:,}", *(f"{step:,}" for step in steps[1:])])
    axes.set_yticks(ticks, [f"{tick:,.4g}" for tick in ticks])
    axes.grid(axis="y", color=COLORS["line"], linewidth=1, clip_on=False)
    axes.tick_params(length=0, pad=6, labelsize=10.5, labelcolor=COLORS["muted"])
    axes.set_axisbelow(True)
    for part in (figure.patch, axes.patch, *axes.spines.values()):
        part.set_visible(False)
    # 2. Lines: the raw one faint, the smooth one strong, and points for the read-out.
    ends, points = [], []
    for label, (steps, raw, smoothed) in lines.items():
        style = STYLES.get(label, "accent")
        look = dict(color=COLORS[style], clip_on=False, linestyle="--" if label == "random" else "-")
        if len(raw) >= 40:
            axes.plot(steps, raw.clip(ticks[0], ticks[-1]), linewidth=1, alpha=0.3, **look)
        axes.plot(steps, smoothed, linewidth=1.9, marker="o" if len(raw) <= 20 else "", markersize=4.5, **look)
        rows = np.unique(np.linspace(0, len(raw) - 1, min(len(raw), POINTS)).round().astype(int))
        x, y = axes.transData.transform(np.stack([steps[rows], smoothed[rows]], 1)).round(1).T
        texts = [f"{number(value)}{unit}" for value in smoothed[rows].tolist()]
        ends.append((style, label, texts[-1]))
        points.append(dict(label=label, style=style, x=x.tolist(), y=(HEIGHT - y).tolist(), step=steps[rows].tolist()))
        points[-1]["text"] = texts
    return Chart(title, note, _svg(figure, repr(keys)), ends, json.dumps(points, separators=(",", ":")))


def _svg(figure: Figure, salt: str) -> Markup:
    """Return a figure as SVG without addresses and global styles, its colors as variables of the page.

    salt: other than that of all other charts, because the ids of markers come from it.
    """
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "path.simplify_threshold": 0.5}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()[file.getvalue().index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    attributes = r' (xmlns(:\w+)?|width|height|version|transform)="[^"]*"| font-family: [^;]*;|(?<=<g) id="[^"]*"'
    svg = re.sub(attributes, "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)  # tenths of a pixel suffice
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return Markup(svg)  # noqa: S704 (numbers only)


def curve(metrics: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of the rows that have a finite number under `key`."""
    found = [(row.get("step"), place, row[key]) for place, row in enumerate(metrics) if is_finite(row.get(key))]
    steps = [step if is_finite(step) else place for step, place, _ in found]
    return np.array(steps, np.float64), np.array([value for *_, value in found], np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return a centered moving average over about a twentieth of the run, one-sided at the ends; [N] in, [N] out."""
    if len(values) < 40:
        return values
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def is_finite(value: object) -> bool:
    """Tell whether a value is a finite number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float) -> str:
    """Return a value for reading: 43210 -> 43,210, 12.345 -> 12.3, 0 -> 0.00, 3e-9 -> 3.00e-09."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
