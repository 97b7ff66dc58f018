"""The parents' way of a step gives the trainer's losses and gradients, whichever of its switches are on."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from syncmask_fast.objective.losses import Queue
from syncmask_fast.objective.pretraining import make_teacher, pretraining_losses, sample_hard_negatives
from syncmask_fast.training.checkpoint import FeatureBank, TrainState
from tests.helpers import small_batch, small_config
from tests.test_step import PAIRS, SEED, small_model, some_queue

_spec = importlib.util.spec_from_file_location("bench_baseline", Path(__file__).parents[1] / "bench/baseline.py")
baseline = sys.modules["bench_baseline"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(baseline)

NAMES = [field.name for field in dataclasses.fields(baseline.Ways)]
WAYS = {"none": baseline.Ways(), **{name: baseline.Ways(**{name: True}) for name in NAMES}, "all": baseline.Ways.all()}
SAME = {
    name: dataclasses.replace(ways, dropout=False) for name, ways in WAYS.items() if name != "dropout"
}  # which is random
PARTS = ("total", "itc", "itm", "mlm", "mim", "presence")


def configuration(presence: float, **mask):
    config = small_config(masking="sync", batching="semi_hard")
    loss = dataclasses.replace(
        config.loss,
        presence=presence,
        presence_negatives=3,
        collages=presence / 2,
        mim_target="teacher" if presence else "pixels",
    )
    return dataclasses.replace(config, loss=loss, mask=dataclasses.replace(config.mask, **mask))


@pytest.mark.parametrize("ways", SAME.values(), ids=SAME)
@pytest.mark.parametrize("presence", [0.0, 1.0])
def test_same_losses_and_gradients_as_the_trainer(presence: float, ways):
    config = configuration(presence)
    model, teacher, batch, queue = (
        small_model(config),
        make_teacher(small_model(config, seed=1)),
        small_batch(config, seed=3),
        some_queue(config),
    )
    draws = dict(sync_share=0.5, alpha=0.3, seed=SEED)
    ours, momentum = pretraining_losses(model, teacher, batch, queue, config, **draws)
    ours.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    with torch.no_grad():
        layout = baseline.PackedLayout.of_batch(batch)
        feats = (
            model.project_images(model.image(batch.pixels)),
            model.project_texts(model.text(batch.token_ids, layout), layout),
        )
    draw = batch.product_ids, config.batch.margin, config.loss.temperature
    negatives = (*sample_hard_negatives(*feats, *draw, SEED), *sample_hard_negatives(*reversed(feats), *draw, SEED + 1))
    with baseline.parents_layers(model, ways):
        theirs, their_momentum = baseline.baseline_losses(
            model, teacher, batch, queue, config, ways, negatives=negatives, **draws
        )
    theirs.total.backward()

    for name in PARTS:
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, equal_nan=True), name
    for a, b in zip(momentum, their_momentum, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale + 1e-6, name


def test_dropout_takes_a_tenth_of_the_students_texts_and_nothing_else():
    config = configuration(0.0)
    model, batch = small_model(config), small_batch(config)
    layout = baseline.PackedLayout.of_batch(batch)
    plain, image = model.text(batch.token_ids, layout), model.image(batch.pixels)
    seen = []
    with baseline.parents_layers(model, WAYS["dropout"]):
        for part in (model.text.norm, model.text.layers[0].attention.proj, model.text.layers[0].feed_forward.fc2):
            part.register_forward_hook(lambda _, given, out: seen.append(out == 0))
        dropped = [model.text(batch.token_ids, layout) for _ in range(20)]
        assert torch.allclose(model.image(batch.pixels), image, atol=1e-5)
    assert not torch.allclose(dropped[0], dropped[1], atol=1e-3)
    assert (torch.stack(dropped).mean(0) - plain).norm() < (dropped[0] - plain).norm() / 2
    for n in range(3):
        assert torch.cat(seen[n::3]).float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.allclose(model.text(batch.token_ids, layout), plain)


@pytest.mark.parametrize("dropout", [False, True])
def test_written_attention(dropout: bool, generator: torch.Generator):
    queries, keys = (baseline.PackedLayout.of(lengths) for lengths in ([3, 5, 1], [4, 2, 7]))
    q, k, v = (torch.randn(rows, 2, 8, generator=generator) for rows in (9, 13, 13))
    found = [baseline.written_attention(q, k, v, queries, keys, dropout=dropout) for _ in range(400 if dropout else 1)]
    assert torch.allclose(
        torch.stack(found).mean(0), baseline.encoders.attention(q, k, v, queries, keys), atol=0.1 if dropout else 1e-5
    )
    assert not dropout or not found[0].equal(found[1])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("token_score", "patch_score"), [("peak", "mean"), ("mass", "weighted"), ("cls", "cls"), ("output", "max")]
)
def test_masks_of_the_whole_map_are_the_operators(token_score: str, patch_score: str, layer: int):
    config = configuration(0.0, token_score=token_score, patch_score=patch_score, layer=layer)
    teacher, batch = small_model(config), small_batch(config, seed=5)
    layout = baseline.PackedLayout.of_batch(batch)
    with torch.no_grad():
        features = teacher, teacher.image(batch.pixels), teacher.text(batch.token_ids, layout), layout, config
        ours, *others = (baseline.teacher_masks(*features, WAYS[name]) for name in ("none", "maps", "full_teacher"))
    for other in others:
        assert ours.token_mask.equal(other.token_mask)
        assert ours.patch_mask.equal(other.patch_mask)
    assert torch.allclose(ours.patch_score, others[0].patch_score, atol=1e-6)


@pytest.mark.parametrize("margin", [-torch.inf, 0.0])
def test_negatives_sample_by_sample_are_of_other_products(generator: torch.Generator, margin: float):
    anchors, candidates = torch.nn.functional.normalize(torch.randn(2, 12, 4, generator=generator), dim=-1)
    ids = torch.arange(12) // 3
    index, some = baseline.sample_by_sample(anchors, candidates, ids, margin, 0.5, 0)
    assert some.all()
    assert (ids[index] != ids).all()
    similarity = anchors @ candidates.T
    fit = (ids[:, None] != ids) & (similarity < similarity.diagonal()[:, None] - margin)
    assert (fit.gather(1, index[:, None])[:, 0] | ~fit.any(1)).all()
    assert not baseline.sample_by_sample(anchors, candidates, ids * 0, margin, 0.5, 0)[1].any()


@pytest.mark.parametrize("name", ["none", "all"])
def test_a_step_learns(name: str):
    """From drawing negatives to the teacher's move."""
    config = configuration(1.0)
    model = small_model(config)
    batch = small_batch(config, seed=3)
    device = torch.device("cpu")
    optimizer, queue = (
        baseline.baseline_optimizer(model, config.optim, WAYS[name]),
        Queue.empty(config.loss.queue, config.embed_dim, device),
    )
    bank = FeatureBank.empty(PAIRS, config.embed_dim, device)
    state = TrainState(model, make_teacher(model), optimizer, queue, bank, torch.arange(PAIRS))
    before = [p.clone() for p in state.teacher.parameters()]
    found = [
        baseline.baseline_step(config, state, batch, WAYS[name], sync_share=1.0, alpha=0.2, seed=seed)
        for seed in range(12)
    ]
    assert found[-1].total < found[0].total
    assert any(not torch.equal(a, b) for a, b in zip(before, state.teacher.parameters(), strict=True))
    assert state.bank.filled.all()
