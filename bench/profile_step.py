"""Where a training step's time goes: `python bench/profile_step.py [tiny|base] [BATCH_SIZE] [float32|bfloat16]`.

Prints the operators or kernels with the most time, and on CUDA the share of the time in which the GPU had nothing to do.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_spec = importlib.util.spec_from_file_location("bench_test_step", Path(__file__).with_name("test_step.py"))
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

WARM_UP, STEPS = 3, 3


def main(preset: str = "tiny", batch_size: str = "64", precision: str = "") -> None:
    from syncmask_fast.train import configure_compute, train_step, tune_malloc

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = bench.configuration(
        preset, int(batch_size), precision or ("bfloat16" if device.type == "cuda" else "float32")
    )
    tune_malloc()
    state, batches = bench.make_state(config, device), itertools.cycle(bench.make_batches(config, device))
    configure_compute(config, state.model, state.teacher, device)

    def steps(count: int) -> None:
        for _ in range(count):
            train_step(config, state, batches, bench.STEPS, 1)
        if device.type == "cuda":
            torch.cuda.synchronize()

    steps(WARM_UP)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        steps(STEPS)
    order = f"self_{device.type}_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70))
    kernels = sorted((e.time_range.start, e.time_range.end) for e in found.events() if e.device_type == DeviceType.CUDA)
    if kernels:
        print(
            f"the GPU was idle for {100 * idle_share(kernels):.1f} % of {STEPS} steps, {len(kernels) // STEPS} kernels and copies a step"
        )


def idle_share(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers; spans are sorted by their start."""
    idle, reached = 0.0, spans[0][1]
    for begin, end in spans:
        idle += max(0.0, begin - reached)
        reached = max(reached, end)
    return idle / (reached - spans[0][0])


if __name__ == "__main__":
    main(*sys.argv[1:])
