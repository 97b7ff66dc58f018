"""Search in a catalogue by words: `python -m syncmask_fast.search --model DIR --data PATH "red striped dress"`; the top matches as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from syncmask_fast.data.images import decode_image
from syncmask_fast.data.splits import Split, open_splits
from syncmask_fast.data.token_cache import TokenCache
from syncmask_fast.evaluate import evaluation_batches
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.report.contact_sheet import Cell, Segment, contact_sheet, save_sheet
from syncmask_fast.utils.device import choose_device
from syncmask_fast.utils.errors import UserError, run_command


@dataclass(frozen=True)
class Search:
    """Finds the products that a description fits best."""

    query: Annotated[str, tyro.conf.Positional]
    """What to look for, in words."""
    model: Path
    """Folder of a model: a run's `model`."""
    data: str
    """Folder of shards, or one with `train` and `eval` inside."""
    part: Literal["eval", "train"] = "eval"
    """Which products to search: the held-out ones, or those of the training."""
    top: int = 8
    """Products to show."""
    rerank: int = 0
    """How many of the best photos by ITC the ITM head puts in order anew. It needs a head that has learnt: that of `tiny` makes matches worse."""
    out: Path = Path("search.png")
    """The picture."""
    device: str = "auto"


@dataclass(frozen=True)
class Match:
    """A product and its best photo. sample: its number in the index; score: ITM's chance of a match, or the cosine where nothing was re-ranked."""

    sample: int
    score: float


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command = tyro.cli(Search, args=argv, prog="python -m syncmask_fast.search")
    if not command.query.strip():
        raise UserError('the query is empty: say what to look for, such as "red striped dress".')
    if command.top < 1 or command.rerank < 0:
        raise UserError(f"--top is {command.top} and --rerank {command.rerank}, but must be 1 or more and 0 or more.")
    model = SyncMaskModel.from_pretrained(command.model, choose_device(command.device))
    splits = dict(zip(("train", "eval"), open_splits(command.data, model.config.eval.holdout_fraction), strict=True))
    split = splits[command.part]
    if not len(split):
        raise UserError(f"{command.data} has no products in its {command.part} part: choose another --part.")
    matches = search(model, split, command.query, command.top, command.rerank)
    for place, match in enumerate(matches, 1):
        print(
            f"{place:2d}. {match.score:.3f}  product {split.index.product_ids[match.sample]}: {split.index.texts[match.sample]}"
        )
    cells = [match_cell(split, match, place) for place, match in enumerate(matches, 1)]
    sheet = contact_sheet(cells, columns=4, side=240, lines=5, heading=f"“{command.query}”")
    save_sheet(sheet, command.out, "--out")
    print(f"\npicture: {command.out}")


@torch.inference_mode()
def search(model: SyncMaskModel, split: Split, query: str, top: int, rerank: int = 0) -> list[Match]:
    """The best products for a query, each by its best photo, best first.

    rerank: how many of the best photos the ITM head judges; they then come before all others.
    """
    tokens = TokenCache.open(split.index.folder, model.tokenizer, split.index.texts, model.config.text.max_length)
    text = model.encode_text([query])[0]
    samples, scores = [], []
    for batch in evaluation_batches(split, tokens, model.config, model.device, split.samples):
        samples.append(batch.sample_ids_host)
        scores.append((model.encode_image(batch.pixels) @ text).cpu().numpy())
    if not samples:
        raise UserError(f"{split.index.folder} has no readable image to search.")
    found, score = np.concatenate(samples), np.concatenate(scores)
    order = np.argsort(-score, kind="stable")
    found, score = found[order], score[order]
    if rerank:
        judged = []
        for batch in evaluation_batches(split, tokens, model.config, model.device, found[:rerank]):
            judged += model.match(batch.pixels, [query] * len(batch)).tolist()
        again = np.argsort(-np.array(judged), kind="stable")
        found, score = (
            np.concatenate([found[:rerank][again], found[rerank:]]),
            np.concatenate([np.array(judged)[again], score[rerank:]]),
        )
    _, first = np.unique(split.index.product_ids[found], return_index=True)
    return [Match(int(found[i]), float(score[i])) for i in np.sort(first)[:top]]


def match_cell(split: Split, match: Match, place: int) -> Cell:
    """Return a match as a cell of a contact sheet: image, rank, score and the shop's text."""
    image, text = decode_image(split.index.image_bytes(match.sample)), split.index.texts[match.sample]
    return Cell(image, f"{place}.", f"{match.score:.2f}", [Segment(text)])


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
