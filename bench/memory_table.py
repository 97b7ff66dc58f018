"""The memory that training takes, by preset, batch size and checkpointing: `python bench/memory_table.py [tiny|base] [float32|bfloat16]`.

Counted on the CPU: what the backward pass of one step keeps (each storage once) divided by its pairs, times the batch size, plus what is held from
step to step (weights, teacher, optimiser, queue) and the gradients. Temporaries and the allocator's gaps come on top. In bfloat16 residuals and
norms are in float32 here, as on CUDA; on the CPU a run keeps less.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
_spec = importlib.util.spec_from_file_location("bench_test_step", Path(__file__).with_name("test_step.py"))
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

COUNTED, SHOWN = 8, (8, 64, 128, 256, 512)


def kept_bytes(config, device: torch.device) -> tuple[float, float]:
    """Bytes held from step to step with the gradients, and bytes kept for the backward pass of one pair."""
    from syncmask_fast.objective.pretraining import pretraining_losses
    from syncmask_fast.train import configure_compute, use_bfloat16

    state = bench.make_state(config, device)
    (batch,) = bench.make_batches(config, device, 1)
    configure_compute(config, state.model, state.teacher, device)
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(config, device)),
        bench.baseline.parents_layers(state.model, bench.baseline.Ways(wide_residuals=True)),
    ):
        found, _ = pretraining_losses(
            state.model, state.teacher, batch, state.queue, config, sync_share=1.0, alpha=config.loss.alpha, seed=0
        )
    gradients = sum(p.numel() * p.element_size() for p in state.model.parameters())
    moments = 2 * gradients  # AdamW's, which the first step makes
    assert found.total.requires_grad
    return bench.held_mib(state) * 2**20 + moments + gradients, sum(
        storage.nbytes() for storage in kept.values()
    ) / config.batch_size


def main(preset: str = "tiny", precision: str = "float32") -> None:
    device = torch.device("cpu")
    print("| preset | precision | checkpointing | held | a pair | " + " | ".join(f"batch {n}" for n in SHOWN) + " |")
    print("|---" * (5 + len(SHOWN)) + "|")
    for checkpointing in (False, True):
        config = dataclasses.replace(bench.configuration(preset, COUNTED, precision), grad_checkpointing=checkpointing)
        held, pair = kept_bytes(config, device)
        cells = [f"{(held + n * pair) / 2**30:.1f} GiB" for n in SHOWN]
        switch = "on" if checkpointing else "off"
        print(
            f"| {preset} | {precision} | {switch} | {held / 2**30:.2f} GiB | {pair / 2**20:.0f} MiB | {' | '.join(cells)} |"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
