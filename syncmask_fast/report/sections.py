"""The parts of a report that show examples and curves: each a string of HTML, "" where there is nothing."""

from __future__ import annotations

from html import escape

import numpy as np

from syncmask_fast.report.charts import is_number, line_chart, number, series
from syncmask_fast.report.examples import (
    MaskExample,
    RetrievalExample,
    RetrievedItem,
    Segment,
    Which,
    frames,
    key_of,
    patch_count,
    segments,
)
from syncmask_fast.report.pictures import data_uri, score_uri, tally

SHOWN_MASKS, SHOWN_QUERIES = 4, 3  # in the open (queries: of each direction); the others are one click away
MASK_SIDE, MASK_BYTES = 288, 44_000
HIT_SIDE, HIT_BYTES = 168, 15_000

LOSSES = (
    ("loss", "Total loss", "The sum that training pushes down."),
    ("loss_itc", "Contrast (ITC)", "Picture and text of one product should lie close, all others apart."),
    (
        "loss_itm",
        "Matching (ITM)",
        "Are true pairs told from near misses? With one true pair in three, 0.64 is blind guessing.",
    ),
    ("loss_mlm", "Hidden words (MLM)", "Surprise at the hidden words, given the picture and the other words."),
    ("loss_mim", "Hidden patches (MIM)", "Error in filling the hidden patches, given the whole text."),
    ("loss_presence", "Words in view", "Does the picture show the word? 0.69 is blind guessing."),
)
MEASURED = {
    "sync/words": ("Hidden words in view (%)", "Of the hidden detail words, the share that the photo shows."),
    "sync/words/auc": ("Word AUC (%)", "Do words in view score above words out of view? 50 is a coin toss."),
    "sync/masked-words": (
        "Hidden words that are in view (%)",
        "Of all hidden words, the share that names a detail which the photo shows: common words such as “a” count against it.",
    ),
    "sync/patches": (
        "Hidden patches on target (%)",
        "Of the hidden patches, the share on a detail that the text names and the photo shows.",
    ),
    "sync/patches-any-attribute": (
        "Hidden patches on anything named (%)",
        "The same, counting colour, material and category too, which cover the whole garment.",
    ),
}
BASE_RATES = {"precision": ("SyncMask", "main"), "shuffled": ("shuffled", "shuffled"), "random": ("random", "random")}


def masks_section(masks: list[MaskExample]) -> str:
    """Each example three times: with its ground truth, masked at random, masked by SyncMask."""
    if not masks:
        return ""
    unseen = any(word.visible is False for mask in masks for word in mask.words)
    outlined = [frame for mask in masks for frame in frames(mask)]
    key = [
        '<span><i class="swatch slate"></i>hidden at random</span>',
        '<span><i class="swatch violet"></i>hidden by SyncMask</span>',
        '<span><s class="w hidden">word</s> hidden word</span>',
    ]
    if any(not frame.detail for frame in outlined):
        key.insert(0, '<span><i class="swatch dashed"></i>what else it names: colour, material …</span>')
    if any(frame.detail for frame in outlined):
        key.insert(0, '<span><i class="swatch boxed"></i>a detail that the text names</span>')
    if unseen:
        key.append('<span><span class="w unseen">word</span> names something that this view does not show</span>')
    cards = [_mask_example(mask, index) for index, mask in enumerate(masks)]
    return (
        '<section id="masks"><h2>What gets hidden</h2>'
        '<p class="intro">The same photo and text, masked twice. A good mask covers details that the text '
        "names, and strikes words that the photo can answer. Point at a picture to look beneath its mask.</p>"
        f'<div class="key">{"".join(key)}</div>'
        '<input type="checkbox" class="heat-switch" id="heat">'
        '<label for="heat">Show the scores behind SyncMask instead</label>'
        f'<div class="examples">{_folded(cards, SHOWN_MASKS)}</div></section>'
    )


def _folded(items: list[str], shown: int) -> str:
    """The first `shown` items, the others one click away."""
    left = len(items) - shown
    if left <= 0:
        return "".join(items)
    label = f"{left} more example{'s' if left > 1 else ''}"
    first, rest = "".join(items[:shown]), "".join(items[shown:])
    return f'{first}<details class="fold"><summary>{label}</summary>{rest}</details>'


def _mask_example(mask: MaskExample, index: int) -> str:
    side = mask.image.shape[0]
    about = [f"Product {escape(mask.product)}" if mask.product else f"Example {index + 1}"]
    if mask.view:
        about.append(f"<span>{escape(mask.view)} view</span>")
    source = data_uri(mask.image, MASK_SIDE, MASK_BYTES)
    photo = f'<image id="p{index}" width="{side}" height="{side}" href="{source}"/>'
    details, large = key_of(mask)
    names = "".join(f"<li><b>{count}</b><span>{escape(name)}</span></li>" for count, name in enumerate(details, 1))
    if large:
        names += f'<li><i class="swatch dashed"></i><span>{escape(large)}</span></li>'
    what = "Outlined: what the text names and this view shows" if names else "As the model gets it"
    label = f"{mask.view} photo of product {mask.product}"
    listed = f'<ul class="names">{names}</ul>' if names else ""
    plain = (
        f'<figure><h4>The photo</h4><p class="count">{what}</p>'
        f"{_picture(mask, photo + _boxes(mask, numbers=True), label)}{listed}</figure>"
    )
    columns = "".join(_masked_column(mask, index, which) for which in ("random", "sync"))
    head = f"<h3>{' · '.join(about)}</h3>"
    return f'<article class="example">{head}<div class="three">{plain}{columns}</div></article>'


def _masked_column(mask: MaskExample, index: int, which: Which) -> str:
    patches, parts = mask.patches(which), segments(mask, which)
    inner = f'<use href="#p{index}"/>'
    if which == "sync":
        side = mask.image.shape[0]
        scores = score_uri(mask.patch_score, mask.grid)
        inner += f'<image class="heat" width="{side}" height="{side}" href="{scores}"/>'
    inner += f'<path class="mask {which}" d="{_cells(mask, patches)}"/>{_boxes(mask)}'
    title = "SyncMask" if which == "sync" else "Random mask"
    count = patch_count(mask, which)
    text = "".join(_segment(part) for part in parts)
    return (
        f'<figure class="{which}"><h4>{title}</h4><p class="count">{count}</p>'
        f"{_picture(mask, inner, f'{title}: {count}', focus=True)}"
        f'<div><p class="said">{text}</p><p class="tally">{tally(parts)}</p></div></figure>'
    )


def _picture(mask: MaskExample, inner: str, label: str, focus: bool = False) -> str:
    side = mask.image.shape[0]
    tab = ' tabindex="0"' if focus else ""
    said = f'role="img" aria-label="{escape(label)}"{tab}'
    return f'<svg class="pic" viewBox="0 0 {side} {side}" {said}>{inner}</svg>'


def _cells(mask: MaskExample, patches: np.ndarray) -> str:
    """An SVG path of the given patches, a hair of the photo left between them."""
    side = mask.image.shape[0] / mask.grid
    gap = 0.05 * side
    inner = side - gap
    rows, columns = np.divmod(np.flatnonzero(patches), mask.grid)
    return "".join(
        f"M{column * side + gap / 2:.4g} {row * side + gap / 2:.4g}h{inner:.4g}v{inner:.4g}h{-inner:.4g}z"
        for row, column in zip(rows, columns, strict=True)
    )


def _radius(mask: MaskExample) -> float:
    """Of a number's disc, in pixels of the image."""
    return mask.image.shape[0] / 24


def _boxes(mask: MaskExample, numbers: bool = False) -> str:
    radius, corner = _radius(mask), f"{mask.image.shape[0] / 96:.3g}"
    shapes, badges = [], []
    for count, frame in enumerate(frames(mask, 1.1 * radius), 1):  # details come first
        x0, y0, x1, y1 = frame.box
        shape = f'x="{x0:.4g}" y="{y0:.4g}" width="{x1 - x0:.4g}" height="{y1 - y0:.4g}" rx="{corner}"'
        title = f"<title>{escape(frame.names)}</title>"
        if not frame.detail:
            shapes += [f'<rect class="large" {shape}>{title}</rect>'] * numbers
            continue
        shapes.append(f'<rect class="halo" {shape}/><rect class="box" {shape}>{title}</rect>')
        x, y = frame.badge
        badges.append(
            f'<g class="badge" transform="translate({x:.4g} {y:.4g}) scale({radius:.4g})"><circle r="1"/>'
            f'<text y=".4" style="font-size:1.15px">{count}</text></g>'
        )
    return "".join(shapes) + ("".join(badges) if numbers else "")


def _segment(part: Segment) -> str:
    if part.score is None and not part.masked and part.visible is None:
        return escape(part.text)
    classes = ["w"] + ["hidden"] * part.masked + ["unseen"] * (part.visible is False)
    said = {True: "names a detail in view", False: "names something this view does not show", None: ""}[part.visible]
    title = f' title="{said}"' if said else ""
    style = f' style="--h:{part.score:.2f}"' if part.score is not None else ""
    tag = "s" if part.masked else "span"
    return f'<{tag} class="{" ".join(classes)}"{style}{title}>{escape(part.text)}</{tag}>'


def retrieval_section(examples: list[RetrievalExample]) -> str:
    """Queries with their best answers, right ones ringed green and wrong ones red, and the truth's rank."""
    if not examples:
        return ""
    groups = ""
    for direction, heading in (("t2i", "From words to photos"), ("i2t", "From a photo to words")):
        queries = [_query(example) for example in examples if example.direction == direction]
        if queries:
            groups += f"<h3>{heading}</h3>{_folded(queries, SHOWN_QUERIES)}"
    return (
        '<section id="retrieval"><h2>What it finds</h2><p class="intro">Best answers first. '
        '<span class="right"><b class="mark">✓</b></span> a green ring is the right product, '
        '<b class="mark">✗</b> a red one another product; the number is the model’s similarity.</p>'
        f"{groups}</section>"
    )


def _query(example: RetrievalExample) -> str:
    if example.direction == "t2i":
        ask = f'<p class="ask">“{escape(example.query_text or "")}”</p>'
    else:
        ask = f'<img alt="the photo asked about" src="{data_uri(example.query_image, HIT_SIDE, HIT_BYTES)}">'
        ask += f'<p class="ask">“{escape(example.query_text)}”</p>' if example.query_text else ""
    rank = example.rank_of_truth
    style, said = (
        ("rank first", "Right answer in first place") if rank == 1 else ("rank", f"Right answer at rank {rank:,}")
    )
    pictures = all(item.image is not None for item in example.results)
    items = "".join(_hit_picture(item) if pictures else _hit_text(item) for item in example.results)
    kind = "hits" if pictures else "lines"
    answers = f'<ol class="{kind}">{items}</ol>' if items else ""
    return f'<article class="query"><div>{ask}<p class="{style}">{said}</p></div>{answers}</article>'


def _hit_picture(item: RetrievedItem) -> str:
    return (
        f'<li{_right(item)}><img alt="{_verdict(item)}" src="{data_uri(item.image, HIT_SIDE, HIT_BYTES)}">'
        f"<p>{_mark(item)} {number(item.score)}</p></li>"
    )


def _hit_text(item: RetrievedItem) -> str:
    said = escape(item.text) if item.text is not None else ""
    if item.image is not None:
        said = f'<img alt="{_verdict(item)}" src="{data_uri(item.image, HIT_SIDE, HIT_BYTES)}">'
    return f"<li{_right(item)}>{_mark(item)}<span>{said}</span><p>{number(item.score)}</p></li>"


def _right(item: RetrievedItem) -> str:
    return ' class="right"' if item.correct else ""


def _mark(item: RetrievedItem) -> str:
    return f'<b class="mark" title="{_verdict(item)}">{"✓" if item.correct else "✗"}</b>'


def _verdict(item: RetrievedItem) -> str:
    return "the right product" if item.correct else "another product"


def curves_section(metrics: list[dict]) -> str:
    """Loss curves, each `sync/` and `eval/` number with base rates, throughput, waiting, learning rate."""
    charts = [line_chart(title, note, [series(metrics, key, title)]) for key, title, note in LOSSES]
    charts += _measured_charts(metrics)
    charts += [
        line_chart(
            "Throughput", "Image-text pairs a second.", [series(metrics, "pairs_per_s", "pairs/s")], " /s", floor=0.0
        ),
        line_chart(
            "Waiting for data",
            "Share of each step spent waiting for pictures; near 0 % the model sets the pace.",
            [series(metrics, "data_wait_share", "wait", scale=100.0)],
            " %",
            floor=0.0,
        ),
        line_chart("Learning rate", "Size of the steps.", [series(metrics, "lr", "lr", smooth=False)], floor=0.0),
    ]
    shown = "".join(charts)
    if not shown:
        return ""
    return (
        '<section id="training"><h2>How training went</h2><p class="intro">Faint: every step. Strong: a '
        "moving average over about a twentieth of the run. The number at the right is where it ended; point "
        "at a curve to read it.</p>"
        f'<div class="charts">{shown}</div></section>'
    )


def _measured_charts(metrics: list[dict]) -> list[str]:
    """A chart for each group of sync/ and eval/ keys: a precision shares one with its two base rates."""
    keys = {key: None for row in metrics for key in row if key.startswith(("sync/", "eval/")) and is_number(row[key])}
    groups: dict[str, list[str]] = {}
    for key in keys:
        head, _, tail = key.rpartition("/")
        groups.setdefault(head if tail in BASE_RATES else key, []).append(key)
    charts = []
    for group, members in groups.items():
        based = [key for key in members if key != group]
        title, note = MEASURED.get(group, (group, "Measured now and then during training."))
        if based:
            members = sorted(based, key=lambda key: list(BASE_RATES).index(key.rpartition("/")[2]))
            lines = [series(metrics, key, *BASE_RATES[key.rpartition("/")[2]], smooth=False) for key in members]
        else:
            lines = [series(metrics, group, title, smooth=False)]
        charts.append(line_chart(title, note, lines))
    return charts
