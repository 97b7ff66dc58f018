"""Draws the lookbook into a folder of shards, once for every set of parameters."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from syncmask_fast.data.shard_writer import ShardSetWriter
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.data.triplets import TRIPLETS
from syncmask_fast.utils.device import cpu_cores
from syncmask_fast.utils.errors import UserError

from .samples import Job, draw_products
from .triplets import write_triplets

VERSION = 5  # of the drawings: raise it when the same parameters give other pictures, texts or boxes
PARAMETERS = "lookbook.json"
SAMPLES_PER_SHARD = 2000


@dataclass(frozen=True)
class Lookbook:
    """What a lookbook is made from: the same values give the same bytes."""

    products: int
    eval_products: int
    size: int
    seed: int
    quality: int
    version: int = VERSION


def draw_lookbook(
    out: Path,
    *,
    products: int = 2000,
    eval_products: int = 400,
    size: int = 96,
    seed: int = 0,
    workers: int | None = None,
    quality: int = 90,
) -> None:
    """Writes OUT/train/*.tar, OUT/eval/*.tar, their triplets and OUT/lookbook.json; what is there already stays as it is.

    products: number of train products, of 3 to 5 pictures each; eval_products: the same for eval, whose
              product ids follow those of train.
    size:     width and height of the pictures in pixels, 32 to 1024.
    seed:     other seeds give other products.
    workers:  drawing processes; None: one per usable core. The files are the same for any number.
    quality:  of the JPEGs, 1 to 100.
    errors:   UserError for a bad number, for an OUT that holds something else or another lookbook, or that
              cannot be written.
    Everything is written beside OUT and renamed at the end: a killed run leaves nothing that looks finished.
    """
    _check(products=products, eval_products=eval_products, size=size, seed=seed, workers=workers, quality=quality)
    out = Path(out)
    plan = Lookbook(products, eval_products, size, seed, quality)
    if _is_there(out, plan):
        _add_triplets(out)
        print(f"{out} already holds this lookbook", flush=True)
        return
    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        jobs = (
            Job(seed, "train", products, 0, size, quality),
            Job(seed, "eval", eval_products, products, size, quality),
        )
        _draw(jobs, aside, workers or cpu_cores())
        (aside / PARAMETERS).write_text(json.dumps(asdict(plan), indent=1) + "\n")
        if out.is_dir():
            out.rmdir()  # it is empty: _is_there has looked
        os.rename(aside, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror or error}); choose another output folder") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(**numbers: int | None) -> None:
    limits = dict(products=(1, 10**7), eval_products=(1, 10**7), size=(32, 1024), seed=(0, 2**63 - 1))
    limits |= dict(workers=(1, 1024), quality=(1, 100))
    for name, value in numbers.items():
        least, most = limits[name]
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} must be between {least} and {most}, not {value}")


def _is_there(out: Path, plan: Lookbook) -> bool:
    """Whether `out` holds exactly this lookbook; UserError if it holds anything else."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another output folder")
    if not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / PARAMETERS).read_text())
    except (OSError, ValueError):
        raise UserError(f"{out} is not empty and holds no lookbook; choose another output folder") from None
    if found != asdict(plan):
        wanted = asdict(plan)
        other = [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]
        names = ", ".join(other)
        raise UserError(f"{out} holds another lookbook ({names} differ); delete it or choose another output folder")
    for split in ("train", "eval"):
        if not list((out / split).glob("*.tar")):
            raise UserError(f"{out / split} has lost its shards; delete {out} and draw it again")
    return True


def _add_triplets(out: Path) -> None:
    """Gives a lookbook that was drawn before there were triplets its own."""
    for folder in (out / "train", out / "eval"):
        if not (folder / TRIPLETS).is_file():
            index = ShardIndex.open(folder)
            write_triplets(folder, ((index.key(i), index.record(i)) for i in range(len(index))))


def _draw(jobs: tuple[Job, ...], folder: Path, workers: int) -> None:
    total = sum(job.count for job in jobs)
    start, samples = time.monotonic(), 0
    terminal = sys.stdout.isatty()
    columns = (
        TextColumn("drawing the lookbook"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("products"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not terminal) as progress:
        task = progress.add_task("", total=total)
        for job in jobs:
            records = []
            with ShardSetWriter(folder / job.split, samples_per_shard=SAMPLES_PER_SHARD) as writer:
                for product in draw_products(job, workers):
                    for key, jpeg, record in product:
                        writer.write(key, jpeg, record)
                        records.append((key, record))
                    samples += len(product)
                    progress.advance(task)
            write_triplets(folder / job.split, records)
    print(f"drew the lookbook: {total} products, {samples} pictures, {time.monotonic() - start:.0f} s", flush=True)
