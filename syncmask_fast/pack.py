"""`python -m syncmask_fast.pack SOURCE ...`: turns a source of pictures and texts into shards.

Every source is one function; its parameters are the flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from syncmask_fast.data.lookbook import draw_lookbook
from syncmask_fast.errors import run_command


def lookbook(
    out: Annotated[Path, tyro.conf.Positional],
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
    draw_lookbook(
        out,
        products=products,
        eval_products=eval_products,
        size=size,
        seed=seed,
        workers=workers,
        quality=quality,
    )


SOURCES = {"lookbook": lookbook}


def main(args: list[str] | None = None) -> None:
    run_command(
        lambda: tyro.extras.subcommand_cli_from_dict(
            SOURCES, prog="syncmask_fast.pack", description=__doc__, args=args
        )
    )


if __name__ == "__main__":
    main()
