"""From any source to shards: on all cores, resumable, with a report of every row.

The source is cut into units of rows, and each unit becomes one shard, written by whichever worker is free. So a shard depends on the source
and the settings alone, not on the number of workers nor on where an earlier run was killed, and no picture goes from process to process.
Until all is done everything lies in OUT/.pack; then the shards are moved to their places and OUT/report.json is written: a folder with
shards is a finished one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from syncmask_fast.data.shard_writer import ShardWriter
from syncmask_fast.sources.base import Encoding, RowError, Source, Unit, share, validate_text
from syncmask_fast.utils.device import cpu_cores
from syncmask_fast.utils.errors import UserError

FORMAT = 1  # of the shards made from the same source: raise it when they come out otherwise
WORK = ".pack"
REPORT = "report.json"


@dataclass(frozen=True)
class Job:
    """One unit of a source and where its shard goes."""

    unit: Unit
    shard: Path  # in the work folder
    name: str  # in the output

    @property
    def tally(self) -> Path:
        """The file that says what became of the unit's rows. It is written last: where it is, the shard is whole."""
        return self.shard.with_suffix(".json")


def pack(
    source: Source,
    out: Path,
    *,
    encoding: Encoding,
    rows_per_shard: int = 2000,
    workers: int | None = None,
    allow_dropped: float = 0.01,
    flag: str,
) -> dict[str, Any]:
    """Packs a source into OUT, goes on where an earlier call stopped, and returns the report that it also writes to OUT/report.json.

    workers:       processes; None: one for each usable core. 1 works in this process.
    allow_dropped: share of the rows that may be left out; `flag` is its name for the user.
    errors:        UserError for a broken source, for an OUT with other contents, or where more rows than allowed had to be left out.
    """
    if rows_per_shard < 1:
        raise UserError(f"--rows-per-shard must be at least 1, not {rows_per_shard}")
    if workers is not None and not 1 <= workers <= 1024:
        raise UserError(f"--workers must be between 1 and 1024, not {workers}")
    if not 0 <= allow_dropped <= 1:
        raise UserError(f"{flag} is a share of the rows, so it must lie within 0 and 1, not {allow_dropped}")
    plan = {"format": FORMAT, "source": source.describe(), "rows per shard": rows_per_shard, "encoding": vars(encoding)}
    plan = json.loads(json.dumps(plan))
    done = _finished(out, plan)
    if done is not None:
        shutil.rmtree(out / WORK, ignore_errors=True)  # where the first run was killed at its very end
        print(f"{out} already holds this source", flush=True)
        _show(done, out)
        return done
    jobs = _jobs(source.units(rows_per_shard), out)
    begin = time.monotonic()
    with _work_folder(out, plan):
        for folder in {job.shard.parent for job in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
        waiting = [job for job in jobs if not job.tally.is_file()]
        if len(waiting) < len(jobs):
            print(f"going on: {len(jobs) - len(waiting)} of {len(jobs)} shards are there already", flush=True)
        _pack_all(source, encoding, waiting, sum(len(job.unit) for job in jobs), workers or cpu_cores())
        report = _report(plan, source, jobs)
        dropped, rows = report["dropped"]["rows"], report["rows"]
        if report["samples"] == 0 or dropped > allow_dropped * rows:
            _write_json(out / WORK / REPORT, report)
            raise UserError(_refusal(report, allow_dropped, flag, out))
        for job in jobs:
            if job.shard.is_file():
                (out / job.name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(job.shard, out / job.name)
        for name, content in source.companions().items():
            _write_json(out / name, content)
        _write_json(out / REPORT, report)
        shutil.rmtree(out / WORK)
    _show(report, out, (sum(len(job.unit) for job in waiting), time.monotonic() - begin))
    return report


def _jobs(units: list[Unit], out: Path) -> list[Job]:
    numbers: Counter[str] = Counter()
    jobs = []
    for unit in units:
        name = os.path.join(unit.folder, f"{numbers[unit.folder]:05d}.tar")
        numbers[unit.folder] += 1
        jobs.append(Job(unit, out / WORK / name, name))
    return jobs


# The folder


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a finished pack of the same plan. errors: UserError where OUT holds anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another output folder")
    report = _read_json(out / REPORT)
    if report is not None and "plan" in report:
        _same_plan(out, report["plan"], plan)
        return report
    if (out / WORK).is_dir():
        _same_plan(out, _read_json(out / WORK / "plan.json"), plan)
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not packed by this command; choose another output folder")
    return None


def _same_plan(out: Path, found: dict[str, Any] | None, plan: dict[str, Any]) -> None:
    if found is None or found == plan:  # none: it was killed before it had begun
        return
    ours, theirs = (
        {**p.get("source", {}), **p.get("encoding", {}), "rows per shard": p.get("rows per shard")}
        for p in (plan, found)
    )
    names = (
        ", ".join(sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)))
        or "version"
    )
    raise UserError(
        f"{out} was packed from another source or with other settings ({names}); delete it or choose another output folder"
    )


@contextlib.contextmanager
def _work_folder(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """OUT/.pack for this process alone."""
    work = out / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is packing into {out}; wait for it or choose another output folder"
                ) from None
            for partial in work.rglob(".*.partial"):
                partial.unlink()
            _write_json(work / "plan.json", plan)
            yield
    except OSError as error:
        raise UserError(
            f"{error.filename or out} cannot be written ({error.strerror or error}); choose another output folder"
        ) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write_json(path: Path, content: Any) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


# The work


def pack_unit(source: Source, encoding: Encoding, job: Job, advance: Callable[[], None]) -> None:
    """Makes the shard of one unit, then the tally of its rows; calls `advance` after each row."""
    dropped: list[dict[str, str]] = []
    products: set[int | str] = set()
    labels: dict[str, Counter[str]] = {"category": Counter(), "subcategory": Counter()}
    samples = alone = rows = image_bytes = 0
    with ShardWriter(job.shard) as shard:
        for row in source.read(job.unit):
            rows += 1
            try:
                if isinstance(row.image, RowError):
                    raise row.image
                validate_text(row.record["text"])
                image = encoding.stored(row.image)
            except RowError as why:
                dropped.append({"row": row.name, "reason": why.reason, "detail": why.detail})
            else:
                shard.write(row.key, image, row.record)
                samples += 1
                image_bytes += len(image)
                if "product_id" in row.record:
                    products.add(row.record["product_id"])
                else:
                    alone += 1
                for name, counter in labels.items():
                    if row.record.get(name):
                        counter[row.record[name]] += 1
            advance()
        if rows != len(job.unit):  # what is not counted would be lost without a word
            raise UserError(
                f"{source.describe()['source']} changed while it was packed: {rows} rows came instead of {len(job.unit)}; start again"
            )
    size = job.shard.stat().st_size if samples else 0
    found = {"rows": rows, "samples": samples, "alone": alone, "image bytes": image_bytes, "bytes": size}
    found |= {"products": sorted(products, key=str), **{name: dict(counter) for name, counter in labels.items()}}
    _write_json(job.tally, {**found, "dropped": dropped})


class _Stopped(Exception):
    """The main process wants its workers to end."""


_shared: Any = None  # in a worker: source, encoding, counter of rows, flag to stop at


def _start_worker(source: Source, encoding: Encoding, counter: Any, stop: Any) -> None:
    global _shared
    _shared = source, encoding, counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which tells the workers

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the main process was killed: what it started must not write on

    threading.Thread(target=follow, daemon=True).start()


def _pack_in_worker(job: Job) -> None:
    source, encoding, counter, stop = _shared

    def advance() -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += 1

    pack_unit(source, encoding, job, advance)


def _pack_all(source: Source, encoding: Encoding, jobs: list[Job], total: int, workers: int) -> None:
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TaskProgressColumn(show_speed=True),
    )
    columns += (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        before = total - sum(len(job.unit) for job in jobs)
        task = progress.add_task("", total=total, completed=before)
        if workers == 1 or len(jobs) <= 1:
            for job in jobs:
                pack_unit(source, encoding, job, lambda: progress.advance(task))
        else:
            for count in _in_processes(source, encoding, jobs, min(workers, len(jobs))):
                progress.update(task, completed=before + count)


def _in_processes(source: Source, encoding: Encoding, jobs: list[Job], workers: int) -> Iterator[int]:
    """Packs on `workers` processes; gives the number of rows done from time to time."""
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside threads
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (source, encoding, counter, stop)) as pool:
        try:
            running: set[Future] = {pool.submit(_pack_in_worker, job) for job in jobs}
            while running:
                done, running = wait(running, 0.2, FIRST_COMPLETED)
                for future in done:
                    future.result()
                yield counter.value
        except BrokenProcessPool:
            mend = "start the same command again, which goes on, with fewer --workers"
            raise UserError(
                f"a worker process was ended from outside, most often because memory ran out; {mend}"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


# The report


def _report(plan: dict[str, Any], source: Source, jobs: list[Job]) -> dict[str, Any]:
    tallies = [json.loads(job.tally.read_bytes()) for job in jobs]
    totals = {
        name: sum(tally[name] for tally in tallies) for name in ("rows", "samples", "alone", "image bytes", "bytes")
    }
    products = {str(product) for tally in tallies for product in tally["products"]}
    reasons: Counter[str] = Counter()
    labels: dict[str, Counter[str]] = {"category": Counter(), "subcategory": Counter()}
    for tally in tallies:
        reasons.update(item["reason"] for item in tally["dropped"])
        for name, counter in labels.items():
            counter.update(tally[name])
    return {
        "plan": plan,
        "rows": totals["rows"],
        "samples": totals["samples"],
        "products": len(products) + totals["alone"],
        "empty texts": reasons["the text is empty"],
        "shards": sum(tally["samples"] > 0 for tally in tallies),
        "bytes": totals["bytes"],
        "image bytes": totals["image bytes"],
        **{name: dict(counter.most_common()) for name, counter in labels.items()},
        **source.notes(),
        "dropped": {
            "rows": totals["rows"] - totals["samples"],
            "reasons": dict(reasons.most_common()),
            "list": [item for tally in tallies for item in tally["dropped"]],
        },
    }


def _refusal(report: dict[str, Any], allowed: float, flag: str, out: Path) -> str:
    dropped = report["dropped"]
    source, where = report["plan"]["source"]["source"], out / WORK / REPORT
    if not report["rows"]:
        return f"{source} has no rows, where at least one was expected"
    first = dropped["list"][0]
    detail = f" ({first['detail']})" if first["detail"] else ""
    mend = (
        f"mend them, or let them go with {flag} {share(dropped['rows'], report['rows'])}"
        if report["samples"]
        else "mend them"
    )
    return (
        f"{source}: {dropped['rows']:,} of {report['rows']:,} rows cannot be used, more than {flag} {allowed:g} lets go; "
        f"the first is {first['row']}: {first['reason']}{detail}; all are listed in {where}; {mend}"
    )


def _show(report: dict[str, Any], out: Path, work: tuple[int, float] | None = None) -> None:
    table = Table(title=str(out), show_header=False, title_justify="left")
    dropped = report["dropped"]
    categories = {name: len(report[name]) for name in ("category", "subcategory")}
    lines: list[tuple[str, Any]] = [
        (name, f"{report[name]:,}") for name in ("rows", "samples", "products", "empty texts", "shards")
    ]
    lines += [("categories", f"{categories['category']} and {categories['subcategory']} subcategories")]
    lines += [
        (
            "bytes",
            f"{report['bytes'] / 1e6:,.1f} MB, {report['image bytes'] / max(report['samples'], 1) / 1e3:.1f} kB a picture",
        )
    ]
    lines += [("dropped rows", f"{dropped['rows']:,}")]
    lines += [(f"  {reason}", f"{count:,}") for reason, count in dropped["reasons"].items()]
    if work:
        lines += [("time", f"{work[1]:.0f} s for {work[0]:,} rows: {work[0] / work[1]:,.0f} a second")]
    for name, value in lines:
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)
    print(f"all of it: {out / REPORT}", flush=True)
