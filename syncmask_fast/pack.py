"""`python -m syncmask_fast.pack SOURCE ...`: turns a source of pictures and texts into shards; `show` looks at shards.

Every source is one function; its parameters are the flags. A killed pack goes on when the same command is given again. OUT gets its shards
when all of them are there, and report.json with what became of every row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from syncmask_fast.utils.errors import run_command

Argument = Annotated[Path, tyro.conf.Positional]


def lookbook(
    out: Argument,
    products: int = 2000,
    eval_products: int = 400,
    size: int = 96,
    seed: int = 0,
    workers: int | None = None,
    quality: int = 90,
) -> None:
    """Draws the lookbook: fashion products in several views, with the place of every word in every picture.

    Args:
        out: Folder to make: it gets train/*.tar, eval/*.tar and lookbook.json.
        products: Products of the train split, of 3 to 5 pictures each.
        eval_products: Products of the eval split.
        size: Width and height of the pictures in pixels.
        seed: Other seeds give other products.
        workers: Drawing processes; default: one per core.
        quality: JPEG quality, 1 to 100.
    """
    from syncmask_fast.sources.lookbook import draw_lookbook

    draw_lookbook(
        out, products=products, eval_products=eval_products, size=size, seed=seed, workers=workers, quality=quality
    )


def fashiongen(
    source: Argument,
    out: Argument,
    text: tuple[str, ...] = ("name", "description"),
    quality: int = 90,
    workers: int | None = None,
    rows_per_shard: int = 2000,
    allow_dropped: float = 0.01,
) -> None:
    """Packs FashionGen: once for fashiongen_256_256_train.h5 into DIR/train, once for ..._validation.h5 into DIR/eval.

    Args:
        source: The HDF5 file.
        out: Folder to make.
        text: Fields that make up a text, in this order: name, description, composition, brand, category, ...
        quality: JPEG quality, 1 to 100.
        workers: Processes; default: one per core.
        rows_per_shard: Rows of the source that go into one shard.
        allow_dropped: Share of the rows that may be left out, such as those with an empty text.
    """
    from syncmask_fast.sources.base import Encoding
    from syncmask_fast.sources.fashiongen import FashionGen
    from syncmask_fast.sources.packing import pack

    pack(
        FashionGen(source, text),
        out,
        encoding=Encoding(quality),
        rows_per_shard=rows_per_shard,
        workers=workers,
        allow_dropped=allow_dropped,
        flag="--allow-dropped",
    )


def fashioniq(
    source: Argument,
    out: Argument,
    images: Path | None = None,
    allow_missing: float = 0.0,
    size: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    rows_per_shard: int = 2000,
) -> None:
    """Packs FashionIQ into OUT/train and OUT/eval (its validation split), each with triplets.json and galleries.json for composed retrieval.

    Args:
        source: Folder with captions/ and image_splits/.
        out: Folder to make.
        images: Folder of the pictures, ASIN.jpg or ASIN.png; default: SOURCE/images.
        allow_missing: Share of the pictures that may be missing or damaged.
        size: Shorter side in pixels that larger pictures are reduced to; default: pictures are stored as they are.
        quality: JPEG quality of reduced pictures, 1 to 100.
        workers: Processes; default: one per core.
        rows_per_shard: Pictures that go into one shard.
    """
    from syncmask_fast.sources.base import Encoding
    from syncmask_fast.sources.fashioniq import FashionIQ
    from syncmask_fast.sources.packing import pack

    data = FashionIQ(source, images)
    data.refuse_missing(allow_missing)
    pack(
        data,
        out,
        encoding=Encoding(quality, size),
        rows_per_shard=rows_per_shard,
        workers=workers,
        allow_dropped=allow_missing,
        flag="--allow-missing",
    )


def table(
    source: Argument,
    out: Argument,
    image: str | None = None,
    text: str | None = None,
    product: str | None = None,
    images: Path | None = None,
    size: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    rows_per_shard: int = 2000,
    allow_dropped: float = 0.01,
) -> None:
    """Packs a table: CSV, TSV, JSONL, Parquet, or a folder of Parquet files; Hugging Face's layout too.

    Args:
        source: The file, or a folder of .parquet files.
        out: Folder to make.
        image: Column of pictures: paths, bytes, or Hugging Face's struct of both; default: the first of the usual names.
        text: Column of texts; default: the first of the usual names.
        product: Column of product ids; default: product_id where there is one, else each row is a product of its own.
        images: Folder that paths start from, and may not lead out of; default: the table's.
        size: Shorter side in pixels that larger pictures are reduced to; default: pictures are stored as they are.
        quality: JPEG quality of reduced pictures, 1 to 100.
        workers: Processes; default: one per core.
        rows_per_shard: Rows of the table that go into one shard.
        allow_dropped: Share of the rows that may be left out: no text, no picture, a damaged one.
    """
    from syncmask_fast.sources.base import Encoding
    from syncmask_fast.sources.packing import pack
    from syncmask_fast.sources.table import TableSource

    pack(
        TableSource(source, image, text, product, images),
        out,
        encoding=Encoding(quality, size),
        rows_per_shard=rows_per_shard,
        workers=workers,
        allow_dropped=allow_dropped,
        flag="--allow-dropped",
    )


def show(
    data: Annotated[str, tyro.conf.Positional],
    picture: Path = Path("contact_sheet.jpg"),
    samples: int = 24,
    seed: int = 0,
) -> None:
    """Looks at shards, anyone's: a table of what is in them, and a contact sheet.

    Args:
        data: Folder of shards, or one with train and eval inside, or its address.
        picture: The contact sheet to write.
        samples: Samples on it.
        seed: Other seeds choose other samples.
    """
    from syncmask_fast.report.contact_sheet import Cell, Segment, contact_sheet, frames, marked, save_sheet
    from syncmask_fast.sources.inspect import draw_samples, inspect_shards

    cells = []
    for found in draw_samples(inspect_shards(data), samples, seed):
        if found.image is None:
            cells.append(Cell(None, found.title, text=[Segment(found.problem)]))
            continue
        height, width = found.image.shape[:2]
        boxes = [(item["name"], item["box"]) for item in found.attributes if item.get("box")]
        outlines = frames(boxes, width, height)
        cells.append(Cell(found.image, found.title, text=marked(found.text, found.attributes), frames=outlines))
    save_sheet(contact_sheet(cells, columns=8), picture, "--picture")
    print(f"contact sheet: {picture}")


COMMANDS = {"lookbook": lookbook, "fashiongen": fashiongen, "fashioniq": fashioniq, "table": table, "show": show}


def main(args: list[str] | None = None) -> None:
    """The command line."""
    run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="syncmask_fast.pack", description=__doc__, args=args
        )
    )


if __name__ == "__main__":
    main()
