"""What every benchmark shares: cold inputs, timing, memory, the limits of the machine, and the rows written.

A benchmark names its providers (other ways to compute the same, and ours), makes inputs for a case, and calls
`Session.compare`. Rows go to bench/results (or $OUT) as CSV, one file for each operator, device and allocator
setting.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import itertools
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# glibc returns large blocks to the kernel, and fetching them again costs eager PyTorch more than its arithmetic.
TUNED = {"MALLOC_MMAP_THRESHOLD_": "34359738368", "MALLOC_TRIM_THRESHOLD_": "34359738368"}
_SECONDS, _ROUNDS = 2.0, (5, 50)  # of measuring a provider


def results_folder() -> Path:
    return Path(os.environ.get("OUT") or ROOT / "bench/results")


def allocator() -> str:
    return "tuned" if all(os.environ.get(name) == value for name, value in TUNED.items()) else "default"


def cache_bytes(device: torch.device) -> int:
    """The last level of cache: L2 of a GPU, L3 of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 << 20)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, str | int]:
    """Where and with what: the columns that every row ends with."""
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    on_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if on_gpu else cpu[1] if cpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "allocator": "caching" if on_gpu else allocator(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if on_gpu else "",
        "commit": run.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def best_seconds(function: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    best = math.inf
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def measure_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The best rates seen of a square product in `dtype` (flop/s) and of a copy (bytes/s, read and written)."""
    n = 8192 if device.type == "cuda" else 1024
    a, b, c = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(3))
    gemm = 2 * n**3 / best_seconds(lambda: torch.mm(a, b, out=c), device)
    source = torch.ones(max(4 * cache_bytes(device), 1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gemm": gemm, "copy": 2 * source.numel() / best_seconds(lambda: target.copy_(source), device, 10)}


def extra_mib(function: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory of a call beyond what was there, in MiB; NaN where the system does not report it.

    On the CPU, memory that earlier calls freed is returned first. With the tuned allocator much stays, so take the
    figure from the other rows.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return math.nan
    before = _status_kib("VmRSS")
    function()
    return max(0, _status_kib("VmHWM") - before) / 2**10


def _status_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def _what(row: dict) -> tuple:
    """Return what a row measured: its columns before the figures, as they are in the CSV file."""
    return tuple((name, str(row[name])) for name in itertools.takewhile(lambda name: name != "median_ms", row))


class Session:
    """The rows of one `pytest bench` run."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self._tested: dict[str, str] = {}
        self._limits: dict[tuple, dict[str, float]] = {}

    def require_green(self, operator: str) -> None:
        """Fails the benchmark unless the operator's tests pass: a wrong result has no speed."""
        if operator not in self._tested:
            tests = [str(path) for path in sorted((ROOT / "tests").glob(f"test_{operator}*.py"))]
            command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
            run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            self._tested[operator] = "" if run.returncode == 0 else run.stdout[-2000:]
        if self._tested[operator]:
            pytest.fail(
                f"the tests of {operator} fail, so nothing is reported:\n{self._tested[operator]}", pytrace=False
            )

    def measure(
        self,
        benchmark,
        *,
        operator: str,
        provider: str,
        case: dict,
        make: Callable[[int], Sequence[torch.Tensor]],
        function: Callable[..., object],
        flops: float,
        cold: bool = True,
        rounds: int | None = None,
    ) -> None:
        """Times function(*make(seed)) and adds a row.

        One round goes once over copies of the inputs that together are twice the cache, so that each call finds
        its inputs cold; its time is the mean of a call. With cold=False it is a call on one copy: for work that reads
        its inputs many times. rounds=1 has no warm-up either. flops: of the products that cannot be avoided.
        """
        first = make(0)
        device, dtype = first[0].device, first[0].dtype
        size = sum(x.numel() * x.element_size() for x in first)
        copies = [
            first,
            *(make(seed) for seed in range(1, 1 + math.ceil(2 * cache_bytes(device) / size) if cold else 1)),
        ]

        def once_over() -> None:
            for inputs in copies:
                function(*inputs)
            synchronize(device)

        if rounds == 1:
            extra = extra_mib(lambda: benchmark.pedantic(once_over, rounds=1, iterations=1), device)
        else:
            function(*first)
            synchronize(device)
            extra = extra_mib(lambda: function(*copies[-1]), device)
            rounds = rounds or min(
                _ROUNDS[1], max(_ROUNDS[0], math.ceil(_SECONDS / best_seconds(once_over, device, 1)))
            )
            benchmark.pedantic(once_over, rounds=rounds, iterations=1, warmup_rounds=1)
        calls = [1e3 * seconds / len(copies) for seconds in benchmark.stats.stats.data]
        key = (device, dtype)
        limits = self._limits[key] = self._limits.get(key) or measure_limits(device, dtype)
        gemm_ms, copy_ms = 1e3 * flops / limits["gemm"], 1e3 * size / limits["copy"]
        self._add(
            benchmark,
            device,
            {
                "operator": operator,
                "provider": provider,
                "device": device.type,
                "dtype": str(dtype).removeprefix("torch."),
                **case,
            },
            calls,
            {
                "copies": len(copies),
                "extra_mib": extra,
                "gemm_limit_ms": gemm_ms,
                "copy_limit_ms": copy_ms,
                "of_limit": max(gemm_ms, copy_ms) / statistics.median(calls),
                "gemm_tflops": limits["gemm"] / 1e12,
                "copy_gb_s": limits["copy"] / 1e9,
            },
        )

    def measure_whole(
        self,
        benchmark,
        *,
        operator: str,
        provider: str,
        device: torch.device,
        dtype: torch.dtype,
        case: dict,
        function: Callable[[], object],
        items: int,
        rounds: int,
        warm_up: int = 1,
        facts: Callable[[float], dict] = lambda seconds: {},
    ) -> None:
        """Times function(), which keeps what it needs between calls (a training step, an epoch), and adds a row.

        items: pairs or images of a call. cpu_ms in the row is the processor time of all threads of this process.
        facts: further columns, from the median time of a call in seconds.
        """
        for _ in range(warm_up):
            function()
        extra = extra_mib(function, device)
        used: list[float] = []

        def once() -> None:
            begin = time.process_time()
            function()
            synchronize(device)
            used.append(1e3 * (time.process_time() - begin))

        benchmark.pedantic(once, rounds=rounds, iterations=1)
        calls = [1e3 * seconds for seconds in benchmark.stats.stats.data]
        median = statistics.median(calls)
        what = {
            "operator": operator,
            "provider": provider,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            **case,
        }
        more = {"cpu_ms": min(used), "per_s": 1e3 * items / median, "extra_mib": extra, **facts(median / 1e3)}
        self._add(benchmark, device, what, calls, more)

    def _add(self, benchmark, device: torch.device, what: dict, calls: list[float], more: dict) -> None:
        """Adds the row of a provider; calls: milliseconds of each."""
        tenths = statistics.quantiles(calls, n=10) if len(calls) > 1 else calls * 2
        row = {
            **what,
            "median_ms": statistics.median(calls),
            "min_ms": min(calls),
            "p10_ms": max(min(calls), tenths[0]),
            "p90_ms": min(max(calls), tenths[-1]),
            "rounds": len(calls),
            **more,
        }
        row = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
        self.rows.append(row | machine(device))
        benchmark.extra_info.update(row)

    def write(self) -> list[Path]:
        """Write one CSV file for each operator, device and allocator setting; rows that were not measured now stay."""
        folder = results_folder()
        folder.mkdir(parents=True, exist_ok=True)
        groups: dict[Path, list[dict]] = {}
        for row in self.rows:
            path = folder / f"{row['operator']}-{row['device']}-{row['allocator']}.csv"
            groups.setdefault(path, []).append(row)
        for path, rows in groups.items():
            before = []
            if path.is_file():
                with path.open(newline="") as file:
                    before = list(csv.DictReader(file))
            rows = list({_what(row): row for row in before + rows}.values())
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        return list(groups)

    def table(self) -> list[str]:
        """A line a row, with what the other providers take in terms of ours."""
        lines = []
        for row in self.rows:
            case = [
                name for name in row if list(row).index("dtype") < list(row).index(name) < list(row).index("median_ms")
            ]
            same = [
                r
                for r in self.rows
                if r["provider"] == "ours" and all(r[n] == row[n] for n in ("operator", "device", "dtype", *case))
            ]
            ratio = ""
            if same:
                median, best = (row[name] / same[0][name] for name in ("median_ms", "min_ms"))
                ratio = f"{median:5.2f}x ours ({best:.2f}x at best)"
            limits = f"{row.get('per_s', 0):.4g}/s"
            if "of_limit" in row:
                limits = f"limits {row['gemm_limit_ms']:.3f} gemm {row['copy_limit_ms']:.3f} copy"
            sizes = " ".join(f"{name} {row[name]}" for name in case)
            taken = f"{row['median_ms']:9.3f} ms (min {row['min_ms']:.3f}, p90 {row['p90_ms']:.3f})"
            where = f"{row['operator']} {row['device']} {row['allocator']:8s} {sizes:38s} {row['provider']:9s}"
            lines.append(f"{where} {taken} +{row['extra_mib']:.0f} MiB, {limits}  {ratio}")
        return lines
