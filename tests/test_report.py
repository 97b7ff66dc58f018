"""The report: whole, honest, harmless, self-contained and small, whatever it is given."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from syncmask_fast import report
from syncmask_fast.report import MaskExample, RetrievalExample, RetrievedItem, WordMark, mask_overlay, write_report
from syncmask_fast.report.charts import line_chart, number, series, short, smooth
from syncmask_fast.report.examples import frames, key_of, patch_count, segments, word_counts
from syncmask_fast.report.pictures import data_uri, score_uri
from syncmask_fast.report.sections import SHOWN_MASKS, masks_section
from syncmask_fast.report.tables import cards, chance, results_section

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;<!-- \x00\ud800 é"
TEXT = "Red linen dress with a scoop neckline, one patch pocket and a zip at the back."


class Page(HTMLParser):
    """Parses strictly: every element is closed in its place. Keeps attributes, ids, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str, style: str | None = None) -> int:
        return sum(t == tag and (style is None or style in (a.get("class") or "").split()) for t, a in self.tags)


def picture(side: int = 48, seed: int = 0) -> np.ndarray:
    """uint8 [side, side, 3] noise: what compresses worst."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def word_marks(text: str = TEXT) -> list[WordMark]:
    visible = {"linen": True, "scoop": True, "neckline": True, "zip": False, "back": False}
    masked_random, masked_sync = {"with", "zip"}, {"scoop", "neckline", "pocket"}
    marks = []
    for match in re.finditer(r"\w+", text):
        word = match[0]
        cut = match.start() + 4 if len(word) > 6 else match.end()
        for start, end in ((match.start(), cut), (cut, match.end())):
            if end > start:
                seen, score = visible.get(word), 0.1 + 0.01 * start
                marks.append(
                    WordMark(text[start:end], start, end, True, seen, word in masked_random, word in masked_sync, score)
                )
    return marks


def mask_example(seed: int = 0, side: int = 48, grid: int = 6, **changes) -> MaskExample:
    generator = np.random.default_rng(seed)
    patches = generator.permutation(grid * grid) < grid * grid // 3
    example = MaskExample(
        image=picture(side, seed),
        text=TEXT,
        words=word_marks(),
        grid=grid,
        random_patches=patches,
        sync_patches=generator.permutation(patches),
        patch_score=generator.random(grid * grid, dtype=np.float32),
        boxes=[("scoop neckline", (8.0, 0.0, 24.0, 8.0)), ("patch pocket", (30.0, 30.0, 41.5, 40.0))],
        view="front",
        product="1042",
    )
    return dataclasses.replace(example, **changes)


def retrievals(count: int = 2, side: int = 48) -> list[RetrievalExample]:
    out = []
    for seed in range(count):
        pictures = [RetrievedItem(picture(side, 7 * seed + i), None, 0.9 - 0.1 * i, i == 1) for i in range(5)]
        texts = [RetrievedItem(None, f"text {seed} {i}", 0.8 - 0.1 * i, i == 0) for i in range(5)]
        out.append(RetrievalExample("t2i", f"query {seed}", None, pictures, 2))
        out.append(RetrievalExample("i2t", None, picture(side, 90 + seed), texts, 1))
    return out


def metric_rows(count: int = 120) -> list[dict]:
    rows = []
    for step in range(count):
        row = {"step": step, "epoch": step // 50, "pairs_per_s": 410.0 + step % 3, "data_wait_share": 0.02, "lr": 1e-3}
        row |= {"loss": 9.0 - 0.01 * step, "loss_itc": 4.0, "loss_itm": 0.69, "loss_mlm": 4.1, "loss_mim": 0.21}
        if step % 40 == 39:
            row |= {"sync/patches/precision": 40.0 + step, "sync/patches/random": 12.0, "sync/words/auc": 61.5}
        rows.append(row)
    return rows


RESULTS = {
    "retrieval/i2t/full/R@1": 31.37,
    "retrieval/i2t/101-candidate/R@1": 61.43,
    "retrieval/i2t/101-candidate/R@1/std": 0.83,
    "retrieval/t2i/101-candidate/R@1": 59.17,
    "retrieval/t2i/101-candidate/R@1/std": 0.71,
    "retrieval/mean/101-candidate/R@1": 60.3,
    "retrieval/mean/101-candidate/R@10": 94.26,
    "retrieval/101-candidate/borrowed": 3.19,
    "retrieval/images": 2412.0,
    "retrieval/products": 603.0,
    "sync/words/precision": 71.31,
    "sync/words/random": 54.92,
    "sync/words/shuffled": 58.73,
    "sync/words/auc": 64.24,
    "sync/words/auc/shuffled": 51.08,
    "sync/patches/precision": 41.83,
    "sync/patches/random": 12.26,
    "sync/patches/shuffled": 29.64,
    "sync/patches-any-attribute/precision": 22.47,
    "category/accuracy": 93.25,
}


def write(folder: Path, **changes) -> tuple[str, Page]:
    given = {
        "title": "A run",
        "config": {"seed": 0, "model": {"width": 192, "patch": 8}},
        "metrics": metric_rows(),
        "results": RESULTS,
        "masks": [mask_example(seed) for seed in range(5)],
        "retrieval": retrievals(),
        "summary": {
            "about": "Tiny on the lookbook.",
            "command": "python -m syncmask_fast.train tiny",
            "Time": "11 min",
        },
    } | changes
    path = folder / "report.html"
    write_report(path, **given)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_page_is_whole(tmp_path):
    html, page = write(tmp_path)
    assert html.startswith("<!doctype html>")
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    fragments = [attrs["href"] for _, attrs in page.tags if (attrs.get("href") or "").startswith("#")]
    assert {"#masks", "#retrieval", "#training", "#results", "#run"} <= set(fragments)
    assert {fragment[1:] for fragment in fragments} <= set(ids)
    for said in (
        "A run",
        "Tiny on the lookbook.",
        "python -m syncmask_fast.train tiny",
        "11 min",
        "model.patch",
        "Product 1042",
    ):
        assert said in page.text
    assert page.count("article", "example") == 5
    assert page.count("svg", "pic") == 15
    assert page.count("article", "query") == 4
    assert page.count("figure", "chart") == 5 + 3 + 2  # losses; throughput, wait, lr; sync patches, word AUC
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_every_number_appears(tmp_path):
    _, page = write(tmp_path, masks=[], retrieval=[], metrics=[])
    for key, value in RESULTS.items():
        assert key in page.text
        assert repr(value) in page.text, key  # the folded table holds each as stored
    for said in (
        "60.3",
        "94.3",
        "71.3",
        "64.2",
        "41.8",
        "1.0\u202f%",
        "9.9\u202f%",
    ):  # the headline, with chance beside it
        assert said in page.text.split("All results")[1]
    assert "3.41\u00a0×" in page.text  # patches over random: 41.83 / 12.26
    assert "1.41\u00a0×" in page.text  # patches over shuffled
    assert "± 0.83" in page.text
    assert "2,412 photos of 603 products" in page.text


def test_everything_from_outside_is_escaped(tmp_path):
    words = [WordMark(HOSTILE[0:9], 0, 9, True, False, True, True, 0.5)]
    mask = mask_example(
        text=HOSTILE, words=words, boxes=[(HOSTILE, (1.0, 1.0, 9.0, 9.0))], view=HOSTILE, product=HOSTILE
    )
    found = [RetrievedItem(None, HOSTILE, 0.5, True)]
    html, page = write(
        tmp_path,
        title=HOSTILE,
        config={HOSTILE: HOSTILE, "deep": {HOSTILE: [HOSTILE]}},
        metrics=[{"step": 1, "loss": 1.0, f"sync/{HOSTILE}": 1.0, f"eval/{HOSTILE}/precision": 2.0}],
        results=RESULTS
        | {HOSTILE: 1.0, f"retrieval/i2t/{HOSTILE.replace('/', '')}/R@1": 2.0, f"sync/{HOSTILE}/precision": 3.0},
        masks=[mask],
        retrieval=[
            RetrievalExample("i2t", HOSTILE, picture(), found, 1),
            RetrievalExample("t2i", HOSTILE, None, [RetrievedItem(picture(), None, 0.5, False)], 3),
        ],
        summary={"about": HOSTILE, "command": HOSTILE, HOSTILE: HOSTILE},
    )
    assert page.count("script") == 1
    assert "<script>alert" not in html
    assert "<!--" not in html.replace("<!doctype", "")
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert all((attrs.get("src") or "data:").startswith("data:") for _, attrs in page.tags)
    assert page.text.count("alert('2')") >= 10


def test_nothing_is_fetched(tmp_path):
    html, page = write(tmp_path)
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest", re.sub(r'"data:[^"]*"', "", html))


@pytest.mark.parametrize("left_out", ["masks", "retrieval", "metrics", "results", "config", "summary"])
def test_an_empty_part_is_left_out(tmp_path, left_out):
    empty = {} if left_out in ("results", "config", "summary") else []
    _, page = write(tmp_path, **{left_out: empty})
    headings = {
        "masks": "What gets hidden",
        "retrieval": "What it finds",
        "metrics": "How training went",
        "results": "All results",
    }
    for part, heading in headings.items():
        assert page.text.count(heading) == (0 if part == left_out else 2 if part == "results" else 1)


def test_all_empty(tmp_path):
    _, page = write(tmp_path, config={}, metrics=[], results={}, masks=[], retrieval=[], summary={})
    assert "How to read this" in page.text
    assert page.count("section") == 1
    assert page.count("a") == 0


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "epoch": 0, "loss": 3.5, "lr": 0.0, "pairs_per_s": 12, "data_wait_share": 0}],
        [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 3.5}],
        [{"loss": 3.5}],
        [{"step": 1, "loss": "bad"}, {"step": 2, "loss": None}, {"step": 3, "loss": True}, {"step": 4, "loss": 3.5}],
        [{"step": 1, "loss": 3.5, "eval/note": "text", "sync/words/auc": None}],
    ],
    ids=["one row", "not finite", "no step", "not numbers", "text under a metric key"],
)
def test_odd_metrics(tmp_path, rows):
    html, page = write(tmp_path, metrics=rows)
    assert "3.5" in page.text.split("How training went")[1]
    drawn = " ".join(attrs.get(name) or "" for _, attrs in page.tags for name in ("points", "cx", "cy", "y1", "d"))
    assert not re.search(r"nan|inf", drawn)
    lines = [json.loads(attrs["data-lines"]) for _, attrs in page.tags if attrs.get("data-lines")]
    assert next(line for line in lines if line[0]["label"] == "Total loss")[0]["v"] == ["3.50"]


def test_results_that_are_not_finite(tmp_path):
    _, page = write(tmp_path, results={"sync/words/precision": math.nan, "retrieval/mean/101-candidate/R@1": math.inf})
    assert page.count("div", "card") == 0
    assert "nan" in page.text


@pytest.mark.parametrize(
    ("precision", "said"), [(41.0, "above both"), (20.0, "not above shuffled"), (5.0, "not above random and")]
)
def test_the_verdict_is_honest(precision, said):
    html = cards({"sync/patches/precision": precision, "sync/patches/random": 10.0, "sync/patches/shuffled": 30.0})
    assert said in html
    assert ("verdict yes" in html) == (precision > 30)


def test_recall_is_the_mean_of_both_directions():
    results = {"retrieval/i2t/full/R@1": 20.0, "retrieval/t2i/full/R@1": 30.0}
    assert "25.0" in cards(results)
    assert "chance" not in cards(results)  # the gallery's size is not in the protocol's name
    assert cards({}) == ""
    assert chance("101-candidate", 10) == pytest.approx(1000 / 101)
    assert chance("5-candidate", 10) == 100
    assert chance("full", 1) is None


def test_a_key_shown_in_a_table_is_not_repeated():
    more = results_section(RESULTS).split("More numbers")[1].split("<details")[0]
    shown = re.findall(r"<tr><td>(.*?)</td>", more)
    assert shown == ["retrieval/101-candidate/borrowed", "retrieval/images", "retrieval/products", "category/accuracy"]


def test_atomic(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    path.parent.mkdir()
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write(path.parent)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    write(path.parent)
    assert path.read_text().startswith("<!doctype html>")
    assert list(path.parent.iterdir()) == [path]


def test_a_new_folder_is_made(tmp_path):
    write(tmp_path / "runs" / "new")
    assert (tmp_path / "runs" / "new" / "report.html").stat().st_mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_size_stays_small_even_for_noise(tmp_path):
    masks = [mask_example(seed, side=256, grid=16) for seed in range(12)]
    html, _ = write(tmp_path, masks=masks, retrieval=retrievals(6, side=256), metrics=metric_rows(3000))
    assert len(html.encode()) < 3e6


def test_same_input_same_file(tmp_path):
    assert write(tmp_path)[0] == write(tmp_path)[0]


def test_torch_is_not_imported():
    code = "import sys, syncmask_fast.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parents[2])


def test_examples_beyond_the_first_are_folded():
    html = masks_section([mask_example(seed) for seed in range(SHOWN_MASKS + 3)])
    assert html.count('class="example"') == SHOWN_MASKS + 3
    assert html.split("<details")[0].count('class="example"') == SHOWN_MASKS
    assert "3 more examples" in html


def test_masks_are_drawn_where_they_are():
    patches = np.zeros(36, dtype=bool)
    patches[7] = True  # row 1, column 1 of 6 x 6; 8 pixels a patch
    html = masks_section([mask_example(sync_patches=patches, boxes=[("pocket", (8.0, 8.0, 16.0, 16.0))])])
    path = re.search(r'class="mask sync" d="(M([\d.]+) ([\d.]+)h([\d.]+)[^"]*)"', html)
    assert path[1].count("M") == 1
    assert 8 <= float(path[2]) <= 8.5
    assert 8 <= float(path[3]) <= 8.5
    assert 7 <= float(path[4]) <= 8
    assert "1 of 1 hidden patches show what the text names, 1 a numbered detail" in html


def test_hidden_words_are_struck_and_unseen_ones_dotted():
    html = masks_section([mask_example()])
    random, sync = html.split('class="sync"')[0].split('class="random"')[1], html.split('class="sync"')[1]
    assert set(re.findall(r"<s [^>]*>(.*?)</s>", random)) == {"with", "zip"}
    assert set(re.findall(r"<s [^>]*>(.*?)</s>", sync)) == {"scoop", "neckline", "pocket"}
    assert re.search(r'<s class="w hidden unseen"[^>]*>zip</s>', random)
    assert re.search(r'<span class="w unseen"[^>]*>back</span>', sync)
    assert "2 hidden words: 0 can be seen here, 1 cannot" in random
    assert "3 hidden words: 2 can be seen here, 0 cannot" in sync


def test_segments_give_the_text_back():
    example = mask_example()
    for which in ("random", "sync"):
        parts = segments(example, which)
        assert "".join(part.text for part in parts) == TEXT
        assert [part.text for part in parts if part.text == "neckline"] == ["neckline"]  # two pieces, one run
        assert all(part.score is None or 0 <= part.score <= 1 for part in parts)
    assert word_counts(segments(example, "sync")) == (3, 2, 0)


def test_segments_with_odd_spans():
    marks = [
        WordMark("b", 2, 3, True, None, True, False, -math.inf),
        WordMark("a", 0, 1, True, None, True, False, 1.0),
        WordMark("overlaps", 0, 3, True, None, True, True, 1.0),
        WordMark("beyond", 4, 99, True, None, True, True, 1.0),
        WordMark("empty", 4, 4, True, None, True, True, 1.0),
    ]
    parts = segments(mask_example(text="a b c", words=marks), "random")
    assert [(part.text, part.masked) for part in parts] == [("a", True), (" ", False), ("b", True), (" c", False)]
    assert segments(mask_example(text="", words=[]), "sync") == []


def test_frames_merge_equal_boxes_and_part_their_numbers():
    boxes = [
        ("navy", (0.0, 0.0, 40.0, 40.0)),
        ("linen", (0.2, 0.0, 40.0, 40.0)),
        ("collar", (0.0, 0.0, 20.0, 10.0)),
        ("button", (1.5, 0.0, 12.0, 9.0)),
        ("outside", (60.0, 60.0, 70.0, 70.0)),
        ("beyond", (30.0, 30.0, 99.0, 99.0)),
    ]
    example = mask_example(boxes=boxes)
    found = frames(example, radius=2.0)
    assert [frame.names for frame in found] == ["collar", "button", "beyond", "navy, linen"]
    assert [frame.detail for frame in found] == [True, True, True, False]  # large ones come last, without a number
    assert found[2].box == (30.0, 30.0, 48.0, 48.0)
    places = np.array([frame.badge for frame in found[:3]])
    gaps = np.linalg.norm(places[:, None] - places[None], axis=-1)[np.triu_indices(3, 1)]
    assert gaps.min() >= 4.0
    assert key_of(example) == (["collar", "button", "beyond"], "navy, linen")


def test_patches_are_counted_by_the_rule_of_the_metrics():
    every = np.ones(36, bool)
    box = ("collar", (8.0, 8.0, 24.0, 16.0))  # two patches of 8 x 8
    assert patch_count(mask_example(boxes=[]), "sync") == "12 of 36 patches hidden"
    said = "2 of 36 hidden patches show what the text names, 2 a numbered detail"
    assert patch_count(mask_example(boxes=[box], sync_patches=every), "sync") == said
    large = ("navy", (0.0, 0.0, 48.0, 24.0))
    said = "18 of 36 hidden patches show what the text names"
    assert patch_count(mask_example(boxes=[large], random_patches=every), "random") == said
    both = patch_count(mask_example(boxes=[large, box], sync_patches=every), "sync")
    assert both == f"{said}, 2 a numbered detail"


@pytest.mark.parametrize(
    "changes",
    [
        {"image": np.zeros((48, 48), np.uint8)},
        {"image": np.zeros((48, 48, 3), np.float32)},
        {"image": np.zeros((48, 32, 3), np.uint8)},
        {"sync_patches": np.zeros(35, bool)},
        {"patch_score": np.zeros((6, 6), np.float32)},
    ],
)
def test_mask_example_checks_shapes(changes):
    with pytest.raises(ValueError, match="must"):
        mask_example(**changes)


def test_retrieval_examples_are_checked():
    with pytest.raises(ValueError, match="image or a text"):
        RetrievedItem(None, None, 0.0, True)
    with pytest.raises(ValueError, match="counts from 1"):
        RetrievalExample("t2i", "query", None, [], 0)
    with pytest.raises(ValueError, match="query_image"):
        RetrievalExample("i2t", "query", None, [], 1)
    with pytest.raises(ValueError, match="direction"):
        RetrievalExample("both", "query", None, [], 1)


def test_charts():
    rows = [{"step": 10 * step, "loss": float(step)} for step in range(1000)]
    line = series(rows, "loss", "loss")
    html = line_chart("Loss", "note", [line])
    points = re.search(r'class="line main" points="([^"]*)"', html)[1].split()
    assert 100 < len(points) <= 240
    ys = [float(point.split(",")[1]) for point in points]
    assert ys == sorted(ys, reverse=True)  # rising values rise on the page
    assert line_chart("Loss", "note", [series([], "loss", "loss")]) == ""
    assert [short(value) for value in (0, 1500, 2e6, 0.00075, 0.25)] == ["0", "1.5k", "2M", "7.5e-4", "0.25"]
    assert [number(value) for value in (0, 0.1234, 12.345, 43210, 3e-9)] == ["0", "0.123", "12.3", "43,210", "3.00e-09"]


def test_smoothing_keeps_level_and_takes_noise():
    noise = np.random.default_rng(0).normal(size=2000)
    assert np.allclose(smooth(np.full(500, 2.5)), 2.5)
    assert smooth(3 + noise).std() < 0.25
    assert smooth(noise[:10]) is not None
    assert np.array_equal(smooth(noise[:10]), noise[:10])


def test_a_spike_survives_thinning():
    values = np.zeros(5000)
    values[2503] = 50.0
    rows = [{"step": step, "loss": value} for step, value in enumerate(values)]
    html = line_chart("Loss", "note", [series(rows, "loss", "loss")])
    raw = [float(point.split(",")[1]) for point in re.search(r'class="raw main" points="([^"]*)"', html)[1].split()]
    assert min(raw) == pytest.approx(14.0)  # clipped at the top of the plot, not lost
    assert len(raw) <= 240


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_pictures_become_small_data_uris():
    uri = data_uri(picture(256), 168, 15_000)
    assert decode(uri).size == (168, 168)
    assert len(uri) < 1.35 * 15_000
    flat = np.full((32, 48, 3), (200, 30, 60), np.uint8)
    back = decode(data_uri(flat, 168, 15_000))
    assert back.size == (48, 32)  # never enlarged
    assert np.abs(np.asarray(back, dtype=int) - flat).max() <= 3


def test_score_map():
    scores = np.array([0.0, 0.5, 1.0, np.nan], dtype=np.float32)
    alpha = np.asarray(decode(score_uri(scores, 2)))[..., 3].reshape(-1)
    assert alpha[0] == alpha[3] == 0
    assert 0 < alpha[1] < alpha[2]
    assert np.asarray(decode(score_uri(np.zeros(4, np.float32), 2)))[..., 3].max() == 0


def test_mask_overlay_shows_the_masks():
    blank = np.full((48, 48, 3), 255, np.uint8)
    none, all_of_them = np.zeros(36, bool), np.ones(36, bool)
    example = mask_example(image=blank, boxes=[], random_patches=none, sync_patches=all_of_them)
    overlay = mask_overlay(example)
    assert overlay.mode == "RGB"
    assert overlay.width > 3 * 240
    assert overlay.height > 240
    row = np.asarray(overlay)[160]  # through the middle of the three pictures
    thirds = [row[i * overlay.width // 3 : (i + 1) * overlay.width // 3] for i in range(3)]
    white = [(third == 255).all(axis=1).mean() for third in thirds]
    assert white[0] > 0.8
    assert white[1] > 0.8
    assert white[2] < 0.1


def test_mask_overlay_takes_any_text_and_scale():
    small, large = mask_overlay(mask_example(side=96), scale=3), mask_overlay(mask_example(side=96), scale=5)
    assert large.width > 1.5 * small.width
    assert mask_overlay(mask_example(text="", words=[], boxes=[], view="")).height > 240
    long = "Donaudampfschifffahrtsgesellschaft " * 40
    assert mask_overlay(mask_example(text=long, words=[])).height > mask_overlay(mask_example()).height


def test_mask_overlay_strikes_words():
    struck = [dataclasses.replace(word, sync=True) for word in word_marks()]
    plain = [dataclasses.replace(word, sync=False) for word in word_marks()]
    first, second = mask_overlay(mask_example(words=struck)), mask_overlay(mask_example(words=plain))
    assert first.size == second.size
    changed = (np.asarray(first) != np.asarray(second)).any(axis=(2))
    assert changed[:, : 2 * first.width // 3].sum() == 0  # only the third column differs
    assert changed.sum() > 1000
