"""Search a catalogue in words: `python -m syncmask_fast.search --model DIR --data PATH "red striped dress"`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from syncmask_fast.data.images import decode_image
from syncmask_fast.data.splits import Split, open_splits
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.report.contact_sheet import Cell, Segment, contact_sheet, save_sheet
from syncmask_fast.tasks.retrieval import Match, search_products
from syncmask_fast.utils.device import choose_device
from syncmask_fast.utils.errors import UserError, run_command


@dataclass(frozen=True)
class Search:
    """Find the products that fit a description best: a list, and an image of the top matches."""

    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """What to look for, in words."""
    model: Path
    """Model folder: a run's `model`."""
    data: str
    """Folder or address of shards, or of `train` and `eval` folders."""
    split: Literal["eval", "train"] = "eval"
    """Which products to search: held-out ones (`eval`) or training ones (`train`)."""
    top: int = 8
    """Number of products to show."""
    rerank: int = 0
    """Re-rank the top K images with the ITM head. 0 disables re-ranking. `tiny` has a weak ITM head: leave it at 0."""
    out: Path = Path("search.png")
    """Image file for the matches, .png or .jpg."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`. `auto` uses CUDA if there is a CUDA device."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    command = tyro.cli(Search, args=argv, prog="python -m syncmask_fast.search")
    if not command.query.strip():
        raise UserError('The query is empty. Say what to look for, such as "red striped dress".')
    if command.top < 1:
        raise UserError(f"--top {command.top} is too small. Give 1 or more.")
    if command.rerank < 0:
        raise UserError(f"--rerank {command.rerank} is negative. Give 0 or more.")
    model = SyncMaskModel.from_pretrained(command.model, choose_device(command.device))
    train_split, eval_split = open_splits(command.data, model.config.eval.holdout_fraction)
    split = train_split if command.split == "train" else eval_split
    if not len(split):
        raise UserError(f"{command.data} has no products in its {command.split} split. Choose the other --split.")
    matches = search_products(model, split, command.query, command.top, command.rerank)
    cells = []
    for place, match in enumerate(matches, 1):
        product, text = split.index.product_ids[match.sample_id], split.index.texts[match.sample_id]
        print(f"{place:2d}. {match.score:.3f}  product {product}: {text}")
        cells.append(_match_cell(split, match, place))
    sheet = contact_sheet(cells, columns=4, side=240, lines=5, heading=f"“{command.query}”")
    save_sheet(sheet, command.out, "--out")
    print(f"\nimage: {command.out}")


def _match_cell(split: Split, match: Match, place: int) -> Cell:
    """Return a match as a cell of a contact sheet: image, rank, score and the shop's text."""
    image, text = decode_image(split.index.image_bytes(match.sample_id)), split.index.texts[match.sample_id]
    return Cell(image, f"{place}.", f"{match.score:.2f}", [Segment(text)])


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
