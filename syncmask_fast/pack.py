"""`python -m syncmask_fast.pack SOURCE ...`: pack a source of images and texts into shards, or inspect shards.

Run the same command again to resume after a kill. OUT/report.json has the fate of every row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from syncmask_fast.sources.base import Encoding
from syncmask_fast.sources.fashiongen import FashionGen
from syncmask_fast.sources.fashioniq import FashionIQ
from syncmask_fast.sources.inspect import draw_samples, inspect_shards
from syncmask_fast.sources.lookbook import draw_lookbook
from syncmask_fast.sources.packing import pack
from syncmask_fast.sources.table import TableSource
from syncmask_fast.utils.errors import run_command

Input = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="Output folder.")]
Data = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
Seed = Annotated[int, tyro.conf.arg(help="Another seed gives other products, or chooses other samples.")]
Quality = Annotated[int, tyro.conf.arg(help="JPEG quality of images that are not stored unchanged, 1 to 100.")]
Size = Annotated[int | None, tyro.conf.arg(help="Shorter side that larger images are reduced to, 16 to 8000.")]
Workers = Annotated[int | None, tyro.conf.arg(help="Worker processes. Default: one per core.")]
RowsPerShard = Annotated[int, tyro.conf.arg(help="Rows of the source in one shard.")]
AllowDropped = Annotated[float, tyro.conf.arg(help="Fraction of rows that may lack a text or a usable image, 0 to 1.")]


def lookbook(
    out: Out,
    products: int = 2000,
    eval_products: int = 400,
    size: int = 96,
    seed: Seed = 0,
    workers: Workers = None,
    quality: Quality = 90,
) -> None:
    """Draw the lookbook: fashion products in several views, with the place of every word in every image.

    Args:
        products: Train products, each with 3 to 5 images.
        eval_products: Eval products.
        size: Width and height of the images, 32 to 1024 pixels.
    """
    draw_lookbook(out, products, eval_products, size, seed, quality, workers)


def fashiongen(
    source: Input,
    out: Out,
    text: tuple[str, ...] = ("name", "description"),
    quality: Quality = 90,
    workers: Workers = None,
    rows_per_shard: RowsPerShard = 2000,
    allow_dropped: AllowDropped = 0.01,
) -> None:
    """Pack one file of FashionGen: fashiongen_256_256_train.h5 into DIR/train, ..._validation.h5 into DIR/eval.

    Args:
        source: The HDF5 file.
        text: Fields of the text, in this order: name, description, composition, brand, category, ...
    """
    pack(FashionGen(source, text), out, Encoding(quality), rows_per_shard, workers, allow_dropped)


def fashioniq(
    source: Input,
    out: Out,
    images: Path | None = None,
    allow_missing: float = 0.0,
    size: Size = None,
    quality: Quality = 90,
    workers: Workers = None,
    rows_per_shard: RowsPerShard = 2000,
) -> None:
    """Pack FashionIQ into OUT/train and OUT/eval (its validation split), with triplets for composed retrieval.

    Args:
        source: Folder with captions/ and image_splits/.
        images: Folder of the images, ASIN.jpg or ASIN.png. Default: SOURCE/images.
        allow_missing: Fraction of the images that may be missing or damaged. 0 to 1.
    """
    data = FashionIQ(source, images)
    data.refuse_missing(allow_missing)
    pack(data, out, Encoding(quality, size), rows_per_shard, workers, allow_missing, "--allow-missing")


def table(
    source: Input,
    out: Out,
    image: str | None = None,
    text: str | None = None,
    product: str | None = None,
    images: Path | None = None,
    size: Size = None,
    quality: Quality = 90,
    workers: Workers = None,
    rows_per_shard: RowsPerShard = 2000,
    allow_dropped: AllowDropped = 0.01,
) -> None:
    """Pack a table: CSV, TSV, JSONL, Parquet, or a folder of Parquet files, also in Hugging Face's layout.

    Args:
        source: The file, or a folder of .parquet files.
        image: Column of images: paths, bytes, or Hugging Face's struct of both. Default: the first usual name.
        text: Column of texts. Default: the first usual name.
        product: Column of product ids. Default: product_id if it exists, else each row is its own product.
        images: Folder that paths start from and may not leave. Default: the table's folder.
    """
    data = TableSource(source, image, text, product, images)
    pack(data, out, Encoding(quality, size), rows_per_shard, workers, allow_dropped)


def inspect(data: Data, sheet: Path = Path("contact_sheet.jpg"), samples: int = 24, seed: Seed = 0) -> None:
    """Inspect shards from any source: print a table of their contents and write a contact sheet.

    Args:
        data: Folder of shards, or one with train and eval inside, or its address.
        sheet: The contact sheet to write.
        samples: Samples on it, 1 to 1000.
    """
    from syncmask_fast.report.contact_sheet import samples_sheet, save_sheet  # here: workers need no fonts

    save_sheet(samples_sheet(draw_samples(inspect_shards(data), samples, seed)), sheet, "--sheet")
    print(f"contact sheet: {sheet}")


COMMANDS = {"lookbook": lookbook, "fashiongen": fashiongen, "fashioniq": fashioniq, "table": table, "inspect": inspect}


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    prog = "python -m syncmask_fast.pack"
    run_command(lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=prog, description=__doc__, args=args))


if __name__ == "__main__":
    main()
