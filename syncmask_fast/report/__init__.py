"""`write_report`: a finished run as one self-contained HTML file that a person enjoys reading.

Plain data in, file out: no torch, nothing that the page fetches. Every string from outside is escaped.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from syncmask_fast.report.examples import MaskExample, RetrievalExample, RetrievedItem, WordMark
from syncmask_fast.report.pictures import mask_overlay
from syncmask_fast.report.sections import curves_section, masks_section, retrieval_section
from syncmask_fast.report.style import SCRIPT, STYLE
from syncmask_fast.report.tables import cards, flat_table, lede, results_section

__all__ = ["MaskExample", "RetrievalExample", "RetrievedItem", "WordMark", "mask_overlay", "write_report"]

LINKS = {
    "masks": "Masks",
    "retrieval": "Retrieval",
    "training": "Training",
    "results": "All results",
    "run": "This run",
}

READING = """<section class="reading"><h2>How to read this</h2>
<p>The model learns fashion by guessing: parts of a product photo and words of its description are hidden, and
it fills them in from everything else.</p>
<p>Hiding at random wastes most guesses on plain background, or on words about a detail that this photo does
not show; SyncMask lets a slowly updated copy of the model, the teacher, pick words and patches that show the
same thing.</p>
<p>Beating random masks can be an illusion, since details tend to lie in the same places, so each mask is also
compared with <em>shuffled</em> masks (those of another photo): only what beats both was understood from this
photo.</p>
</section>"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">SyncMask training report</p><h1>{title}</h1>{lede}{about}<nav>{links}</nav>
</header>
{cards}
{reading}
{sections}
</main>
<footer>Written by syncmask_fast. This page is one file and asks the network for nothing.</footer>
<script>{script}</script>
</body>
</html>
"""


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
    """Writes the report of a run to `path`, aside first and then renamed: no reader ever sees half of it.

    config:    any JSON-like dict; nested ones are shown with dotted names.
    metrics:   rows of metrics.jsonl; what a row lacks or holds as NaN is left out of the curves.
    results:   the flat results.json, in percent, each key naming its protocol.
    masks:     about 12 examples; the first four are shown open.
    retrieval: about 12 examples, of both directions; the first three of each are shown open.
    summary:   facts of the run in the order to show them. "about" (a sentence: what was trained on what) goes
               under the title, "command" gets a copy button, every other entry is a line of "This run".
    Anything empty is left out together with its heading.
    """
    sections = {
        "masks": masks_section(masks),
        "retrieval": retrieval_section(retrieval),
        "training": curves_section(metrics),
        "results": results_section(results),
        "run": run_section(config, summary),
    }
    page = PAGE.format(
        title=escape(title),
        style=STYLE,
        lede=lede(results),
        about=f'<p class="about">{escape(summary["about"])}</p>' if summary.get("about") else "",
        links="".join(f'<a href="#{key}">{LINKS[key]}</a>' for key, section in sections.items() if section),
        cards=cards(results),
        reading=READING,
        sections="\n".join(section for section in sections.values() if section),
        script=SCRIPT,
    )
    _write_aside(Path(path), page.encode("utf-8", "replace"))


def run_section(config: dict, summary: dict[str, str]) -> str:
    """The command, the facts of the run, and the settings, folded; "" where all are missing."""
    command = summary.get("command", "")
    body = ""
    if command:
        said = escape(command)
        button = f'<button type="button" data-copy="{said}">Copy</button>'
        body += f'<div class="command"><pre>{said}</pre>{button}</div>'
    facts = {key: value for key, value in summary.items() if key not in ("about", "command")}
    if facts:
        rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
        body += f'<dl class="terms facts">{rows}</dl>'
    if config:
        settings = {key: str(value) for key, value in flatten(config).items()}
        label = f"All {len(settings)} settings" if len(settings) > 1 else "The setting"
        body += f'<details class="fold"><summary>{label}</summary>{flat_table(settings)}</details>'
    return f'<section id="run"><h2>This run</h2>{body}</section>' if body else ""


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} becomes {"a.b": 1}; empty dicts stay as values."""
    out: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _write_aside(path: Path, content: bytes) -> None:
    """`content` becomes `path` at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
