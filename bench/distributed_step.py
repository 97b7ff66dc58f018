"""Time and bytes of a step on several processes: where they go, by kind of collective.

    python bench/distributed_step.py tiny --steps 24 --loss.itc-only 0
    torchrun --nproc_per_node=2 bench/distributed_step.py tiny --steps 24 --loss.itc-only 0

Arguments are the trainer's. Seconds within a collective count the waiting for a slower rank too; of gradients, which travel while the backward pass
still runs, they count what is left to wait for afterwards. Bytes are those that a rank puts in.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

from syncmask_fast import train
from syncmask_fast.data.splits import open_splits
from syncmask_fast.distributed.group import init_distributed, local_device
from syncmask_fast.utils.device import choose_device

WARM_UP = 4


class Meter:
    """Seconds and bytes of every kind of collective, for one step after the other."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []
        self.now: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, kind: str, seconds: float, size: float = 0.0) -> None:
        self.now[kind][0] += seconds
        self.now[kind][1] += size

    def watch(self, name: str, kind: str, place: int) -> None:
        """Times a function of torch.distributed; its argument at `place` is what the rank puts in."""
        function = getattr(dist, name)

        def timed(*values, **named):
            begin = time.perf_counter()
            result = function(*values, **named)
            gradients = named.get("async_op", False)
            self.add("gradients" if gradients else kind, time.perf_counter() - begin, values[place].nbytes)
            if gradients:
                wait = result.wait

                def timed_wait(*values, **named):
                    begin = time.perf_counter()
                    wait(*values, **named)
                    self.add("gradients", time.perf_counter() - begin)

                return type("TimedWork", (), {"wait": staticmethod(timed_wait)})
            return result

        setattr(dist, name, timed)

    def step(self, train_step):
        def timed(*values, **named):
            self.now.clear()
            begin = time.perf_counter()
            result = train_step(*values, **named)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.add("step", time.perf_counter() - begin)
            self.steps.append({kind: tuple(found) for kind, found in self.now.items()})
            return result

        return timed


def main() -> None:
    meter = Meter()
    for name, kind, place in (
        ("all_gather_into_tensor", "gather", 1),
        ("reduce_scatter_tensor", "gather, backward", 1),
        ("all_to_all_single", "texts of negatives", 1),
        ("all_reduce", "sums", 0),
        ("broadcast", "draws", 0),
    ):
        meter.watch(name, kind, place)
    train.train_step = meter.step(train.train_step)
    config = train.parse(sys.argv[1:])
    device = choose_device(local_device(config.device))
    train.tune_malloc()
    with init_distributed(device) as group, tempfile.TemporaryDirectory() as folder:
        with group.main_process_first():
            train_split, eval_split = open_splits(
                config.data or train.draw_default_lookbook(config), config.eval.holdout_fraction
            )
        out = Path(group.broadcast_object(folder)) / "run"
        out.mkdir(exist_ok=True)
        train.train(config, out, device, train_split, eval_split, group=group)
        steps = meter.steps[WARM_UP:]
        kinds = {
            kind: [statistics.median(step.get(kind, (0, 0))[i] for step in steps) for i in (0, 1)] for kind in steps[-1]
        }
        whole = kinds.pop("step")[0]
        found = {
            "ranks": group.world_size,
            "threads": torch.get_num_threads(),
            "pairs": config.batch_size,
            "step_ms": round(1e3 * whole, 1),
        }
        for kind, (seconds, size) in kinds.items():
            found[kind] = {"ms": round(1e3 * seconds, 1), "share": round(seconds / whole, 3), "bytes": round(size)}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
