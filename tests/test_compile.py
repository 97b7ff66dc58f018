"""Compiled blocks and checkpointing change nothing but time and memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from syncmask_fast.step import make_teacher, training_losses
from syncmask_fast.train import prepare_device
from tests.helpers import small_batch, small_config
from tests.test_step import losses_of, small_model, some_queue


def gradients(config, model, teacher, batch) -> tuple:
    found, _ = losses_of(config, model, batch, teacher=teacher)
    found.total.backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found, named


def assert_same(ours: tuple, theirs: tuple) -> None:
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    for name, gradient in ours[1].items():
        assert torch.allclose(gradient, theirs[1][name], rtol=1e-3, atol=1e-5 * gradient.abs().max().item() + 1e-7), name


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_checkpointing_gives_the_same_gradients_from_less(stem: str):
    config = small_config(masking="sync")
    config = dataclasses.replace(config, image=dataclasses.replace(config.image, patch=16, stem=stem, depth=3))
    model, batch = small_model(config), small_batch(config)
    teacher = make_teacher(model)
    kept = []
    outcomes = []
    for checkpointing in (False, True):
        prepare_device(dataclasses.replace(config, checkpointing=checkpointing), model, teacher, torch.device("cpu"))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            outcomes.append(gradients(config, model, teacher, batch))
        kept.append(sum(sizes))
    assert_same(*outcomes)
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_are_compiled_once():
    """Texts of other lengths, negatives of other images: nothing is compiled again after the first steps."""
    config = small_config(masking="sync")
    plain, model = small_model(config), small_model(config)
    teacher = make_teacher(model)
    prepare_device(dataclasses.replace(config, compile="on"), model, teacher, torch.device("cpu"))
    batches = [small_batch(config, seed=seed) for seed in range(8)]
    assert len({sum(batch.lengths) for batch in batches}) > 4
    queue, draws = some_queue(config), dict(sync_share=0.5, alpha=0.3)

    def run(batch, seed: int) -> None:
        found, _ = training_losses(model, teacher, batch, queue, config, seed=seed, **draws)
        found.total.backward()
        model.zero_grad()

    torch._dynamo.reset()
    counters.clear()
    for seed, batch in enumerate(batches[:3]):
        run(batch, seed)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 4
    for seed, batch in enumerate(batches[3:]):
        run(batch, seed)
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["recompile_limit"]
    assert_same(gradients(config, plain, teacher, batches[0]), gradients(config, model, teacher, batches[0]))
