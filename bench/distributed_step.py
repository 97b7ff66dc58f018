"""Time and bytes of a step on several processes, by kind of collective.

    python -m bench.distributed_step tiny --steps 24 --loss.itc-only 0
    torchrun --nproc_per_node=2 -m bench.distributed_step tiny --steps 24 --loss.itc-only 0

Arguments are the trainer's. The seconds of a collective include waiting for a slower rank. Gradients travel during the
backward pass: theirs is the time that is left to wait afterwards. Bytes are those that a rank sends in.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from syncmask_fast import train
from syncmask_fast.distributed.group import init_distributed, local_device
from syncmask_fast.training.run_dir import create_run_dir
from syncmask_fast.training.setup import open_data
from syncmask_fast.utils.device import choose_device, tune_malloc

WARM_UP = 4
# Function of torch.distributed -> its kind here, and which of its arguments is what the rank sends in.
COLLECTIVES = {
    "all_gather_into_tensor": ("gather", 1),
    "reduce_scatter_tensor": ("gather, backward", 1),
    "all_to_all_single": ("texts of negatives", 1),
    "all_reduce": ("sums", 0),
    "broadcast": ("draws", 0),
}


class Meter:
    """Seconds and bytes of every kind of collective, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []
        self.current: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, kind: str, seconds: float, size: float = 0.0) -> None:
        """Add to the current step."""
        self.current[kind][0] += seconds
        self.current[kind][1] += size

    def timed(self, function: Callable, kind: str, argument: int) -> Callable:
        """Return a collective that adds its time; `argument` is the number of the tensor that it sends."""

        def timed_function(*args, **kwargs):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            asynchronous = kwargs.get("async_op", False)  # only gradients are
            self.add("gradients" if asynchronous else kind, time.perf_counter() - begin, args[argument].nbytes)
            return TimedWork(self, result) if asynchronous else result

        return timed_function

    def timed_step(self, train_step: Callable) -> Callable:
        """Return a training step that starts a new record."""

        def timed_train_step(*args, **kwargs):
            self.current.clear()
            begin = time.perf_counter()
            result = train_step(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.add("step", time.perf_counter() - begin)
            self.steps.append({kind: tuple(values) for kind, values in self.current.items()})
            return result

        return timed_train_step

    def summary(self) -> dict[str, float | dict[str, float]]:
        """Return medians over the steps after the warm-up."""
        steps = self.steps[WARM_UP:]
        step_seconds = statistics.median(step["step"][0] for step in steps)
        rows: dict[str, float | dict[str, float]] = {"step_ms": round(1e3 * step_seconds, 1)}
        for kind in steps[-1]:
            if kind != "step":
                seconds, size = (statistics.median(step.get(kind, (0, 0))[i] for step in steps) for i in (0, 1))
                share = round(seconds / step_seconds, 3)
                rows[kind] = {"ms": round(1e3 * seconds, 1), "share": share, "bytes": round(size)}
        return rows


class TimedWork:
    """The handle of an asynchronous collective, whose waiting is timed."""

    def __init__(self, meter: Meter, work: dist.Work) -> None:
        self.meter, self.work = meter, work

    def wait(self) -> None:
        begin = time.perf_counter()
        self.work.wait()
        self.meter.add("gradients", time.perf_counter() - begin)


def main() -> None:
    """Train with every collective timed, and print the medians."""
    meter = Meter()
    for name, (kind, argument) in COLLECTIVES.items():
        setattr(dist, name, meter.timed(getattr(dist, name), kind, argument))
    train.train_step = meter.timed_step(train.train_step)
    config = train.parse(sys.argv[1:])
    device = choose_device(local_device(config.device))
    tune_malloc()
    with init_distributed(device) as group, tempfile.TemporaryDirectory() as folder:
        config, train_split, eval_split = open_data(config, group)
        config = create_run_dir(dataclasses.replace(config, out=Path(folder) / "run"), group)
        train.train(config, device, train_split, eval_split, group)
        about = {"ranks": group.world_size, "threads": torch.get_num_threads(), "pairs": config.batch_size}
        print(json.dumps(about | meter.summary()))


if __name__ == "__main__":
    main()
