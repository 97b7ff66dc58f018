"""`pack fashiongen` against JPEG encoding by itself: rows per second, ratio to the encoding rate, peak memory.

    python -m bench.pack_fashiongen [--rows 20000] [--workers N] [--file FILE.h5] [--compression gzip]

Writes a file in FashionGen's layout (256 px; smooth images with noise, about 20 kB as JPEG) and packs it. Then as many
processes encode the same images from memory. The row goes to bench/results/pack_fashiongen.csv, or to $OUT.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np

from syncmask_fast.sources.base import Encoding

ROOT = Path(__file__).resolve().parents[1]
SIZE, POOL = 256, 64
TEXTS = {
    "name": 100,
    "description": 400,
    "category": 30,
    "subcategory": 40,
    "pose": 12,
    "brand": 40,
    "gender": 6,
    "season": 6,
}  # bytes


def product_images(count: int, seed: int = 0) -> np.ndarray:
    """Return uint8 [count, 256, 256, 3]: smooth colors on white with the grain of a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 16, 16, 3)).astype(np.float32)
    smooth = coarse.repeat(SIZE // 16, 1).repeat(SIZE // 16, 2)
    for axis in (1, 2):
        smooth = sum(np.roll(smooth, shift, axis) for shift in range(-8, 9)) / 17
    smooth[:, :, : SIZE // 5] = smooth[:, :, -SIZE // 5 :] = 250
    return (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def write_file(path: Path, rows: int, compression: str | None = None, seed: int = 0) -> None:
    """Write a file in the layout of fashiongen_256_256_train.h5."""
    rng = np.random.default_rng(seed)
    pool = product_images(POOL, seed)
    with h5py.File(path, "w") as file:
        chunks = (1, SIZE, SIZE, 3) if compression else None
        images = file.create_dataset(
            "input_image", (rows, SIZE, SIZE, 3), np.uint8, chunks=chunks, compression=compression
        )
        for start in range(0, rows, POOL):
            images[start : start + POOL] = np.roll(pool, start // POOL * 7, 2)[: min(POOL, rows - start)]
        words = ["SLIM", "COTTON", "navy", "trousers", "with", "zip", "pocket<br>", "tonal", "stitching"]
        words += ["crewneck", "&amp;", "caf\xe9"]
        for name, width in TEXTS.items():
            data = file.create_dataset(f"input_{name}", (rows, 1), f"S{width}")
            texts = [" ".join(rng.choice(words, max(1, width // 9)))[:width].encode("iso-8859-1") for _ in range(997)]
            data[:, 0] = np.array([texts[row // 4 % 997] for row in range(rows)], f"S{width}")
        file["input_productID"] = (np.arange(rows) // 4 + 10_000).reshape(-1, 1)
        file["index_2"] = np.arange(rows)


def encode_many(seconds: float) -> tuple[int, float]:
    """Encode images from memory for some seconds; return how many, and the processor time in seconds."""
    pool, encoding, done = product_images(POOL), Encoding(), 0
    begin, end = time.process_time(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        encoding.encode(pool[done % POOL])
        done += 1
    return done, time.process_time() - begin


def encoding_rate(workers: int, seconds: float = 10.0) -> tuple[float, float]:
    """Return images per second on `workers` processes, and the processor time of one in microseconds."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(encode_many, [0.1] * workers, chunksize=1)  # started, imported, warm
        counts, cpu = zip(*pool.map(encode_many, [seconds] * workers, chunksize=1), strict=True)
    return sum(counts) / seconds, 1e6 * sum(cpu) / sum(counts)


def processor_time() -> float:
    """Return the processor seconds of all ended child processes and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pack(source: Path, out: Path, workers: int) -> tuple[float, float, float]:
    """Pack; return seconds, processor seconds and the peak memory in MB of the command and its workers together.

    Processor time includes the start of the processes. Memory is private pages, sampled five times per second.
    """
    command = [sys.executable, "-m", "syncmask_fast.pack", "fashiongen", str(source), str(out)]
    command += ["--workers", str(workers)]
    begin, before = time.perf_counter(), processor_time()
    run = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    peak, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, sum(map(private_megabytes, processes_of(run.pid))))

    thread = threading.Thread(target=watch)
    thread.start()
    code = run.wait()
    seconds = time.perf_counter() - begin
    ended.set()
    thread.join()
    assert code == 0, f"pack ended with {code}"
    return seconds, processor_time() - before, peak


def processes_of(parent: int) -> list[int]:
    """Return a process and all that it has started."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return []
    return [parent, *(found for child in children for found in processes_of(int(child)))]


def private_megabytes(pid: int) -> float:
    """Return the private memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    """Measure, print and write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--file", type=Path, help="use this file; written where it does not exist")
    parser.add_argument("--compression", help="of the images in the file, such as gzip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.file or Path(folder, "fashiongen_256_256_train.h5")
        if not source.exists():
            write_file(source, options.rows, options.compression)
        with h5py.File(source) as file:
            rows = len(file["input_image"])
        first = encoding_rate(
            options.workers
        )  # before and after; other work can only slow it down, so the better counts
        seconds, cpu, peak = pack(source, Path(folder, "shards"), options.workers)
        second = encoding_rate(options.workers)
    alone, alone_us = max(first[0], second[0]), min(first[1], second[1])
    # Imported here: the encoding processes need no torch.
    import torch

    from bench.harness import machine, results_folder

    row = {
        "rows": rows,
        "workers": options.workers,
        "compression": options.compression or "none",
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds, 1),
        "jpeg_alone_per_s": round(alone, 1),
        "share": round(rows / seconds / alone, 3),
        "cpu_us_per_row": round(1e6 * cpu / rows),
        "jpeg_alone_cpu_us": round(alone_us),
        "cpu_share": round(alone_us / (1e6 * cpu / rows), 3),
        "peak_private_mb": round(peak, 1),
        **machine(torch.device("cpu")),
    }
    print(json.dumps(row, indent=2))
    results_folder().mkdir(parents=True, exist_ok=True)
    with (results_folder() / "pack_fashiongen.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row.keys())
        writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
