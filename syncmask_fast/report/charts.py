"""Line charts as small inline SVG: a faint raw line, a smooth one over it, and the data for a read-out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 328, 14, 164
POINTS = 240  # of a drawn line: more cannot be told apart at this width


@dataclass(frozen=True)
class Series:
    """One line. label: in the legend and on hover. style: a CSS class. smooth: draw the raw values faint."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    style: str = "main"
    smooth: bool = True


def series(
    metrics: list[dict], key: str, label: str, style: str = "main", smooth: bool = True, scale: float = 1.0
) -> Series:
    """The finite numbers under `key` in the rows of metrics.jsonl, times `scale`; other rows are left out."""
    steps, values = [], []
    for position, row in enumerate(metrics):
        if is_number(row.get(key)) and math.isfinite(row[key]):
            step = row.get("step")
            steps.append(step if is_number(step) and math.isfinite(step) else position)
            values.append(row[key] * scale)
    return Series(label, np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64), style, smooth)


def is_number(value: object) -> bool:
    """True for ints, floats and numpy's, False for bools and everything else."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool | np.bool_)


def line_chart(title: str, note: str, lines: list[Series], unit: str = "", floor: float | None = None) -> str:
    """A <figure> with one chart, or "" where no series has a value.

    note: what the curve is, for a first-time reader.     floor: a value that the y axis must reach.
    """
    lines = [line for line in lines if line.values.size]
    if not lines:
        return ""
    smoothed = [smooth(line.values) if line.smooth else line.values for line in lines]
    low, high, ticks = _y_axis(lines, smoothed, floor)
    first = min(line.steps.min() for line in lines)
    last = max(line.steps.max() for line in lines)
    span = (last - first) or 1.0

    def x_of(steps: np.ndarray) -> np.ndarray:
        return LEFT + (steps - first) / span * (RIGHT - LEFT)

    def y_of(values: np.ndarray) -> np.ndarray:
        return np.clip(BOTTOM - (values - low) / (high - low) * (BOTTOM - TOP), TOP, BOTTOM)

    parts, hover = [], []
    for tick in ticks:
        y = float(y_of(np.array(tick)))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.4:.1f}" text-anchor="end">{short(tick)}</text>')
    ends = sorted({first, (first + last) / 2, last}) if last > first else [first]
    for step in ends:
        anchor = "middle" if step == (first + last) / 2 else ("start" if step == first else "end")
        x = float(x_of(np.array(step)))
        label = f"step {short(round(step))}" if step == ends[0] else short(round(step))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="{anchor}">{label}</text>')
    for line, curve in zip(lines, smoothed, strict=True):
        style = escape(line.style)
        if line.smooth and line.values.size > 3:
            rows = _envelope(line.values)
            raw = _points(x_of(line.steps[rows]), y_of(line.values[rows]))
            parts.append(f'<polyline class="raw {style}" points="{raw}"/>')
        rows = np.unique(np.linspace(0, curve.size - 1, min(curve.size, POINTS)).round().astype(int))
        xs, ys = x_of(line.steps[rows]), y_of(curve[rows])
        parts.append(f'<polyline class="line {style}" points="{_points(xs, ys)}"/>')
        if curve.size <= 20:
            parts += [
                f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in zip(xs, ys, strict=True)
            ]
        hover.append(
            {
                "label": line.label,
                "style": line.style,
                "x": [round(float(x), 1) for x in xs],
                "y": [round(float(y), 1) for y in ys],
                "s": [int(step) for step in line.steps[rows]],
                "v": [f"{number(value)}{unit}" for value in curve[rows]],
            }
        )
    ending = " · ".join(_ending(line, curve, unit, len(lines) > 1) for line, curve in zip(lines, smoothed, strict=True))
    data = escape(json.dumps(hover, separators=(",", ":")), quote=True)
    return (
        f'<figure class="chart{" several" * (len(lines) > 1)}" data-lines="{data}">'
        f"<figcaption><b>{escape(title)}</b>"
        f'<span class="now">{ending}</span><span class="note">{escape(note)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by training step">'
        f"{''.join(parts)}"
        '<g class="cursor" visibility="hidden">'
        f'<line class="hair" y1="{TOP}" y2="{BOTTOM}"/></g></svg></figure>'
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over about a twentieth of the run, one-sided at the ends; [N] in, [N] out."""
    reach = values.size // 40
    if reach < 1:
        return values
    total = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(values.size)
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach, values.size - 1)
    return (total[last + 1] - total[first]) / (last - first + 1)


def number(value: float) -> str:
    """A value for reading: three significant digits or more, with an exponent only below 0.001."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.2e}"
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1}f}"


def short(value: float) -> str:
    """A tick label: 1500 -> 1.5k, 2000000 -> 2M, 0.00075 -> 7.5e-4."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    if value == 0 or abs(value) >= 0.001:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _ending(line: Series, curve: np.ndarray, unit: str, named: bool) -> str:
    value = f"{number(float(curve[-1]))}{escape(unit)}"
    return f'<i class="{escape(line.style)}">{escape(line.label)} {value}</i>' if named else value


def _points(xs: np.ndarray, ys: np.ndarray) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _envelope(values: np.ndarray) -> np.ndarray:
    """Row numbers of the least and greatest value of each of POINTS / 2 stretches, so that spikes survive."""
    if values.size <= POINTS:
        return np.arange(values.size)
    edges = np.linspace(0, values.size, POINTS // 2 + 1).astype(int)
    rows = set()
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        rows |= {start + int(values[start:stop].argmin()), start + int(values[start:stop].argmax())}
    return np.array(sorted(rows))


def _y_axis(lines: list[Series], smoothed: list[np.ndarray], floor: float | None) -> tuple[float, float, list[float]]:
    """(low, high, ticks) so that every smoothed value and 98 % of the raw ones are inside."""
    raw = np.concatenate([line.values for line in lines])
    curve = np.concatenate(smoothed)
    low, high = (float(value) for value in np.percentile(raw, (1, 99)))
    low, high = min(low, float(curve.min())), max(high, float(curve.max()))
    if floor is not None:
        low = min(low, floor)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) * 0.5 or 1.0), high + (abs(high) * 0.5 or 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(index * step, 12 - math.floor(math.log10(step))) for index in range(start, stop + 1)]
    return ticks[0], ticks[-1], ticks
