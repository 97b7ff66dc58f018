"""The formula of a step's FLOPs against what PyTorch counts while it runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.objective.memory import Queue, make_teacher
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.training.flops import peak_flops, step_flops
from tests.helpers import SEED, small_batch, small_config, small_model


@register_flop_formula(torch.ops.syncmask.packed_attention, get_raw=True)
def attention_flops(q, k, v, q_starts, k_starts, *scale, out_val=None) -> int:
    """q k^T, and the weights times v."""
    return 4 * int((q_starts.diff() * k_starts.diff()).sum()) * q.shape[1] * q.shape[2]


@register_flop_formula(torch.ops.syncmask.packed_attention_backward, get_raw=True)
def attention_backward_flops(grad, q, k, v, out, log_sums, q_starts, k_starts, *scale, out_val=None) -> int:
    """Two products for each of the forward pass; what is computed again does not count."""
    return 2 * attention_flops(q, k, v, q_starts, k_starts)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    ("masking", "changes"),
    [
        ("sync", {}),
        ("none", {}),
        ("random", {"queue": 0, "alpha": 0.0}),
        ("sync", {"presence": 1.0, "presence_negatives": 2, "collages": 0.5}),
        ("sync", {"mim_input": "visible"}),
    ],
    ids=str,
)
def test_formula_is_what_runs(masking: str, changes: dict, fuse: bool):
    """Texts of one length: then padding within the CPU's attention is none, and drawn negatives are as long as the
    average.
    """
    config = small_config(masking=masking)
    config = dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, **changes),
        image=dataclasses.replace(config.image, width=64, heads=4),
        mask=dataclasses.replace(config.mask, layer=1 if changes.get("presence") else 2, token_score="mass"),
    )
    model, batch = small_model(config), small_batch(config)
    lengths = [12] * 6
    ids = torch.randint(5, config.text.vocab_size, (72,))
    batch = dataclasses.replace(
        batch,
        token_ids=ids,
        lengths=lengths,
        cu_seqlens=PackedLayout.of(lengths).cu_seqlens,
        shard=BatchShard.whole(lengths, torch.arange(6), torch.arange(6)),
    )
    queue = Queue.empty(config.loss.queue, config.embed_dim, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        schedule = Schedule(with_fusion=fuse, sync_probability=1.0, alpha=config.loss.alpha, seed=SEED)
        losses, _ = pretraining_losses(model, make_teacher(model), batch, queue, config, schedule)
        losses["total"].backward()
    assert step_flops(model, lengths, with_fusion=fuse) == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_peak_is_measured_on_the_cpu():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15
