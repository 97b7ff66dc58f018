"""Where a training step's time goes: `python -m bench.profile_step [tiny|base] [BATCH_SIZE] [float32|bfloat16]`.

Prints the operators or kernels with the most time, and on CUDA the share of the time in which the GPU was idle.
"""

from __future__ import annotations

import sys

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.harness import synchronize
from bench.steps import configuration, make_stepper
from syncmask_fast.utils.device import tune_malloc

WARM_UP, STEPS = 3, 3


def main(preset: str = "tiny", batch_size: str = "64", precision: str = "") -> None:
    """Profile three steps after three others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bfloat16" if device.type == "cuda" else "float32")
    tune_malloc()
    stepper = make_stepper("ours", configuration(preset, int(batch_size), precision), device)

    def steps(count: int) -> None:
        for _ in range(count):
            stepper.step()
        synchronize(device)

    steps(WARM_UP)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as found:
        steps(STEPS)
    order = f"self_{device.type}_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=70))
    spans = sorted((e.time_range.start, e.time_range.end) for e in found.events() if e.device_type == DeviceType.CUDA)
    if spans:
        idle = f"{100 * idle_share(spans):.1f} % of {STEPS} steps"
        print(f"the GPU was idle for {idle}, {len(spans) // STEPS} kernels and copies a step")


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Return the share of the time from the first start to the last end that no span covers; spans sorted by start."""
    idle, reached = 0.0, spans[0][1]
    for begin, end in spans:
        idle += max(0.0, begin - reached)
        reached = max(reached, end)
    return idle / (reached - spans[0][0])


if __name__ == "__main__":
    main(*sys.argv[1:])
