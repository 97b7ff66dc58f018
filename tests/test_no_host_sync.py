"""A training step never makes the host wait for the device: nothing in it needs a value or a length that only the device knows."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from syncmask_fast.config import TrainConfig
from syncmask_fast.objective import pretraining as step
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.setup import configure_compute
from tests.helpers import PAIRS, losses_of, small_batch, small_config, small_model, take_step

READS_BACK = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}
TAKE_MASKS = {"aten::index.Tensor", "aten::index_put", "aten::index_put_"}
CASES = [
    ("sync", 0.0, "patch", "mask-tokens"),
    ("sync", 1.0, "conv", "mask-tokens"),
    ("sync", 1.0, "conv", "visible"),
    ("random", 0.0, "patch", "visible"),
    ("none", 1.0, "patch", "mask-tokens"),
]


class NothingReadBack(TorchDispatchMode):
    """Fails at operators that wait for the device on CUDA: they give a number, or a tensor whose shape depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        indices = args[1] if name in TAKE_MASKS else ()
        reads_back = name in READS_BACK or any(x is not None and x.dtype == torch.bool for x in indices)
        assert not reads_back, f"{name} reads back from the device"
        return function(*args, **(kwargs or {}))


def config_of(masking: str, presence: float, stem: str, copy: str) -> TrainConfig:
    config = small_config(masking=masking)
    return dataclasses.replace(
        config,
        loss=dataclasses.replace(
            config.loss, presence=presence, presence_negatives=3, collages=presence / 2, mim_input=copy
        ),
        mask=dataclasses.replace(config.mask, layer=1),
        image=dataclasses.replace(config.image, patch=16, stem=stem),
        optim=dataclasses.replace(config.optim, muon_lr=0.01),
    )


def state_of(config: TrainConfig, device: torch.device) -> TrainState:
    state = TrainState.create(small_model(config).to(device), config, {"samples": PAIRS})
    state.step = 50
    return state


@pytest.mark.parametrize(("masking", "presence", "stem", "copy"), CASES)
def test_step_of_cuda_reads_nothing_back(
    masking: str, presence: float, stem: str, copy: str, monkeypatch: pytest.MonkeyPatch
):
    """The way that CUDA takes, on the CPU, where reserving rows is not needed; its losses are those of the CPU's way."""
    config = config_of(masking, presence, stem, copy)
    state, batch = state_of(config, torch.device("cpu")), small_batch(config, seed=3)
    ours = losses_of(config, state.model, batch, teacher=state.teacher)[0]
    monkeypatch.setattr(step, "uses_varlen", lambda device: True)
    theirs = losses_of(config, state.model, batch, teacher=state.teacher)[0]
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=1e-4), name
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: pytest.fail("a copy to the host"))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: pytest.fail("a copy to the host"))
    with NothingReadBack():
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
        with NothingReadBack(), pytest.raises(AssertionError, match="reads back"):
            reads_back()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("masking", "presence", "stem", "copy"), CASES)
def test_cuda_never_waits(masking: str, presence: float, stem: str, copy: str, precision: str):
    """CUDA itself reports every wait. The first steps may: they compile, and choose the attention."""
    config = dataclasses.replace(config_of(masking, presence, stem, copy), precision=precision)
    device = torch.device("cuda")
    state, batch = state_of(config, device), small_batch(config, seed=3)
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
