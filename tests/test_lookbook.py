"""The lookbook: what its texts and boxes say is what its images show, and the same everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from syncmask_fast import pack
from syncmask_fast.sources.base import Encoding
from syncmask_fast.sources.lookbook import draw_lookbook, source
from syncmask_fast.sources.lookbook.captions import describe, facts
from syncmask_fast.sources.lookbook.catalogue import INSIDE, Product, sample_product, stream
from syncmask_fast.sources.lookbook.details import KINDS, LETTERS, MOTIFS
from syncmask_fast.sources.lookbook.drawing import SMALLEST, render
from syncmask_fast.sources.lookbook.fabric import COLORS, distance
from syncmask_fast.sources.lookbook.garments import build
from syncmask_fast.sources.lookbook.geometry import Style
from syncmask_fast.sources.lookbook.subcategories import CATEGORIES, SUBCATEGORIES
from syncmask_fast.sources.lookbook.vocabulary import BRANDS, FILLERS, LAST_FILLERS, OCCASIONS
from syncmask_fast.utils.errors import UserError

Sample = tuple[str, bytes, dict]


@pytest.fixture(scope="module")
def drawn() -> list[list[Sample]]:
    """The samples of 64 products, drawn once for this file."""
    lookbook, encoding = source.Lookbook(), Encoding(subsampling="4:4:4")
    rows = [list(lookbook.product_rows("train", number)) for number in range(64)]
    return [[(row.key, encoding.encode(row.image), row.record) for row in product] for product in rows]


@pytest.fixture(scope="module")
def products() -> list[Product]:
    return [sample_product(0, "train", number) for number in range(320)]


def text_of(product: Product, split: str = "train"):
    return describe(product, stream(0, split, product.number, "text"))


def read_samples(folder: Path) -> list[tuple[str, bytes]]:
    members = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members += [(member.name, tar.extractfile(member).read()) for member in tar]
    return members


# Pictures and boxes


def test_boxes_in_images(drawn):
    """Images decode, and boxes are inside them and not tiny."""
    for product in drawn:
        assert 3 <= len(product) <= 5
        views = [record["view"] for _, _, record in product]
        assert views[:2] == ["front", "back"]
        for key, jpeg, record in product:
            image = Image.open(BytesIO(jpeg))
            image.load()
            assert (image.size, image.mode, image.format) == ((96, 96), "RGB", "JPEG")
            assert "." not in key
            for attribute in record["attributes"]:
                if attribute["box"] is not None:
                    x0, y0, x1, y1 = attribute["box"]
                    assert 0 <= x0 < x1 <= 96
                    assert 0 <= y0 < y1 <= 96
                    assert min(x1 - x0, y1 - y0) >= SMALLEST


def test_boxes_match_pixels():
    """Each seen detail is drawn and left out: the changed pixels are in its box and reach its edges."""
    checked = Counter()
    for number in range(14):
        product = sample_product(0, "train", number)
        for index in range(len(product.views)):
            whole = render(product, index, 96, 0, "train")
            for detail in product.details:
                without = render(product, index, 96, 0, "train", without=detail.kind)
                change = np.abs(np.asarray(whole.image, np.int16) - np.asarray(without.image, np.int16)).max(axis=2)
                box = whole.boxes[detail.kind]
                assert without.boxes[detail.kind] is None
                if box is None:
                    continue
                rows, columns = (np.flatnonzero((change > 40).any(axis=1)), np.flatnonzero((change > 40).any(axis=0)))
                assert len(rows), (number, index, detail)
                assert len(columns), (number, index, detail)
                x0, y0, x1, y1 = box
                found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                # A raised detail's own shadow (about 2 px, below and to the right) is not part of its box
                outside = np.array([x0, y0, 96 - x1, 96 - y1]) - np.array(
                    [found[0], found[1], 96 - found[2], 96 - found[3]]
                )
                slack = np.array([1.5, 1.5, 3.5, 3.5]) * (2 if product.views[index] == "detail" else 1)
                checked["all"] += 1
                checked["inside"] += bool((outside <= slack).all())
                checked["tight"] += bool((outside >= -2.5).all())
    assert checked["all"] > 45
    assert checked["inside"] >= 0.98 * checked["all"], checked
    assert checked["tight"] >= 0.90 * checked["all"], checked  # a pale rim on a pale cloth changes little


def test_no_box_elsewhere(products):
    """A detail has a box only on the faces where it is placed."""
    for product in products[:24]:
        for index, view in enumerate(product.views):
            if view == "detail":
                continue
            boxes = render(product, index, 64, 0, "train").boxes
            for detail in product.details:
                if view not in detail.places:
                    assert boxes[detail.kind] is None, (product.number, view, detail)
            assert boxes["category"] is not None
            if product.lining_named:
                assert boxes["lining"] is None
    assert all(
        render(p, p.views.index("detail"), 64, 0, "train").boxes["category"] is None
        for p in products[:24]
        if "detail" in p.views
    )


def test_details_visible(products):
    """A detail that is placed on a face is visible there."""
    seen = total = 0
    for product in products[:36]:
        for index, view in enumerate(product.views):
            boxes = render(product, index, 96, 0, "train").boxes
            for detail in product.details:
                if view in detail.places:
                    total += 1
                    seen += boxes[detail.kind] is not None
    assert seen >= 0.98 * total
    assert total > 60


def test_garment_area_and_position(products):
    """Garments fill a third to two thirds of a full view, at varying positions."""
    shares, centers = [], []
    for product in products[:36]:
        view = render(product, 0, 48, 0, "train")
        shares.append(view.share)
        x0, y0, x1, y1 = view.boxes["category"]
        centers.append(((x0 + x1) / 96, (y0 + y1) / 96))
    assert min(shares) > 0.27
    assert max(shares) < 0.70
    assert np.std(centers, axis=0).min() > 0.03


def test_boxes_scale(products):
    """The same view at twice the size has boxes of twice the size."""
    for product in products[:6]:
        small, large = render(product, 0, 96, 0, "train"), render(product, 0, 192, 0, "train")
        for name, box in small.boxes.items():
            assert (box is None) == (large.boxes[name] is None), name
            if box is not None:
                assert np.abs(np.array(large.boxes[name]) / 2 - box).max() < 1.5


def test_details_contrast(products):
    """Details have a color that contrasts with the cloth below."""
    for product in products:
        for detail in product.details:
            if detail.kind != "cut-out":
                ground = product.lining[0] if INSIDE in detail.places else product.color
                assert distance(COLORS[detail.color], COLORS[ground]) > 25, (product.number, detail)


# Texts


def test_spans(drawn):
    """Spans are sorted, do not overlap, and cover whole words."""
    for product in drawn:
        text = product[0][2]["text"]
        for _, _, record in product:
            assert record["text"] == text
            spans = [attribute["span"] for attribute in record["attributes"]]
            assert spans == sorted(spans)
            for (start, end), following in zip(spans, [*spans[1:], [len(text) + 1, 0]], strict=True):
                assert 0 <= start < end < following[0]
                assert text[start:end] == text[start:end].strip()
                assert start == 0 or text[start - 1] in ' "', text[start - 1 :]
                assert text[end] in " ,.", text[start : end + 2]


def test_mentions(products):
    """A mention names the color and the variant of its detail."""
    for product in products:
        text, mentions = text_of(product)
        assert "category" in [m.name for m in mentions]
        for mention in mentions:
            words = text[mention.start : mention.end].lower()
            if mention.name in KINDS:
                detail = next(d for d in product.details if d.kind == mention.name)
                if detail.kind != "cut-out":
                    assert detail.color in words
                if detail.kind in ("print", "embroidery", "patch", "lettering"):
                    assert detail.what.lower() in words
            if mention.name == "color":
                assert words == product.color


def test_texts(products):
    """Texts are sentences of 10 to 60 words that do not tell sides."""
    lengths, told, placed = [], 0, 0
    for product in products:
        text, mentions = text_of(product)
        lengths.append(len(text.split()))
        words = text.lower().replace(".", " ").replace(",", " ").split()
        assert not {"left", "right", "sleeve"} & set(words)
        assert all(sentence[0].isupper() or sentence[0].isdigit() for sentence in text[:-1].split(". "))
        assert text.endswith(".")
        assert "[[" not in text
        assert "  " not in text
        for vowel in "aeiou":
            if vowel != "u":
                assert f" a {vowel}" not in text.lower(), text
        told += sum(m.name in KINDS for m in mentions)
        placed += sum(text.count(words) for words in (" on the front", " at the back", " at the side", " inside"))
    assert min(lengths) >= 10
    assert max(lengths) <= 60
    assert 20 <= np.mean(lengths) <= 32
    assert placed < 0.10 * told
    details = sum(len(product.details) for product in products)
    assert 0.60 <= told / details <= 0.78
    assert len({text_of(product)[0] for product in products}) == len(products)


def test_fillers():
    """Sentences about invisible things use no words of attributes."""
    taken = {*COLORS, *SUBCATEGORIES, *CATEGORIES, *MOTIFS, "pocket", "zip", "cotton", "leather"}
    every = " ".join([*BRANDS, *OCCASIONS, *(f for forms in (*FILLERS, *LAST_FILLERS) for f in forms)]).lower()
    assert not taken & set(every.replace(".", "").split())


def test_text_position(drawn):
    """Seen and hidden local details stand at the same place in the text on average."""
    places = {True: [], False: []}
    for product in drawn:
        for _, _, record in product:
            for attribute in record["attributes"]:
                if attribute["name"] in KINDS:
                    places[attribute["box"] is not None].append(attribute["span"][0] / len(record["text"]))
    assert abs(np.mean(places[True]) - np.mean(places[False])) < 0.06


# The mismatch


def test_mismatch(drawn):
    """A good third of the attribute words and most details are hidden, whatever the kind of detail."""
    seen, total, local_seen, local = 0, 0, 0, 0
    by_kind = defaultdict(list)
    for product in drawn:
        for _, _, record in product:
            for attribute in record["attributes"]:
                words = len(record["text"][slice(*attribute["span"])].split())
                visible = attribute["box"] is not None
                seen, total = seen + words * visible, total + words
                if attribute["name"] in KINDS:
                    local_seen, local = local_seen + visible, local + 1
                    by_kind[attribute["name"]].append(visible)
    assert 0.52 <= seen / total <= 0.68
    assert 0.30 <= local_seen / local <= 0.50
    # guessing from the kind of detail alone is hardly better than always saying "hidden"
    best = sum(max(np.mean(v), 1 - np.mean(v)) * len(v) for v in by_kind.values()) / local
    assert best - (1 - local_seen / local) < 0.06


def test_faces_of_details():
    """Every kind of detail occurs on every face."""
    faces = defaultdict(Counter)
    for number in range(500):
        product = sample_product(0, "train", number)
        assert 1 <= len(product.details) <= 4
        assert len({d.kind for d in product.details}) == len(product.details)
        for detail in product.details:
            faces[detail.kind].update(list(detail.places))
    assert set(faces) == set(KINDS)
    common = {kind: count for kind, count in faces.items() if sum(count.values()) >= 25}
    assert len(common) >= len(KINDS) - 3
    for kind, count in common.items():
        assert {"front", "back", "side"} <= set(count), (kind, count)
        assert max(count.values()) < 0.65 * sum(count.values()), (kind, count)


def test_variety(products):
    """Every category, most subcategories and half of the motifs are among 320 products; all words can be written."""
    assert {product.category for product in products} == set(CATEGORIES)
    assert len({product.subcategory for product in products}) > 0.9 * len(SUBCATEGORIES)
    assert len({d.what for product in products for d in product.details if d.kind == "print"}) > len(MOTIFS) / 2
    assert {letter for word in KINDS["lettering"].variants for letter in word} <= set(LETTERS)
    assert set(KINDS["embroidery"].variants) <= set(MOTIFS)


@pytest.mark.parametrize("name", SUBCATEGORIES)
def test_styles(name):
    """Each garment has a plausible size, a panel for details, and its second color at the front."""
    sub = SUBCATEGORIES[name]
    for sleeves in sub.sleeves or (None,):
        for neck in sub.necks or (None,):
            for trim in (None, *sub.trims):
                for face in ("front", "back", "side"):
                    if face == "side" and sub.category in ("scarf", "shoe"):
                        continue
                    garment = build(name, face, Style(sleeves, neck, 15.0, trim, sub.belt, (1.0, 1.0)))
                    x0, y0, x1, y1 = garment.bounds()
                    assert 0.3 < x1 - x0 < 2.2
                    assert 0.4 < y1 - y0 < 2.2
                    assert any(piece.panel for piece in garment.pieces)
                    if face == "front" and trim and trim not in ("cuffs", "sleeves", "hood"):
                        assert any(piece.fabric == "trim" for piece in garment.pieces), trim


@pytest.mark.parametrize(
    "name", [name for name, sub in SUBCATEGORIES.items() if sub.category not in ("bag", "hat", "scarf")]
)
def test_faces_differ(name):
    """Front, back and side of a garment are different drawings."""
    sub = SUBCATEGORIES[name]
    style = Style(*(options[0] if options else None for options in (sub.sleeves, sub.necks)))
    faces = ("front", "back") if sub.category == "shoe" else ("front", "back", "side")
    outlines = {
        np.concatenate([piece.polygon for piece in build(name, face, style).pieces]).tobytes() for face in faces
    }
    assert len(outlines) == len(faces)


# Siblings and facts


def test_siblings(products):
    """A quarter of the products are siblings that differ in one attribute."""
    siblings = [product for product in products if product.sibling_of is not None]
    assert len(siblings) == len(products) // 4
    changed = Counter()
    for sibling in siblings:
        base = products[sibling.sibling_of]
        assert base.sibling_of is None
        names = {n for n in facts(base).keys() | facts(sibling).keys() if facts(base).get(n) != facts(sibling).get(n)}
        assert len(names) == 1, (sibling.number, names)
        changed.update(names)
        assert text_of(base)[0] != text_of(sibling)[0]
        for detail in sibling.details:
            same = next((d for d in base.details if d.kind == detail.kind), detail)
            assert same.places == detail.places
    assert len(changed) > 8
    assert changed["color"] > 0


def test_facts(drawn):
    """Facts are a flat dict of strings and hold what is mentioned."""
    for product in drawn:
        for _, _, record in product:
            assert all(isinstance(v, str) and v for v in record["facts"].values())
            assert record["facts"]["category"] == record["category"]
            assert record["facts"]["subcategory"] == record["subcategory"]
            for attribute in record["attributes"]:
                name = "subcategory" if attribute["name"] == "category" else attribute["name"]
                assert record["facts"][name] == attribute["value"]


# Building


def test_workers(tmp_path):
    """The samples are the same for any number of workers and of products."""
    numbers = dict(products=18, eval_products=3, size=48, seed=5)
    for workers in (1, 3):
        draw_lookbook(tmp_path / str(workers), workers=workers, **numbers)
    for split in ("train", "eval"):
        one = read_samples(tmp_path / "1" / split)
        assert len(one) >= 6
        assert one == read_samples(tmp_path / "3" / split)
    draw_lookbook(tmp_path / "more", workers=1, **{**numbers, "products": 10})
    fewer = read_samples(tmp_path / "more" / "train")
    assert fewer == read_samples(tmp_path / "1" / "train")[: len(fewer)]  # product i does not depend on the count


def test_splits(tmp_path):
    """The splits have disjoint product ids and different products."""
    draw_lookbook(tmp_path / "lb", products=6, eval_products=5, size=32, workers=1)
    records = {
        split: [json.loads(data) for name, data in read_samples(tmp_path / "lb" / split) if name.endswith(".json")]
        for split in ("train", "eval")
    }
    ids = {split: {record["product_id"] for record in rows} for split, rows in records.items()}
    assert ids == {"train": set(range(6)), "eval": set(range(6, 11))}
    assert not {r["text"] for r in records["train"]} & {r["text"] for r in records["eval"]}
    assert facts(sample_product(0, "train", 0)) != facts(sample_product(0, "eval", 0))
    assert facts(sample_product(0, "train", 0)) != facts(sample_product(1, "train", 0))


def test_drawn_once(tmp_path, capsys, monkeypatch):
    out = tmp_path / "lb"
    out.mkdir()  # an empty folder may be filled
    draw_lookbook(out, products=2, eval_products=1, size=32, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lb"]
    assert sorted(path.name for path in out.iterdir()) == ["eval", "report.json", "train"]
    monkeypatch.setattr(source, "render", lambda *_: pytest.fail("drawn again"))
    capsys.readouterr()
    draw_lookbook(out, products=2, eval_products=1, size=32, workers=2)
    assert "already complete" in capsys.readouterr().out


def test_refusals(tmp_path):
    draw_lookbook(tmp_path / "lb", products=1, eval_products=1, size=32, workers=1)
    with pytest.raises(UserError, match=r"other settings \(products\)\. Delete it"):
        draw_lookbook(tmp_path / "lb", products=2, eval_products=1, size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        draw_lookbook(tmp_path / "mine", products=1)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="Choose another output folder"):
            draw_lookbook(out, products=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize(
    "flags",
    [
        dict(products=0),
        dict(eval_products=0),
        dict(size=31),
        dict(size=5000),
        dict(seed=-1),
        dict(workers=0),
        dict(quality=0),
        dict(quality=101),
    ],
)
def test_bad_numbers(tmp_path, flags):
    """Bad numbers are refused before anything is written."""
    name = next(iter(flags)).replace("_", "-")
    with pytest.raises(UserError, match=rf"--{name} -?\d+ is out of range\."):
        draw_lookbook(tmp_path / "lb", **flags)
    assert not list(tmp_path.iterdir())


def test_resume(tmp_path, monkeypatch):
    """A drawing that is interrupted in its second shard resumes there, and ends with the same bytes."""
    numbers = dict(products=6, eval_products=2, size=32, workers=1)
    monkeypatch.setattr(source, "PRODUCTS_PER_SHARD", 3)
    draw_lookbook(tmp_path / "whole", **numbers)
    real, drawn = source.render, []

    def interrupted(product, *args):
        if product.number == 4 and not drawn:
            raise KeyboardInterrupt
        return real(product, *args)

    monkeypatch.setattr(source, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_lookbook(tmp_path / "lb", **numbers)
    assert not list((tmp_path / "lb").glob("*/*.tar"))
    monkeypatch.setattr(source, "render", lambda product, *args: drawn.append(product.number) or real(product, *args))
    draw_lookbook(tmp_path / "lb", **numbers)
    assert set(drawn) == {3, 4, 5, 0, 1}  # the rest of train, and eval
    for split in ("train", "eval"):
        for name in ("triplets.json", "galleries.json"):
            assert (tmp_path / f"lb/{split}/{name}").read_text() == (tmp_path / f"whole/{split}/{name}").read_text()
        assert read_samples(tmp_path / "lb" / split) == read_samples(tmp_path / "whole" / split)


def test_default_lookbook(tmp_path, monkeypatch, capfd):
    """Training draws the lookbook by a command, which is skipped when it is complete and fails with one sentence."""
    command = source.subprocess.run
    small = ["--products", "2", "--eval-products", "1", "--workers", "1"]
    monkeypatch.setattr(source.subprocess, "run", lambda words, **options: command([*words, *small], **options))
    for said in ("samples", "already complete"):
        source.draw_in_child(tmp_path / "lb", size=32)
        assert said in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        source.draw_in_child(tmp_path / "lb", size=40)
    assert stop.value.code == 2
    assert capfd.readouterr().err.startswith(f"error: {tmp_path / 'lb'} was made from another source")


def test_command(tmp_path, capsys):
    pack.main([*("lookbook", str(tmp_path / "lb"), "--products", "2", "--eval-products", "1", "--size", "32")])
    assert "│ products     │ 3 " in capsys.readouterr().out
    assert list((tmp_path / "lb" / "train").glob("*.tar"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["lookbook", "OUT", "--products", "0"], "error: --products 0 is out of range. Give a number from 1 to "),
        (["lookbook", "OUT", "--size", "16"], "error: --size 16 is out of range. Give a number from 32 to 1024."),
        (["lookbook", "OUT", "--size", "big"], "big"),
        (["lookbook"], "required"),
        (["wardrobe", "OUT"], "wardrobe"),
        ([], "lookbook"),
    ],
)
def test_command_errors(args, says, tmp_path, capsys):
    """Mistakes on the command line end with one sentence and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        pack.main([str(tmp_path / "lb") if arg == "OUT" else arg for arg in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert says.lower() in error.lower()
    assert "Traceback" not in error
    if error.startswith("error: "):
        assert error.count("\n") == 1
    assert not (tmp_path / "lb").exists()


def test_no_torch():
    """Drawing does not import torch."""
    code = "import sys, syncmask_fast.sources.lookbook, syncmask_fast.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
