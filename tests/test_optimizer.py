"""AdamW and Muon side by side, and the learning rate of both."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from syncmask_fast.config import OptimConfig
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.training.optimizer import lr_multiplier, make_optimizer
from tests.helpers import small_config, small_tokenizer


@pytest.fixture
def model() -> SyncMaskModel:
    config = small_config()
    return SyncMaskModel(
        dataclasses.replace(config, image=dataclasses.replace(config.image, stem="conv")), small_tokenizer()
    )


def test_learning_rate():
    config = OptimConfig(lr=2.0, min_lr=0.2, warmup=0.1)
    rates = [lr_multiplier(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)  # half of the cosine
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0.1 < rates[-1] < 0.101


def test_both_learning_rates_fall_in_step(model: SyncMaskModel):
    optimizer = make_optimizer(model, OptimConfig(lr=0.001, muon_lr=0.02))
    optimizer.set_lr_multiplier(0.5)
    optimizer.set_lr_multiplier(0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.00025, 0.00025, 0.005])


@pytest.mark.parametrize("muon_lr", [None, 0.01])
def test_every_parameter_has_one_place(model: SyncMaskModel, muon_lr: float | None):
    optimizer = make_optimizer(model, OptimConfig(muon_lr=muon_lr))
    groups = [{**g, "params": [optimizer.conv_views.get(p, p) for p in g["params"]]} for g in optimizer.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert [id(p) for p, _ in optimizer.parameter_states()] == [id(p) for g in groups for p in g["params"]]
    decayed = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or name == "log_temperature"
        assert (id(parameter) in decayed) != plain, name


def test_muon_takes_matrices_that_are_not_tables_of_vectors(model: SyncMaskModel):
    optimizer = make_optimizer(model, OptimConfig(muon_lr=0.01))
    adamw, muon = optimizer.optimizers
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(optimizer.conv_views.get(p, p))] for group in muon.param_groups for p in group["params"]}
    assert "text.layers.0.attention.qkv.weight" in taken
    assert "image_proj.weight" in taken
    convolutions = {name for name, p in model.named_parameters() if p.ndim == 4}
    assert convolutions
    assert convolutions <= taken
    assert not taken & {"text.word_embeddings.weight", "text.position_embeddings.weight"}
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert isinstance(adamw, torch.optim.AdamW)


def test_one_step_moves_everything_that_has_a_gradient(model: SyncMaskModel):
    optimizer = make_optimizer(model, OptimConfig(muon_lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
