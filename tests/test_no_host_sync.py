"""A training step never makes the host wait for the device: nothing in it needs a value or a length that only the
device knows.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from syncmask_fast.objective import pretraining as step
from syncmask_fast.training.setup import configure_compute
from tests.helpers import STEP_CASES, NoHostReads, losses_of, small_batch, small_state, step_config, take_step


@pytest.mark.parametrize(("masking", "presence", "stem", "copy"), STEP_CASES)
def test_step_of_cuda_reads_nothing_back(
    masking: str, presence: float, stem: str, copy: str, monkeypatch: pytest.MonkeyPatch
):
    """The way that CUDA takes, on the CPU, where reserving rows is not needed; its losses are those of the CPU's
    way.
    """
    config = step_config(masking, presence, stem, copy)
    state, batch = small_state(config), small_batch(config, seed=3)
    ours = losses_of(config, state.model, batch, teacher=state.teacher)[0]
    monkeypatch.setattr(step, "uses_varlen", lambda device: True)
    theirs = losses_of(config, state.model, batch, teacher=state.teacher)[0]
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4), name
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: pytest.fail("a copy to the host"))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: pytest.fail("a copy to the host"))
    with NoHostReads():
        losses = take_step(config, state, iter([batch])).losses
    monkeypatch.undo()
    assert losses["total"].isfinite()


def test_the_guard_sees_what_it_forbids():
    values = torch.arange(4.0)
    for reads_back in (
        lambda: values.sum().item(),
        lambda: values.nonzero(),
        lambda: values[values > 1],
        lambda: bool(values.any()),
    ):
        with NoHostReads(), pytest.raises(AssertionError, match="reads back"):
            reads_back()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("masking", "presence", "stem", "copy"), STEP_CASES)
def test_cuda_never_waits(masking: str, presence: float, stem: str, copy: str, precision: str):
    """CUDA itself reports every wait. The first steps may: they compile, and choose the attention."""
    config = dataclasses.replace(step_config(masking, presence, stem, copy), precision=precision)
    device = torch.device("cuda")
    state, batch = small_state(config, device), small_batch(config, seed=3)
    moved = {
        name: getattr(batch, name).to(device)
        for name in ("pixels", "token_ids", "cu_seqlens", "sample_ids", "epoch_positions")
    }
    shard = batch.shard
    moved["shard"] = dataclasses.replace(shard, items=shard.items.to(device), product_ids=shard.product_ids.to(device))
    batches = itertools.repeat(dataclasses.replace(batch, **moved))
    configure_compute(config, state)
    for _ in range(3):
        take_step(config, state, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = take_step(config, state, batches).losses
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses["total"].isfinite()
