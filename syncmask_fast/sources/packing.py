"""From any source to shards: on all cores, resumable, with a report of every row.

The source is divided into shards, and each shard is written by whichever worker is free. So a shard depends only on
the source and the settings, not on the number of workers nor on a kill, and no image moves between processes. Until
all shards are written, everything is in OUT/.pack. Then they move to their places, and OUT/report.json is written last.
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

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table

from syncmask_fast.data.shard_writer import ShardWriter
from syncmask_fast.sources.base import Encoding, RowError, ShardSpec, Source, round_up_fraction, validate_text
from syncmask_fast.utils.device import cpu_cores
from syncmask_fast.utils.errors import UserError
from syncmask_fast.utils.files import write_json

FORMAT = 2  # of the shards made from the same source: raise it when they come out otherwise
WORK, REPORT, SETTINGS = ".pack", "report.json", "settings.json"
LABELS = ("category", "subcategory")
COUNTS = ("rows", "samples", "without product", "image bytes", "bytes")


@dataclass(frozen=True)
class Job:
    """One shard of a source and where it goes."""

    spec: ShardSpec
    shard: Path  # in the work folder
    name: str  # in the output

    @property
    def shard_report(self) -> Path:
        """The file that counts the shard's rows. It is written last: if it exists, the shard is complete."""
        return self.shard.with_suffix(".json")


def pack(
    source: Source,
    out: Path,
    encoding: Encoding,
    rows_per_shard: int = 2000,
    workers: int | None = None,
    allow_dropped: float = 0.01,
    flag: str = "--allow-dropped",
) -> dict[str, Any]:
    """Pack a source into OUT, resume an earlier call, and return the report, which is also OUT/report.json.

    workers:       processes; None: one for each usable core. 1 works in this process.
    allow_dropped: fraction of the rows that may be dropped; `flag` is its name for the user.
    errors:        UserError for a broken source, for an OUT with other contents, or for too many dropped rows.
    """
    # 1. Check the settings
    if rows_per_shard < 1:
        raise UserError(f"--rows-per-shard {rows_per_shard} is out of range. Give at least 1.")
    if workers is not None and not 1 <= workers <= 1024:
        raise UserError(f"--workers {workers} is out of range. Give a number from 1 to 1024.")
    if not 0 <= allow_dropped <= 1:
        raise UserError(f"{flag} {allow_dropped} is out of range. Give a fraction of the rows from 0 to 1.")
    settings = {"format": FORMAT, "source": source.describe(), "rows per shard": rows_per_shard}
    settings = json.loads(json.dumps({**settings, "encoding": vars(encoding)}))  # as it reads back from JSON

    # 2. Stop here if OUT is complete
    report = _finished(out, settings)
    if report is not None:
        shutil.rmtree(out / WORK, ignore_errors=True)  # if the first run was killed at its very end
        print(f"{out} is already complete.", flush=True)
        _print_report(report, out)
        return report

    # 3. Write the shards that are missing
    jobs = _jobs(source.shards(rows_per_shard), out)
    begin = time.monotonic()
    with _work_folder(out, settings):
        for folder in {job.shard.parent for job in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
        missing = [job for job in jobs if not job.shard_report.is_file()]
        if len(missing) < len(jobs):
            print(f"resuming: {len(jobs) - len(missing)} of {len(jobs)} shards are done", flush=True)
        _pack_all(source, encoding, missing, sum(len(job.spec) for job in jobs), workers or cpu_cores())
        report = _report(settings, source, jobs)
        if report["samples"] == 0 or report["dropped"]["rows"] > allow_dropped * report["rows"]:
            write_json(out / WORK / REPORT, report)
            raise UserError(_too_many_dropped(report, allow_dropped, flag, out))

        # 4. Move them to OUT; report.json is written last, as the mark that all is there
        for job in jobs:
            if job.shard.is_file():
                (out / job.name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(job.shard, out / job.name)
        for name, content in source.extra_files(out).items():
            write_json(out / name, content)
        write_json(out / REPORT, report)
        shutil.rmtree(out / WORK)
    _print_report(report, out, (sum(len(job.spec) for job in missing), time.monotonic() - begin))
    return report


def _jobs(specs: list[ShardSpec], out: Path) -> list[Job]:
    numbers: Counter[str] = Counter()
    jobs = []
    for spec in specs:
        name = os.path.join(spec.folder, f"{numbers[spec.folder]:05d}.tar")
        numbers[spec.folder] += 1
        jobs.append(Job(spec, out / WORK / name, name))
    return jobs


# The folder


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the report of a complete OUT with the same settings. errors: UserError if OUT holds anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"{out} is a file. Choose another output folder.")
    report = _read_json(out / REPORT)
    if report is not None and "settings" in report:
        _check_settings(out, report["settings"], settings)
        return report
    if (out / WORK).is_dir():
        _check_settings(out, _read_json(out / WORK / SETTINGS), settings)
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not made by this command. Choose another output folder.")
    return None


def _check_settings(out: Path, found: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    if found is None or found == settings:  # None: killed before it had begun
        return
    ours, theirs = (
        {**s.get("source", {}), **s.get("encoding", {}), "rows per shard": s.get("rows per shard")}
        for s in (settings, found)
    )
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    raise UserError(
        f"{out} was made from another source or with other settings ({', '.join(names) or 'version'}). "
        "Delete it or choose another output folder."
    )


@contextlib.contextmanager
def _work_folder(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Lock OUT/.pack for this process."""
    work = out / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{out} is in use by another packing process. Wait for it or choose another output folder."
                ) from None
            for partial in work.rglob(".*.partial"):
                partial.unlink()
            write_json(work / SETTINGS, settings)
            yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{error.filename or out} cannot be written ({reason}). Choose another output folder."
        ) from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# The work


def pack_shard(source: Source, encoding: Encoding, job: Job, advance: Callable[[], None]) -> None:
    """Write one shard, then the report of its rows. Calls `advance` after each row."""
    dropped: list[dict[str, str]] = []
    products: set[int | str] = set()
    labels: dict[str, Counter[str]] = {name: Counter() for name in LABELS}
    counts = Counter(dict.fromkeys(COUNTS, 0))
    with ShardWriter(job.shard) as shard:
        for row in source.read(job.spec):
            try:
                if isinstance(row.image, RowError):
                    raise row.image
                validate_text(row.record["text"])
                image = encoding.encode(row.image)
            except RowError as why:
                dropped.append({"row": row.name, "reason": why.reason, "detail": why.detail})
            else:
                shard.write(row.key, image, row.record)
                counts["samples"] += 1
                counts["image bytes"] += len(image)
                if "product_id" in row.record:
                    products.add(row.record["product_id"])
                else:
                    counts["without product"] += 1
                for name, counter in labels.items():
                    if row.record.get(name):
                        counter[row.record[name]] += 1
            if not row.continues:
                counts["rows"] += 1
                advance()
        if counts["rows"] != len(job.spec):  # rows that are not counted would be lost silently
            name = source.describe()["source"]
            raise UserError(
                f"{name} changed while it was packed ({counts['rows']} rows, not {len(job.spec)}). Start again."
            )
    counts["bytes"] = job.shard.stat().st_size if counts["samples"] else 0
    write_json(job.shard_report, {**counts, **labels, "products": sorted(products, key=str), "dropped": dropped})


class _Stopped(Exception):
    """The main process wants its workers to end."""


_shared: Any = None  # in a worker: source, encoding, counter of rows, flag to stop at


def _start_worker(source: Source, encoding: Encoding, counter: Any, stop: Any) -> None:
    global _shared
    _shared = source, encoding, counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process, which tells the workers

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the main process was killed: its workers must not write on

    threading.Thread(target=follow, daemon=True).start()


def _pack_in_worker(job: Job) -> None:
    source, encoding, counter, stop = _shared

    def advance() -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += 1

    pack_shard(source, encoding, job, advance)


def _pack_all(source: Source, encoding: Encoding, jobs: list[Job], total: int, workers: int) -> None:
    columns = (
        *("packing", rich_progress.BarColumn(), rich_progress.MofNCompleteColumn(), "rows"),
        *(rich_progress.TaskProgressColumn(show_speed=True), rich_progress.TimeElapsedColumn()),
        *("left", rich_progress.TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    with rich_progress.Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        before = total - sum(len(job.spec) for job in jobs)
        task = progress.add_task("", total=total, completed=before)
        if workers == 1 or len(jobs) <= 1:
            for job in jobs:
                pack_shard(source, encoding, job, lambda: progress.advance(task))
        else:
            for count in _in_processes(source, encoding, jobs, min(workers, len(jobs))):
                progress.update(task, completed=before + count)


def _in_processes(source: Source, encoding: Encoding, jobs: list[Job], workers: int) -> Iterator[int]:
    """Pack on `workers` processes, and yield the number of finished rows from time to time."""
    context = multiprocessing.get_context("spawn")  # fork is unsafe next to threads
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
            raise UserError(
                "A worker process was killed, probably out of memory. "
                "Run the same command with fewer --workers; it resumes."
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


# The report


def _report(settings: dict[str, Any], source: Source, jobs: list[Job]) -> dict[str, Any]:
    shards = [json.loads(job.shard_report.read_bytes()) for job in jobs]
    totals = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    products = {str(product) for shard in shards for product in shard["products"]}
    dropped = [item for shard in shards for item in shard["dropped"]]
    reasons = Counter(item["reason"] for item in dropped)
    labels = {name: sum((Counter(shard[name]) for shard in shards), Counter()) for name in LABELS}
    return {
        "settings": settings,
        "rows": totals["rows"],
        "samples": totals["samples"],
        "products": len(products) + totals["without product"],
        "empty texts": reasons["the text is empty"],
        "shards": sum(shard["samples"] > 0 for shard in shards),
        "bytes": totals["bytes"],
        "image bytes": totals["image bytes"],
        **{name: dict(counter.most_common()) for name, counter in labels.items()},
        **source.report_fields(),
        "dropped": {"rows": len(dropped), "reasons": dict(reasons.most_common()), "list": dropped},
    }


def _too_many_dropped(report: dict[str, Any], allowed: float, flag: str, out: Path) -> str:
    source, dropped = report["settings"]["source"]["source"], report["dropped"]
    if not report["rows"]:
        return f"{source} has no rows. Give a source with at least one."
    first = dropped["list"][0]
    detail = f" ({first['detail']})" if first["detail"] else ""
    drop = f", or drop them with {flag} {round_up_fraction(dropped['rows'], report['rows'])}"
    return (
        f"{source}: {dropped['rows']:,} of {report['rows']:,} rows cannot be used, more than {flag} {allowed:g}. "
        f"The first is {first['row']}: {first['reason']}{detail}. {out / WORK / REPORT} lists all. "
        f"Correct them{drop if report['samples'] else ''}."
    )


def _print_report(report: dict[str, Any], out: Path, work: tuple[int, float] | None = None) -> None:
    dropped, categories = report["dropped"], {name: len(report[name]) for name in LABELS}
    lines = [(name, f"{report[name]:,}") for name in ("rows", "samples", "products", "empty texts", "shards")]
    lines += [("categories", f"{categories['category']} and {categories['subcategory']} subcategories")]
    per_image = report["image bytes"] / max(report["samples"], 1) / 1e3
    lines += [("bytes", f"{report['bytes'] / 1e6:,.1f} MB, {per_image:.1f} kB an image")]
    lines += [("dropped rows", f"{dropped['rows']:,}")]
    lines += [(f"  {reason}", f"{count:,}") for reason, count in dropped["reasons"].items()]
    if work:
        lines += [("time", f"{work[1]:.0f} s for {work[0]:,} rows: {work[0] / work[1]:,.0f} a second")]
    table = Table(title=str(out), show_header=False, title_justify="left")
    for name, value in lines:
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)
    print(f"full report: {out / REPORT}", flush=True)
