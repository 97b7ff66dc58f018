"""Stop a run in good order: on a signal, or when its batches give nothing finite."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from syncmask_fast.data.loader import Batch
from syncmask_fast.data.shards import ShardIndex
from syncmask_fast.distributed.group import Group


@contextlib.contextmanager
def graceful_stop(group: Group) -> Iterator[list[int]]:
    """Yield a list that receives the numbers of Ctrl-C and SIGTERM, so the loop can save and exit.

    A second Ctrl-C stops at once. A second SIGTERM does not: schedulers send it to every process of a job and again
    through a launcher. Under torchrun neither does, because torchrun forwards a Ctrl-C that the terminal has already
    sent, and ends what takes too long by itself.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT and group.world_size == 1:
            raise KeyboardInterrupt
        received.append(number)
        group.print("\nStopping after this step. Press Ctrl-C again to stop at once.")

    # The handler only takes note: in the middle of a step, nothing could be saved.
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def dump_bad_batch(run_dir: Path, batch: Batch, index: ShardIndex, step: int, epoch: int) -> Path:
    """Save a batch whose loss or gradients were not finite, with the names of its samples; return the file."""
    path = run_dir / f"not-finite-step-{step}.safetensors"
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    # Pixels and tokens as the step saw them, so the failure can be reproduced without the data.
    tensors = {name: x.cpu().contiguous() for name, x in values.items() if isinstance(x, torch.Tensor)}
    samples = [f"{index.shard_path(i).name}: {index.key(i)}" for i in batch.sample_ids_host.tolist()]
    save_file(tensors, path, {"step": str(step), "epoch": str(epoch), "samples": json.dumps(samples)})
    return path
