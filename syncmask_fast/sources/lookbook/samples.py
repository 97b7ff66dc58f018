"""Products to samples: (key, JPEG, record) in product order, drawn by worker processes that share nothing.

A worker is a plain child process that writes its samples to a pipe.
Neither fork (unsafe beside the threads of a trainer) nor spawn (which imports the trainer's main module,
and with it torch, once more in every worker) would do.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from .catalogue import sample_product, stream
from .drawing import render
from .wording import describe, facts

CHUNK = 8  # products that a worker draws in a row
_HEADER = struct.Struct("<III")
_AHEAD = 4  # chunks that a worker may be ahead of the writer


@dataclass(frozen=True)
class Job:
    """`count` products of a split; product number i gets the id `first_id` + i."""

    seed: int
    split: str
    count: int
    first_id: int
    size: int
    quality: int


Sample = tuple[str, bytes, dict[str, Any]]


def draw_product(job: Job, number: int) -> list[Sample]:
    """All samples of one product: a pure function of its arguments."""
    product = sample_product(job.seed, job.split, number)
    text, mentions = describe(product, stream(job.seed, job.split, number, "text"))
    samples: list[Sample] = []
    for index, name in enumerate(product.views):
        view = render(product, index, job.size, job.seed, job.split)
        attributes = [
            dict(name=m.name, value=m.value, span=[m.start, m.end], box=_rounded(view.boxes[m.name])) for m in mentions
        ]
        record = dict(
            product_id=job.first_id + number,
            text=text,
            category=product.category,
            subcategory=product.subcategory,
            view=name,
            attributes=attributes,
            facts=facts(product),
        )
        if product.sibling_of is not None:
            record["sibling_of"] = job.first_id + product.sibling_of
        buffer = BytesIO()
        view.image.save(buffer, "JPEG", quality=job.quality, subsampling=0)
        samples.append((f"{job.first_id + number:07d}_{index}_{name}", buffer.getvalue(), record))
    return samples


def _rounded(box: list[float] | None) -> list[float] | None:
    return None if box is None else [round(value, 2) for value in box]


def draw_products(job: Job, workers: int) -> Iterator[list[Sample]]:
    """The samples of each product in turn. The same for any number of workers; 1 draws in this process."""
    if workers <= 1 or job.count <= CHUNK:
        for number in range(job.count):
            yield draw_product(job, number)
        return
    workers = min(workers, -(-job.count // CHUNK))
    pool = [_Worker(job, index, workers) for index in range(workers)]
    try:
        for number in range(job.count):
            yield pool[number // CHUNK % workers].next_product()
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A child process that draws every `of`-th chunk, and a thread that reads what it writes a little
    ahead."""

    def __init__(self, job: Job, index: int, of: int) -> None:
        root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [
            sys.executable,
            "-c",
            f"import {__name__} as samples; samples.work()",
            json.dumps(asdict(job)),
            str(index),
            str(of),
        ]
        self._process = subprocess.Popen(  # noqa: S603 (this module itself)
            command,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._products: queue.Queue[list[Sample] | None] = queue.Queue(_AHEAD * CHUNK)
        self._stopped = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None  # noqa: S101 (for type checkers)
        while not self._stopped:
            product = _read_product(pipe)
            self._products.put(product)
            if product is None:
                return

    def next_product(self) -> list[Sample]:
        product = self._products.get()
        if product is None:
            raise RuntimeError(f"a process that draws the lookbook ended early (exit code {self._process.wait()})")
        return product

    def stop(self) -> None:
        self._stopped = True
        if self._process.poll() is None:
            self._process.terminate()
        while True:  # let the reader out of a full queue
            try:
                self._products.get_nowait()
            except queue.Empty:
                break
        self._process.wait()


def _read_product(pipe: BinaryIO) -> list[Sample] | None:
    start = pipe.read(4)
    if len(start) < 4:
        return None
    samples: list[Sample] = []
    for _ in range(struct.unpack("<I", start)[0]):
        header = pipe.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        sizes = _HEADER.unpack(header)
        key, record, jpeg = (pipe.read(size) for size in sizes)
        if len(jpeg) < sizes[2]:
            return None
        samples.append((key.decode(), jpeg, json.loads(record)))
    return samples


def work() -> None:
    """A worker: draws every `of`-th chunk of the job in its arguments (job, index, of) to its standard
    output."""
    job, index, of = Job(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    pipe = sys.stdout.buffer
    gc.freeze()  # what is loaded stays
    gc.set_threshold(20_000)
    try:
        for number in range(job.count):
            if number // CHUNK % of == index:
                samples = draw_product(job, number)
                pipe.write(struct.pack("<I", len(samples)))
                for key, jpeg, record in samples:
                    parts = (key.encode(), json.dumps(record).encode(), jpeg)
                    pipe.write(_HEADER.pack(*(len(part) for part in parts)) + b"".join(parts))
                pipe.flush()
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # whoever reads is gone: no traceback
