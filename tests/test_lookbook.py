"""The lookbook: what its texts and boxes say must be what its pictures show, and the same everywhere."""

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
from syncmask_fast.sources.lookbook import build, draw_lookbook, samples
from syncmask_fast.sources.lookbook.catalogue import INSIDE, Product, sample_product, stream
from syncmask_fast.sources.lookbook.details import KINDS
from syncmask_fast.sources.lookbook.drawing import SMALLEST, render
from syncmask_fast.sources.lookbook.fabric import CLOTH, COLOURS, distance
from syncmask_fast.sources.lookbook.motifs import LETTERS, MOTIFS
from syncmask_fast.sources.lookbook.subcategories import CATEGORIES, SUBCATEGORIES
from syncmask_fast.sources.lookbook.wording import describe, facts
from syncmask_fast.sources.lookbook.words import BRANDS, FILLERS, LAST_FILLERS, OCCASIONS
from syncmask_fast.utils.errors import UserError

JOB = samples.Job(seed=0, split="train", count=64, first_id=0, size=96, quality=90)


@pytest.fixture(scope="module")
def drawn() -> list[list[samples.Sample]]:
    """The samples of 64 products, drawn once for this file."""
    return [samples.draw_product(JOB, number) for number in range(JOB.count)]


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


def test_pictures_decode_and_boxes_lie_in_them(drawn):
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


def test_a_box_is_where_leaving_the_detail_out_changes_the_picture():
    """Each seen detail is drawn and left out: the changed pixels lie in its box and reach its edges."""
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


def test_a_detail_that_is_elsewhere_has_no_box(products):
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


def test_every_placed_detail_is_seen_on_its_face(products):
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


def test_garments_fill_a_third_to_two_thirds_of_a_full_view_and_stand_anywhere(products):
    shares, centres = [], []
    for product in products[:36]:
        view = render(product, 0, 48, 0, "train")
        shares.append(view.share)
        x0, y0, x1, y1 = view.boxes["category"]
        centres.append(((x0 + x1) / 96, (y0 + y1) / 96))
    assert min(shares) > 0.27
    assert max(shares) < 0.70
    assert np.std(centres, axis=0).min() > 0.03


def test_boxes_scale_with_the_picture(products):
    for product in products[:6]:
        small, large = render(product, 0, 96, 0, "train"), render(product, 0, 192, 0, "train")
        for name, box in small.boxes.items():
            assert (box is None) == (large.boxes[name] is None), name
            if box is not None:
                assert np.abs(np.array(large.boxes[name]) / 2 - box).max() < 1.5


def test_details_stand_out(products):
    for product in products:
        for detail in product.details:
            if detail.kind != "cut-out":
                ground = product.lining[0] if INSIDE in detail.places else product.colour
                assert distance(COLOURS[detail.colour], COLOURS[ground]) > 25, (product.number, detail)


# Texts


def test_spans_are_the_words(drawn):
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


def test_a_mention_names_its_colour_and_variant(products):
    for product in products:
        text, mentions = text_of(product)
        assert "category" in [m.name for m in mentions]
        for mention in mentions:
            words = text[mention.start : mention.end].lower()
            if mention.name in KINDS:
                detail = next(d for d in product.details if d.kind == mention.name)
                if detail.kind != "cut-out":
                    assert detail.colour in words
                if detail.kind in ("print", "embroidery", "patch", "lettering"):
                    assert detail.what.lower() in words
            if mention.name == "colour":
                assert words == product.colour


def test_texts_are_sentences_of_10_to_60_words_that_do_not_tell_sides(products):
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


def test_what_no_view_shows_has_no_words_of_attributes():
    taken = {*COLOURS, *SUBCATEGORIES, *CATEGORIES, *MOTIFS, "pocket", "zip", "cotton", "leather"}
    every = " ".join([*BRANDS, *OCCASIONS, *(f for forms in (*FILLERS, *LAST_FILLERS) for f in forms)]).lower()
    assert not taken & set(every.replace(".", "").split())


def test_position_in_the_text_does_not_tell_what_is_visible(drawn):
    """Seen and hidden local details stand at the same place in the text on average."""
    places = {True: [], False: []}
    for product in drawn:
        for _, _, record in product:
            for attribute in record["attributes"]:
                if attribute["name"] in KINDS:
                    places[attribute["box"] is not None].append(attribute["span"][0] / len(record["text"]))
    assert abs(np.mean(places[True]) - np.mean(places[False])) < 0.06


# The mismatch


def test_a_good_third_of_the_attribute_words_and_most_details_are_hidden(drawn):
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


def test_kinds_of_details_are_on_every_face():
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


def test_variety():
    assert len(CATEGORIES) >= 8
    assert len(SUBCATEGORIES) >= 30
    assert len(CLOTH) >= 12
    assert len(MOTIFS) >= 12
    for word in KINDS["lettering"].variants:
        assert set(word) <= set(LETTERS)
    assert set(KINDS["embroidery"].variants) <= set(MOTIFS)


@pytest.mark.parametrize("name", SUBCATEGORIES)
def test_each_subcategory_can_be_drawn_in_every_style(name):
    from syncmask_fast.sources.lookbook.garments import build as sew
    from syncmask_fast.sources.lookbook.parts import Style

    sub = SUBCATEGORIES[name]
    outlines = set()
    for sleeves in sub.sleeves or (None,):
        for neck in sub.necks or (None,):
            for trim in (None, *sub.trims):
                for face in ("front", "back", "side"):
                    if face == "side" and sub.category in ("scarf", "shoe"):
                        continue
                    garment = sew(name, face, Style(sleeves, neck, 15.0, trim, sub.belt, (1.0, 1.0)))
                    x0, y0, x1, y1 = garment.bounds()
                    assert 0.3 < x1 - x0 < 2.2
                    assert 0.4 < y1 - y0 < 2.2
                    assert any(part.panel for part in garment.parts)
                    outlines.add(tuple(round(v, 3) for v in (face == "front", *garment.parts[-1].polygon.ravel()[:6])))
                    if trim and trim not in ("cuffs", "sleeves", "hood"):
                        assert any(part.fabric == "trim" for part in garment.parts) or face != "front", (
                            name,
                            trim,
                            face,
                        )
    assert len(outlines) >= 1


# Siblings and facts


def test_a_quarter_are_siblings_that_differ_in_one_attribute(products):
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
    assert changed["colour"] > 0


def test_facts_are_flat_and_hold_what_is_mentioned(drawn):
    for product in drawn:
        for _, _, record in product:
            assert all(isinstance(v, str) and v for v in record["facts"].values())
            assert record["facts"]["category"] == record["category"]
            assert record["facts"]["subcategory"] == record["subcategory"]
            for attribute in record["attributes"]:
                name = "subcategory" if attribute["name"] == "category" else attribute["name"]
                assert record["facts"][name] == attribute["value"]


# Building


def test_the_same_bytes_for_any_number_of_workers(tmp_path):
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


def test_ids_of_the_splits_are_disjoint_and_the_products_differ(tmp_path):
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
    assert sorted(path.name for path in out.iterdir()) == ["eval", "lookbook.json", "train"]
    monkeypatch.setattr(build, "draw_products", lambda *_: pytest.fail("drawn again"))
    capsys.readouterr()
    draw_lookbook(out, products=2, eval_products=1, size=32, workers=2)
    assert "already" in capsys.readouterr().out


def test_refusals(tmp_path):
    draw_lookbook(tmp_path / "lb", products=1, eval_products=1, size=32, workers=1)
    with pytest.raises(UserError, match=r"another lookbook \(products differ\)"):
        draw_lookbook(tmp_path / "lb", products=2, eval_products=1, size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        draw_lookbook(tmp_path / "mine", products=1)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="choose another output folder"):
            draw_lookbook(out, products=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    for path in (tmp_path / "lb" / "train").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="lost its shards"):
        draw_lookbook(tmp_path / "lb", products=1, eval_products=1, size=32)


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
def test_bad_numbers_are_refused_before_anything_is_written(tmp_path, flags):
    name = next(iter(flags)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name} must be between"):
        draw_lookbook(tmp_path / "lb", **flags)
    assert not list(tmp_path.iterdir())


def test_a_broken_run_leaves_nothing(tmp_path, monkeypatch):
    real = samples.draw_product

    def breaks(job, number):
        if number == 2:
            raise KeyboardInterrupt
        return real(job, number)

    monkeypatch.setattr(samples, "draw_product", breaks)
    with pytest.raises(KeyboardInterrupt):
        draw_lookbook(tmp_path / "lb", products=4, eval_products=1, size=32, workers=1)
    assert not list(tmp_path.iterdir())


def test_a_worker_that_dies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(samples.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended early"):
        list(samples.draw_products(samples.Job(0, "train", 20, 0, 32, 90), 2))


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "syncmask_fast.pack", "lookbook"]
    flags = ["--products", "2", "--eval-products", "1", "--size", "32", "--workers", "1"]
    done = subprocess.run([*command, str(tmp_path / "lb"), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 products" in done.stdout
    assert list((tmp_path / "lb" / "train").glob("*.tar"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["lookbook", "OUT", "--products", "0"], "error: --products must be between 1 and 10000000, not 0"),
        (["lookbook", "OUT", "--size", "16"], "error: --size must be between 32 and 1024, not 16"),
        (["lookbook", "OUT", "--size", "big"], "big"),
        (["lookbook"], "required"),
        (["wardrobe", "OUT"], "wardrobe"),
        ([], "lookbook"),
    ],
)
def test_mistakes_on_the_command_line_end_with_2(args, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pack.main([str(tmp_path / "lb") if arg == "OUT" else arg for arg in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert says.lower() in error.lower()
    assert "Traceback" not in error
    if error.startswith("error: "):
        assert error.count("\n") == 1
    assert not (tmp_path / "lb").exists()


def test_drawing_needs_no_torch():
    code = "import sys, syncmask_fast.sources.lookbook, syncmask_fast.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
