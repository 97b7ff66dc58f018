"""The numbers of a report: the opening sentence, the headline cards, and the tables of all results.

Keys are those of results.json, values are in percent. NaN counts as not measured.
"""

from __future__ import annotations

import math
import re
from html import escape

from syncmask_fast.report.charts import is_number, number

RECALL = re.compile(r"retrieval/(i2t|t2i|mean)/([^/]+)/R@(\d+)")
DIRECTIONS = {"i2t": "photo → text", "t2i": "text → photo", "mean": "mean of both"}
RATES = {
    "precision": "precision",
    "shuffled": "shuffled",
    "random": "random",
    "auc": "AUC",
    "auc/shuffled": "AUC, shuffled",
}
SYNC = re.compile(rf"(sync/.+?)/({'|'.join(sorted(RATES, key=len, reverse=True))})")
TERMS = {
    "precision": "Words: of the hidden words that name a detail, the share whose detail this view shows. "
    "Patches: the share of hidden patches on something that the text names and this view shows. "
    "Details: the same where that is small.",
    "random": "What masks drawn at random get on the same samples.",
    "shuffled": "What the masks of another sample get: all that position and habit explain.",
    "÷ random, ÷ shuffled": "Precision as a multiple of that rate; above 1 is better than it.",
    "AUC": "How often, in one text, a word in view scores above a word out of view; 50 is a coin toss.",
}


def measured(results: dict[str, float], key: str) -> float | None:
    """The finite number under `key`, or None."""
    value = results.get(key)
    return float(value) if is_number(value) and math.isfinite(value) else None


def mean_recall(results: dict[str, float], protocol: str, k: int) -> float | None:
    """Recall at k, the mean of both directions, or of the only one that was measured."""
    mean = measured(results, f"retrieval/mean/{protocol}/R@{k}")
    if mean is not None:
        return mean
    both = [measured(results, f"retrieval/{direction}/{protocol}/R@{k}") for direction in ("i2t", "t2i")]
    known = [value for value in both if value is not None]
    return sum(known) / len(known) if known else None


def protocols(results: dict[str, float]) -> list[str]:
    """Names of the retrieval protocols in order of first appearance, 101-candidate ahead of all."""
    found = {match[2]: None for key in results if (match := RECALL.fullmatch(key))}
    return sorted(found, key=lambda name: name != "101-candidate")


def candidates(protocol: str) -> int | None:
    """101 for "101-candidate", None for a protocol whose name does not say."""
    match = re.fullmatch(r"(\d+)-candidate", protocol)
    return int(match[1]) if match and int(match[1]) > 0 else None


def chance(protocol: str, k: int) -> float | None:
    """Recall at k of blind guessing in percent, where the protocol says how many candidates there are."""
    count = candidates(protocol)
    return 100.0 * min(k, count) / count if count else None


def percent(value: float) -> str:
    """One decimal and a narrow space: 63.2 %."""
    return f"{value:.1f}\u202f%"


def lede(results: dict[str, float]) -> str:
    """The main result in one or two plain sentences, "" where no recall was measured."""
    for protocol in protocols(results):
        recall, count = mean_recall(results, protocol, 1), candidates(protocol)
        if recall is None:
            continue
        if not count:
            return (
                '<p class="lede">Given a photo or a text of the evaluation set, the model puts its true '
                f"partner first <b>{percent(recall)}</b> of the time ({escape(protocol)} protocol).</p>"
            )
        return (
            '<p class="lede">Given a photo or a text of the evaluation set, the model picks its true partner '
            f"out of {count} candidates at the first try <b>{percent(recall)}</b> of the time. "
            f"Guessing would manage {percent(100.0 / count)}.</p>"
        )
    return ""


def cards(results: dict[str, float]) -> str:
    """Up to three cards with the headline numbers, each beside what chance or other masks get."""
    shown = [card for card in (_recall_card(results), _patch_card(results), _word_card(results)) if card]
    return f'<div class="cards">{"".join(shown)}</div>' if shown else ""


def _recall_card(results: dict[str, float]) -> str:
    for protocol in protocols(results):
        rows = [(k, value) for k in (1, 5, 10) if (value := mean_recall(results, protocol, k)) is not None]
        if not rows:
            continue
        k, value = rows[0]
        base, count = chance(protocol, k), candidates(protocol)
        bars = '<span></span><span></span><span class="beside">model</span><span class="beside">chance</span>' * bool(
            base
        )
        bars += "".join(_recall_bar(rank, recall, chance(protocol, rank)) for rank, recall in rows)
        times = f", <b>{value / base:.0f}\u00a0×</b> chance" if base else ""
        place = "of first answers are right" if k == 1 else f"have the right answer among the first {k}"
        where = f"{count} candidates" if count else f"{escape(protocol)} protocol"
        return (
            f'<div class="card"><h3>Finds the true partner</h3><p class="big">{_big(value)}</p>'
            f'<p class="lift">{place}{times}</p><div class="bars four">{bars}</div>'
            '<p class="what">R@k: the truth is among the first k. Mean of photo → text and text → photo; '
            f"{where}.</p></div>"
        )
    return ""


def _recall_bar(k: int, recall: float, base: float | None) -> str:
    beside = f'<span class="beside">{percent(base)}</span>' if base is not None else "<span></span>"
    return _bar(f"<b>R@{k}</b>", recall, "sync", f"<b>{percent(recall)}</b>") + beside


def _patch_card(results: dict[str, float]) -> str:
    value = measured(results, "sync/patches/precision")
    if value is None:
        return ""
    return (
        f'<div class="card"><h3>Hides the right patches</h3><p class="big">{_big(value)}</p>'
        f'{_lifts(results, "patches")}<p class="what">Share of hidden patches that lie on something '
        "which the text names and the photo shows.</p></div>"
    )


def _word_card(results: dict[str, float]) -> str:
    value, auc = measured(results, "sync/words/precision"), measured(results, "sync/words/auc")
    if value is None and auc is None:
        return ""
    body = '<div class="card"><h3>Hides the right words</h3>'
    if value is not None:
        body += f'<p class="big">{_big(value)}</p>{_lifts(results, "words")}'
    body += '<p class="what">Share of hidden detail words that this photo can answer.'
    if auc is not None:
        body += (
            " The teacher’s scores rank a word in view above one out of view "
            f"<b>{percent(auc)}</b> of the time (word AUC); a coin toss gets 50\u202f%."
        )
    return body + "</p></div>"


def _lifts(results: dict[str, float], kind: str) -> str:
    """The lifts of a precision over its two base rates, whether it beats them, and all three as bars."""
    value = measured(results, f"sync/{kind}/precision")
    base = {name: measured(results, f"sync/{kind}/{name}") for name in ("random", "shuffled")}
    known = {name: rate for name, rate in base.items() if rate is not None}
    times = " and ".join(f"<b>{value / rate:.2f}\u00a0×</b> {name}" for name, rate in known.items() if rate > 0)
    verdict = ""
    if known:
        lost = [name for name, rate in known.items() if value <= rate]
        said = (
            f"not above {' and '.join(lost)}" if lost else f"above {'both' if len(known) == 2 else next(iter(known))}"
        )
        verdict = f', <span class="verdict {"no" if lost else "yes"}">{said}</span>'
    lift = f'<p class="lift">{times or "masks"}{verdict}</p>' if verdict else ""
    bars = _bar("<b>SyncMask</b>", value, "sync", f"<b>{percent(value)}</b>")
    bars += "".join(_bar(name, rate, name, percent(rate)) for name, rate in reversed(known.items()))
    return f'{lift}<div class="bars">{bars}</div>'


def _big(value: float) -> str:
    return f"{value:.1f}<small>\u202f%</small>"


def _bar(label: str, value: float, style: str, said: str) -> str:
    fill = f'<i class="fill {style}" style="width:{min(max(value, 0.0), 100.0):.1f}%"></i>'
    return f'<span>{label}</span><span class="track">{fill}</span><span class="value">{said}</span>'


def results_section(results: dict[str, float]) -> str:
    """Tables of all results with their protocols explained, "" where there are none."""
    if not results:
        return ""
    recalls, used = _recall_table(results)
    sync, used_sync = _sync_table(results)
    other = {key: _said(value) for key, value in results.items() if key not in used | used_sync}
    rest = f"<h3>More numbers</h3>{flat_table(other)}" if other else ""
    full = flat_table({key: repr(float(value)) if is_number(value) else str(value) for key, value in results.items()})
    return (
        '<section id="results"><h2>All results</h2><p class="intro">In percent, unless a name says that it '
        "counts something. Figures of different protocols cannot be compared.</p>"
        f'{recalls}{sync}{rest}<details class="fold">'
        f"<summary>Every number under its name in results.json</summary>{full}</details></section>"
    )


def _recall_table(results: dict[str, float]) -> tuple[str, set[str]]:
    """A row for each protocol and direction; and the keys that it shows."""
    found = {key: int(match[3]) for key in results if (match := RECALL.fullmatch(key))}
    if not found:
        return "", set()
    columns, rows = sorted(set(found.values())), []
    for protocol in protocols(results):
        for direction, label in DIRECTIONS.items():
            keys = [f"retrieval/{direction}/{protocol}/R@{k}" for k in columns]
            if any(key in results for key in keys):
                rows.append([f"{escape(protocol)}, {label}", *(_cell(results, key) for key in keys)])
        if candidates(protocol):
            blind = [f"<small>{chance(protocol, k):.2f}</small>" for k in columns]
            rows.append([f"<small>{escape(protocol)}, blind guessing</small>", *blind])
    terms = {"R@k": "The share of queries whose right answer is among the first k."}
    terms |= {name: said for name in protocols(results) if (said := _protocol_said(results, name))}
    table = _table(["", *(f"R@{k}" for k in columns)], rows)
    return f"<h3>Retrieval</h3>{table}{_terms(terms)}", found.keys() | _deviations(results, found)


def _protocol_said(results: dict[str, float], protocol: str) -> str:
    if count := candidates(protocol):
        return (
            f"A query is ranked against its true partner and {count - 1} other products, of the same "
            "subcategory as far as it has enough. ± is the standard deviation over repeated draws."
        )
    if protocol != "full":
        return ""
    counts = [measured(results, f"retrieval/{kind}") for kind in ("images", "products")]
    size = f" ({counts[0]:,.0f} photos of {counts[1]:,.0f} products)" if None not in counts else ""
    return (
        f"A query is ranked against the whole evaluation set{size}: a photo among the texts of all "
        "products, a text among all photos, where the best photo of its product counts."
    )


def _sync_table(results: dict[str, float]) -> tuple[str, set[str]]:
    """A row for each kind of thing hidden, with its base rates and lifts; and the keys that it shows."""
    found = {key: match for key in results if (match := SYNC.fullmatch(key))}
    if not found:
        return "", set()
    names = [name for name in RATES if any(match[2] == name for match in found.values())]
    rows = []
    for head in dict.fromkeys(match[1] for match in found.values()):
        value = measured(results, f"{head}/precision")
        bases = [measured(results, f"{head}/{name}") for name in ("random", "shuffled")]
        lifts = [value / base if value is not None and base else None for base in bases]
        said = [
            "" if lift is None else f'<span class="{"above" if lift > 1 else ""}">{lift:.2f}</span>' for lift in lifts
        ]
        rows.append([escape(head.removeprefix("sync/")), *(_cell(results, f"{head}/{name}") for name in names), *said])
    titles = ["", *(RATES[name] for name in names), "÷ random", "÷ shuffled"]
    heading = "<h3>Masks against ground truth</h3>"
    return f"{heading}{_table(titles, rows)}{_terms(TERMS)}", found.keys() | _deviations(results, found)


def _deviations(results: dict[str, float], keys) -> set[str]:
    return {f"{key}/std" for key in keys} & results.keys()


def _cell(results: dict[str, float], key: str) -> str:
    if key not in results:
        return ""
    value = f"{results[key]:.2f}" if is_number(results[key]) else escape(str(results[key]))
    std = measured(results, f"{key}/std")
    return value + (f" <small>± {std:.2f}</small>" if std is not None else "")


def _said(value: object) -> str:
    if not is_number(value):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() else number(float(value))


def _table(titles: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _terms(terms: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(term)}</dt><dd>{said}</dd>" for term, said in terms.items())
    return f'<dl class="terms">{rows}</dl>'


def flat_table(rows: dict[str, str]) -> str:
    """A table of two columns, both escaped here."""
    body = "".join(f"<tr><td>{escape(str(key))}</td><td>{escape(value)}</td></tr>" for key, value in rows.items())
    return f'<div class="scroll"><table class="flat"><tbody>{body}</tbody></table></div>'
