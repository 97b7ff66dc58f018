"""Compiled blocks and checkpointing change nothing but time and memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from syncmask_fast.objective.memory import make_teacher
from syncmask_fast.training.setup import configure_compute
from tests.helpers import losses_of, small_batch, small_config, small_model, small_state, take_step


def gradients(config, model, teacher, batch) -> tuple:
    found, _ = losses_of(config, model, batch, teacher=teacher)
    found["total"].backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found, named


def assert_same(ours: tuple, theirs: tuple) -> None:
    for name, value in ours[0].items():
        assert torch.allclose(value, theirs[0][name], rtol=1e-4, atol=1e-5), name
    for name, gradient in ours[1].items():
        assert torch.allclose(gradient, theirs[1][name], rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7), (
            name
        )


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_checkpointing_gives_the_same_gradients_from_less(stem: str):
    config = small_config(masking="sync")
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, patch=16, stem=stem, depth=3))
    state, batch = small_state(config), small_batch(config)
    kept = []
    outcomes = []
    for checkpointing in (False, True):
        configure_compute(dataclasses.replace(config, grad_checkpointing=checkpointing), state)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            outcomes.append(gradients(config, state.model, state.teacher, batch))
        kept.append(sum(sizes))
    assert_same(*outcomes)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.slow
def test_compiled_steps_give_the_same_and_are_compiled_once():
    """Texts of other lengths, negatives of other images: nothing in a step is compiled again after the first three,
    and attention breaks no graph.
    """
    config = small_config(masking="sync")
    config = dataclasses.replace(config, compile="on", loss=dataclasses.replace(config.loss, mim_input="visible"))
    state, batches = small_state(config), [small_batch(config, seed=seed) for seed in range(12)]
    assert len({sum(batch.lengths) for batch in batches}) > 6
    configure_compute(config, state)
    torch._dynamo.reset()
    counters.clear()
    compiled = []
    for batch in batches:
        take_step(config, state, iter([batch]), len(batches))
        compiled.append(counters["stats"]["unique_graphs"])
        state.step += 1
    assert compiled[2] > 4  # blocks of image, text and fusion, with and without gradient
    assert compiled[2:] == compiled[2:3] * 10
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]

    plain = small_model(config)
    plain.load_state_dict(state.model.state_dict())
    teacher = make_teacher(plain)
    assert_same(gradients(config, plain, teacher, batches[0]), gradients(config, state.model, teacher, batches[0]))
