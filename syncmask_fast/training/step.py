"""One optimizer step: accumulate gradients, clip, update, or skip if anything is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.distributed.gradients import GradientReducer
from syncmask_fast.objective.memory import Features, update_teacher
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.rollback import Rollback
from syncmask_fast.utils.device import autocast_dtype

Objective = Callable[..., tuple[dict[str, Tensor], Features]]
"""`objective.pretraining.pretraining_losses`, or a task's losses with the same parameters."""


class StepResult(NamedTuple):
    """What a step returns to the loop. Nothing of it has been read back from the device."""

    losses: dict[str, Tensor]
    """Means over micro-batches and ranks, float32 scalars; "total" is NaN if the step was skipped."""
    lengths: list[list[int]]
    """Token counts of this rank's texts, for each micro-batch."""
    last_batch: Batch
    with_fusion: bool


def train_step(
    state: TrainState,
    batches: Iterator[Batch],
    config: TrainConfig,
    objective: Objective,
    reducer: GradientReducer,
    steps: int,
    batches_per_epoch: int,
) -> StepResult:
    """Take one step over `--optim.grad-accum` batches and update everything in `state` but its counters.

    If a loss or a gradient is not finite, everything stays as it was before the step. The device decides this; the host
    never waits for it.
    """
    device, accumulate = state.model.device, config.optim.grad_accum
    dtype = autocast_dtype(config.precision, device, config.text.width)
    micro_losses: list[dict[str, Tensor]] = []
    lengths: list[list[int]] = []
    rollback = Rollback()
    # The forward pass changes batch norm statistics.
    rollback.snapshot(state.model.buffers())

    for micro_step in range(accumulate):
        batch = next(batches)
        schedule = Schedule.at(config, state.step, steps, batches_per_epoch, micro_step)

        # 1. Forward and backward. Ranks exchange gradients once, in the last backward pass.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses, features = objective(state.model, state.teacher, batch, state.queue, config, schedule)
        last = micro_step == accumulate - 1
        with reducer.reduce_during_backward() if last else contextlib.nullcontext():
            (losses["total"] / accumulate).backward()
        micro_losses.append({name: loss.detach() for name, loss in losses.items()})
        lengths.append(batch.lengths)

        # 2. Remember the features of the batch, for ITC (queue) and for the next epoch's order (bank).
        shard, clock = batch.shard, (state.batches_done, config.batch_size)
        rollback.snapshot_rows(state.queue, state.queue.next_slots(shard.global_size, *clock))
        rollback.snapshot_rows((state.bank.images, state.bank.texts, state.bank.filled), shard.items)
        state.queue.enqueue(features, shard.product_ids, *clock)
        state.bank.update(shard.items, features)
        state.batches_done += 1

    # 3. Clip, and decide whether the step counts.
    mean = {name: torch.stack([losses[name] for losses in micro_losses]).mean() for name in micro_losses[0]}
    mean = dict(zip(mean, reducer.group.all_reduce(torch.stack(list(mean.values()))), strict=True))
    gradient_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.grad_clip)
    finite = gradient_norm.isfinite() & mean["total"].isfinite()

    # 4. Update weights, then the EMA teacher; or undo steps 1 and 2.
    state.optimizer.step(finite)
    state.optimizer.zero_grad()
    rollback.restore_unless(finite)
    update_teacher(state.teacher, state.model, config.optim.ema_decay, state.step, finite)
    mean["total"] = mean["total"].where(finite, torch.nan)
    return StepResult(mean, lengths, batch, schedule.with_fusion)
