"""The memory that training takes, by preset, batch size and gradient checkpointing.

    python -m bench.memory_table [tiny|base] [float32|bfloat16]

Counted on the CPU: the saved tensors of a step's backward pass (each storage once), divided by its pairs, times the
batch size; plus what lasts from step to step (weights, teacher, optimizer, queue) and the gradients.
Temporaries and the allocator's gaps come on top.
"""

from __future__ import annotations

import dataclasses
import sys
from unittest import mock

import torch

from bench.steps import STEPS, configuration, held_mib, make_batches, make_state
from syncmask_fast.config import TrainConfig
from syncmask_fast.model import encoders
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.training.setup import configure_compute

COUNTED, SHOWN = 8, (8, 64, 128, 256, 512)  # batch sizes


def saved_bytes(config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Return the bytes that last from step to step, with the gradients, and the saved bytes of one pair."""
    state = make_state(config, device)
    (batch,) = make_batches(config, device, 1)
    dtype = configure_compute(config, state)
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # keeping them alive prevents their addresses from being reused

    def save(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return x

    # Residuals and norms are float32 on CUDA, where the table is used; only the CPU has them in bfloat16.
    as_on_cuda = mock.patch.object(encoders, "to_autocast_dtype", lambda x: x)
    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda x: x)
    with hooks, as_on_cuda, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        losses, _ = pretraining_losses(
            state.model, state.teacher, batch, state.queue, config, Schedule.at(config, state.step, STEPS, 1)
        )
    assert losses["total"].requires_grad
    gradients = sum(p.nbytes for p in state.model.parameters())
    moments = 2 * gradients  # AdamW's, which the first step creates
    held = held_mib(state) * 2**20 + moments + gradients
    return held, sum(storage.nbytes() for storage in saved.values()) / config.batch_size


def main(preset: str = "tiny", precision: str = "float32") -> None:
    """Print the table."""
    device = torch.device("cpu")
    print("| preset | precision | checkpointing | held | a pair | " + " | ".join(f"batch {n}" for n in SHOWN) + " |")
    print("|---" * (5 + len(SHOWN)) + "|")
    for checkpointing in (False, True):
        config = dataclasses.replace(configuration(preset, COUNTED, precision), grad_checkpointing=checkpointing)
        held, pair = saved_bytes(config, device)
        cells = [
            preset,
            precision,
            "on" if checkpointing else "off",
            f"{held / 2**30:.2f} GiB",
            f"{pair / 2**20:.0f} MiB",
        ]
        cells += [f"{(held + n * pair) / 2**30:.1f} GiB" for n in SHOWN]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
