"""The report: the data reach the page, nothing from outside is run or fetched, and numbers are told as they are."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from syncmask_fast.report.charts import OBJECTIVES, number, smooth, training_charts
from syncmask_fast.report.contact_sheet import BOX, DETAIL_AREA, PAPER, Cell, Segment, contact_sheet, frames, marked
from syncmask_fast.report.report import (
    MaskExample,
    RetrievalExample,
    RetrievedItem,
    WordMark,
    mask_sheet,
    photo_uri,
    score_uri,
    write_report,
)
from syncmask_fast.tasks import mask_quality

HOSTILE = "</script></style><script>alert(1)</script><img src=x onerror=\"alert('2')\">{{ 7 * 7 }}<!-- \x00\ud800"
TEXT = "Red linen dress with a scoop neckline, one patch pocket and a zip at the back."
VOID = {"br", "img", "input", "link", "meta"}
RESULTS = {
    "retrieval/i2t/full/R@1": 31.37,
    "retrieval/i2t/101-candidate/R@1": 61.43,
    "retrieval/i2t/101-candidate/R@1/std": 0.83,
    "retrieval/t2i/101-candidate/R@1": 59.17,
    "retrieval/mean/101-candidate/R@1": 60.3,
    "retrieval/mean/101-candidate/R@10": 94.26,
    "retrieval/101-candidate/borrowed": 3.19,
    "retrieval/images": 2412.0,
    "retrieval/products": 603.0,
    "sync/words/precision": 71.31,
    "sync/words/random": 54.92,
    "sync/words/shuffled": 58.73,
    "sync/words/auc": 64.24,
    "sync/patches/precision": 41.83,
    "sync/patches/random": 12.26,
    "sync/patches/shuffled": 29.64,
    "sync/patches-any-attribute/precision": 22.47,
    "mlm/visible-tokens/nll": 2.125,
}


class Page(HTMLParser):
    """A page parsed strictly: each element is closed in its place. Keeps attributes and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in VOID)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data * (self.open[-1:] not in (["style"], ["script"]))

    def count(self, tag: str, style: str = "") -> int:
        return sum(name == tag and style in (attrs.get("class") or "") for name, attrs in self.tags)


def image(side: int = 48, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def mask_example(seed: int = 0, side: int = 48, **changes) -> MaskExample:
    """An example of 6 x 6 patches; words of more than six letters are two tokens."""
    visible = {"linen": True, "scoop": True, "neckline": True, "zip": False, "back": False}
    words = []
    for match in re.finditer(r"\w+", TEXT):
        cut = match.start() + 4 if len(match[0]) > 6 else match.end()
        for start, end in ((match.start(), cut), (cut, match.end())):
            masks = match[0] in {"with", "zip"}, match[0] in {"scoop", "neckline", "pocket"}
            if end > start:
                words.append(WordMark(start, end, visible.get(match[0]), *masks, 0.1 + 0.01 * start))
    rng = np.random.default_rng(seed)
    patches = rng.permutation(36) < 12
    example = MaskExample(
        image=image(side, seed),
        text=TEXT,
        words=words,
        grid=6,
        random=patches,
        sync=rng.permutation(patches),
        score=rng.random(36, dtype=np.float32),
        boxes=[("scoop neckline", (8.0, 0.0, 24.0, 8.0)), ("patch pocket", (30.0, 30.0, 41.5, 40.0))],
        named=np.arange(36) < 7,
        detail=np.arange(36) < 3,
        view="front",
        product="1042",
    )
    return dataclasses.replace(example, **changes)


def retrievals(count: int = 2, side: int = 48) -> list[RetrievalExample]:
    examples = []
    for seed in range(count):
        images = [RetrievedItem(image(side, 7 * seed + i), None, 0.9 - 0.1 * i, i == 1) for i in range(5)]
        texts = [RetrievedItem(None, f"text {seed} {i}", 0.8 - 0.1 * i, i == 0) for i in range(5)]
        examples += [RetrievalExample(f"query {seed}", images, 2), RetrievalExample(image(side, 90), texts, 1)]
    return examples


def metric_rows(count: int = 120) -> list[dict]:
    rows = []
    for step in range(count):
        row = {"step": step, "pairs_per_s": 410.0 + step % 3, "data_wait_share": 0.02, "lr": 1e-3}
        row |= {"loss": 9.0 - 0.01 * step, "loss/mlm": 4.1, "loss/itc": 4.0, "loss/new-idea": 0.5}
        if step % 40 == 39:
            row |= {"sync/patches/random": 12.0, "sync/patches/precision": 40.0 + step, "sync/words/auc": 61.5}
        rows.append(row)
    return rows


def write(folder: Path, **changes) -> tuple[str, Page]:
    given = dict(
        title="A run",
        config={"seed": 0, "model": {"width": 192, "patch": 8}},
        metrics=metric_rows(),
        results=RESULTS,
        masks=[mask_example(seed) for seed in range(6)],
        retrieval=retrievals(),
        summary={"about": "Tiny on the lookbook.", "command": "python -m syncmask_fast.train tiny", "Time": "11 min"},
    )
    write_report(folder / "report.html", **(given | changes))
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


# The page ----------------------------------------------------------------------------------------------------------


def test_page(tmp_path: Path):
    """All data are on the page, its links lead somewhere, and images and tables are named."""
    html, page = write(tmp_path / "new")
    assert html.startswith("<!doctype html>")
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    links = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    assert links == ["masks", "retrieval", "training", "results", "run"]
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "use"} <= set(ids)
    for said in ("A run", "Tiny on the lookbook.", "train tiny", "11 min", "model.patch", "Product 1042", "query 1"):
        assert said in page.text
    assert page.count("article", "example") == 6
    assert "2 more examples" in page.text
    assert page.count("svg", "pic") == 18
    assert page.count("article", "query") == 4
    assert page.count("figure", "chart") == 4 + 2 + 3
    assert page.count("table") == page.count("caption")
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert write(tmp_path)[0] == write(tmp_path)[0]


def test_numbers(tmp_path: Path):
    """Each result is there as stored, the headline next to chance, and no number twice in the tables."""
    _, page = write(tmp_path, masks=[], retrieval=[], metrics=[])
    for key, value in RESULTS.items():
        assert key in page.text
        assert repr(value) in page.text
    for said in ("60.3\u202f%", "1.0\u202f%", "9.9\u202f%", "3.41\xa0×", "1.41\xa0×", "± 0.83", "of 603 products"):
        assert said in page.text
    more = page.text.split("More numbers")[1].split("Every number")[0]
    assert [key for key in RESULTS if key in more] == [
        "retrieval/101-candidate/borrowed",
        "retrieval/images",
        "retrieval/products",
        "mlm/visible-tokens/nll",
    ]


def test_recall_without_mean(tmp_path: Path):
    """The mean of both directions is made up where it is missing; without a number of candidates there is no chance."""
    text = write(tmp_path, results={"retrieval/i2t/full/R@1": 20.0, "retrieval/t2i/full/R@1": 30.0})[1].text
    assert "25.0\u202f%" in text
    assert "Guessing" not in text


@pytest.mark.parametrize(
    ("precision", "said"), [(41.0, "above both"), (20.0, "not above shuffled"), (5.0, "not above random and shuffled")]
)
def test_verdict(tmp_path: Path, precision: float, said: str):
    rates = {"sync/patches/precision": precision, "sync/patches/random": 10.0, "sync/patches/shuffled": 30.0}
    html, page = write(tmp_path, results=rates)
    assert said in page.text
    assert ('<span class="yes">' in html) == (precision > 30)


def test_hostile_text(tmp_path: Path):
    """Strings from outside are text wherever they are shown: nothing runs, and no element is closed by them."""
    words = [WordMark(0, 9, False, True, True, 0.5)]
    mask = mask_example(text=HOSTILE, words=words, boxes=[(HOSTILE, (1, 1, 9, 9))], view=HOSTILE, product=HOSTILE)
    item = RetrievedItem(None, HOSTILE, 0.5, True)
    flat = HOSTILE.replace("/", "")
    html, page = write(
        tmp_path,
        title=HOSTILE,
        config={HOSTILE: HOSTILE, "deep": {HOSTILE: [HOSTILE]}},
        metrics=[{"step": 1, f"loss/{HOSTILE}": 1.0, f"sync/{HOSTILE}": 1.0, f"eval/{HOSTILE}/precision": 2.0}],
        results={HOSTILE: 1.0, f"retrieval/i2t/{flat}/R@1": 2.0, f"sync/{HOSTILE}/precision": 3.0},
        masks=[mask],
        retrieval=[RetrievalExample(HOSTILE, [], 3), RetrievalExample(image(), [item], 1)],
        summary={"about": HOSTILE, "command": HOSTILE, HOSTILE: HOSTILE},
    )
    assert page.count("script") == page.count("style") == 1
    assert "<script>alert" not in html
    assert "<!--" not in html
    assert "49" not in page.text
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.text.count("alert('2')") >= 15


def test_nothing_is_fetched(tmp_path: Path):
    html, page = write(tmp_path)
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(", re.sub(r'"data:[^"]*"', "", html))
    assert "default-src 'none'" in html


@pytest.mark.parametrize("left_out", ["masks", "retrieval", "metrics", "results", "all"])
def test_empty(tmp_path: Path, left_out: str):
    """What is empty is left out together with its heading and its link."""
    headings = {"masks": "What gets hidden", "retrieval": "What it finds", "metrics": "How training went"}
    headings |= {"results": "In percent, unless", "summary": "This run"}
    empty = {"results": {}, "summary": {}, "config": {}, "masks": [], "retrieval": [], "metrics": []}
    _, page = write(tmp_path, **(empty if left_out == "all" else {left_out: empty[left_out]}))
    for part, heading in headings.items():
        assert (heading in page.text) == (left_out not in (part, "all"))
    assert page.count("a") == (0 if left_out == "all" else 4)


def test_size(tmp_path: Path):
    """A long run with noise for images stays small."""
    masks = [mask_example(seed, side=256) for seed in range(12)]
    html, _ = write(tmp_path, masks=masks, retrieval=retrievals(6, side=256), metrics=metric_rows(3000))
    assert len(html) < 3e6


def test_torch_is_not_imported():
    code = "import sys, syncmask_fast.report.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# Curves ------------------------------------------------------------------------------------------------------------


def test_charts():
    """Losses come in order, those without a title under their name; a precision shares its chart with base rates."""
    charts = training_charts(metric_rows())
    titles = [OBJECTIVES[name][0] for name in ("itc", "mlm")]
    assert [chart.title for chart in charts[:4]] == ["Total loss", *titles, "Loss: new-idea"]
    patches = next(chart for chart in charts if "on target" in chart.title)
    assert patches.ends == [("accent", "SyncMask", "159"), ("pale", "random", "12.0")]
    loss = json.loads(charts[0].points)[0]
    assert loss["step"][0] == 0
    assert loss["step"][-1] == 119
    assert loss["y"] == sorted(loss["y"])
    assert 0 < loss["y"][0] < loss["y"][-1] < 180
    assert "var(--accent)" in charts[0].svg


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 3.5}],
        [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 3.5}],
        [{"loss": 3.5}],
        [{"step": 1, "loss": "bad"}, {"step": 2, "loss": None}, {"step": 3, "loss": True}, {"step": 4, "loss": 3.5}],
    ],
    ids=["one row", "not finite", "no step", "not numbers"],
)
def test_odd_metrics(rows: list[dict]):
    [chart] = training_charts(rows)
    assert chart.ends == [("accent", "", "3.50")]
    assert not re.search(r"nan|inf", chart.svg + chart.points)


def test_smooth():
    noise = np.random.default_rng(0).normal(size=2000)
    assert np.allclose(smooth(np.full(500, 2.5)), 2.5)
    assert smooth(3 + noise).std() < 0.25
    assert np.array_equal(smooth(noise[:10]), noise[:10])
    assert [number(value) for value in (0.1234, 12.345, 43210, 100.0)] == ["0.123", "12.3", "43,210", "100"]


# Masks -------------------------------------------------------------------------------------------------------------


def test_masks_are_drawn_where_they_are(tmp_path: Path):
    sync = np.zeros(36, dtype=bool)
    sync[7] = True  # row 1, column 1 of 6 x 6, 8 pixels a patch
    named, detail = np.zeros((2, 36), dtype=bool)
    named[7] = True
    example = mask_example(sync=sync, named=named, detail=detail)
    assert example.cells("sync") == "M8.2 8.2h7.6v7.6h-7.6z"
    assert example.patch_count("sync") == "1 of 1 hidden patches show what the text names, 0 a numbered detail"
    assert mask_example(boxes=[]).patch_count("sync") == "12 of 36 patches hidden"
    html, _ = write(tmp_path, masks=[example])
    assert 'class="mask sync" d="M8.2 8.2h7.6v7.6h-7.6z"' in html


def test_words_are_struck(tmp_path: Path):
    """Hidden words are struck, those out of view dotted; tokens of one word are one run."""
    html, _ = write(tmp_path, masks=[mask_example()])
    sync, random = (html.split(f'<figure class="{which}">')[1].split("</figure>")[0] for which in ("sync", "random"))
    assert re.findall(r"<s [^>]*>(.*?)</s>", random) == ["with", "zip"]
    assert re.findall(r"<s [^>]*>(.*?)</s>", sync) == ["scoop", "neckline", "pocket"]
    assert re.search(r'<s class="w hidden unseen"[^>]*>zip</s>', random)
    assert re.search(r'<span class="w unseen"[^>]*>back</span>', sync)
    assert "2 hidden words: 0 can be seen here, 1 cannot" in random
    assert "3 hidden words: 2 can be seen here, 0 cannot" in sync


def test_segments():
    """Runs give the text back, also where spans overlap, are empty, out of order, or leave the text."""
    runs = mask_example().segments("sync")
    assert "".join(run.text for run in runs) == TEXT
    assert all(run.score is None or 0 <= run.score <= 1 for run in runs)
    marks = [(2, 3, -math.inf), (0, 1, 1.0), (0, 3, 1.0), (4, 99, 1.0), (4, 4, 1.0)]
    words = [WordMark(start, end, None, True, False, score) for start, end, score in marks]
    runs = mask_example(text="a b c", words=words).segments("random")
    assert [(run.text, run.masked) for run in runs] == [("a", True), (" ", False), ("b", True), (" c", False)]
    assert mask_example(text="", words=[]).segments("sync") == []


def test_frames():
    """Equal boxes are merged, boxes are clipped, details come first, and their numbers are kept apart."""
    boxes = [
        ("navy", (0.0, 0.0, 40.0, 40.0)),
        ("linen", (0.2, 0.0, 40.0, 40.0)),
        ("collar", (0.0, 0.0, 20.0, 10.0)),
        ("button", (1.5, 0.0, 12.0, 9.0)),
        ("outside", (60.0, 60.0, 70.0, 70.0)),
        ("beyond", (30.0, 30.0, 99.0, 99.0)),
    ]
    found = frames(boxes, 48, 48, radius=2.0)
    assert [frame.names for frame in found] == ["collar", "button", "beyond", "navy, linen"]
    assert [frame.detail for frame in found] == [True, True, True, False]
    assert found[2].box == (30.0, 30.0, 48.0, 48.0)
    places = np.array([frame.badge for frame in found[:3]])
    assert np.linalg.norm(places[:, None] - places[None], axis=-1)[np.triu_indices(3, 1)].min() >= 4.0
    assert mask_example(boxes=boxes).key() == (["collar", "button", "beyond"], "navy, linen")
    assert DETAIL_AREA == mask_quality.PLACE_AREA


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_data_uris():
    uri = photo_uri(image(256), 168, 15_000)
    assert decode(uri).size == (168, 168)
    assert len(uri) < 1.35 * 15_000
    flat = np.full((32, 48, 3), (200, 30, 60), np.uint8)
    assert np.abs(np.asarray(decode(photo_uri(flat, 168, 15_000)), dtype=int) - flat).max() <= 3  # not enlarged
    alpha = np.asarray(decode(score_uri(np.array([0.0, 0.5, 1.0, np.nan], np.float32), 2)))[..., 3].ravel()
    assert alpha[0] == alpha[3] == 0 < alpha[1] < alpha[2]
    assert np.asarray(decode(score_uri(np.zeros(4, np.float32), 2)))[..., 3].max() == 0


# Contact sheets ----------------------------------------------------------------------------------------------------


def test_contact_sheet():
    """Cells stand in rows, images keep their shape, boxes and masks are where they belong, and texts are cut."""
    blank, wide = np.full((40, 40, 3), 200, np.uint8), np.full((20, 40, 3), 200, np.uint8)
    outline = frames([("bow", (10.0, 10.0, 20.0, 20.0))], 40, 40)
    cells = [Cell(blank, "#1", frames=outline), Cell(wide, "#2"), Cell(None, "#3", text=[Segment("broken")])]
    sheet = np.asarray(contact_sheet(cells, columns=2, side=80, lines=2))
    assert sheet.shape[1] == 10 + 2 * 90
    gray = (sheet == 200).all(-1)
    assert gray[:, 10:90].sum() > 0.8 * 80 * 80
    assert 0.9 * 80 * 40 < gray[:, 100:180].sum() <= 80 * 40
    rows, columns = np.nonzero((sheet == BOX).all(-1))
    assert (columns.min(), columns.max()) == (30, 50)
    assert rows.max() - rows.min() == 20
    long = contact_sheet([Cell(blank, text=[Segment("Donaudampfschifffahrtsgesellschaft " * 40)])], side=80, lines=2)
    short = contact_sheet([Cell(blank, text=[Segment("one two three four five six")])], side=80, lines=2)
    assert long.size == short.size
    assert (np.asarray(long)[:, 95:] == PAPER).all()  # the gap to the next column stays
    assert contact_sheet(cells, columns=2, heading="“red”").height > sheet.shape[0]


def test_marked_text():
    attributes = [{"span": [12, 16], "box": None}, {"span": [2, 6], "box": [0, 0, 1, 1]}, {"span": [4, 9], "box": None}]
    runs = marked("a navy bow, red trim", attributes)
    assert [(run.text, run.visible) for run in runs if run.text] == [
        ("a ", None), ("navy", True), (" bow, ", None), ("red ", False), ("trim", None),
    ]  # fmt: skip


def test_mask_sheet():
    """README's image: a hidden patch shades its own column only, and struck words change its text."""
    blank, none = np.full((48, 48, 3), 255, np.uint8), np.zeros(36, bool)
    example = mask_example(image=blank, boxes=[], random=none, sync=~none)
    sheet = np.asarray(mask_sheet(example))
    white = [(sheet[150, 28 + 316 * i :][:288] == 255).all(-1).mean() for i in range(3)]
    assert white[0] > 0.9
    assert white[1] > 0.9
    assert white[2] < 0.1
    plain = [dataclasses.replace(word, sync=False) for word in example.words]
    changed = (sheet != np.asarray(mask_sheet(dataclasses.replace(example, words=plain)))[: len(sheet)]).any(-1)
    assert changed[:, : 2 * 316].sum() == 0 < changed.sum()
