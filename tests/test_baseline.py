"""The plain ALBEF step of bench/baseline.py has the trainer's losses and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import baseline
from bench.baseline import BASELINES, Albef, BaselineOptions
from syncmask_fast import ops
from syncmask_fast.config import TrainConfig
from syncmask_fast.model.attention import attention
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.masking import maskable
from syncmask_fast.objective.memory import FeatureBank, make_teacher
from syncmask_fast.objective.negatives import sample_hard_negatives
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.training.checkpoint import TrainState
from tests.helpers import small_batch, small_config, small_model, small_queue

SEED = 1234
EXACT = {"written": BaselineOptions(dropout=0.0), "sdpa": BASELINES["albef-bf16-sdpa"]}


def small_case(presence: float = 0.0, stem: str = "patch", **mask) -> TrainConfig:
    """Return a small configuration with sync masks, semi-hard negatives and, if asked for, word presence."""
    config = small_config(masking="sync", batching="semi_hard")
    loss = dataclasses.replace(
        config.loss,
        presence=presence,
        presence_negatives=3,
        collages=presence / 2,
        mim_target="teacher" if presence else "pixels",
    )
    image = dataclasses.replace(config.image, stem=stem, patch=16 if stem == "conv" else config.image.patch)
    return dataclasses.replace(config, loss=loss, image=image, mask=dataclasses.replace(config.mask, **mask))


def state_of(config: TrainConfig, model: SyncMaskModel) -> TrainState:
    pairs = config.batch_size
    optimizer = baseline.baseline_optimizer(model, config.optim)
    bank = FeatureBank.empty(pairs, config.embed_dim, model.device)
    teacher = make_teacher(small_model(config, seed=1))  # another model, so that no one takes the wrong one
    return TrainState(model, teacher, optimizer, small_queue(config), bank, torch.arange(pairs))


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(("presence", "stem"), [(0.0, "patch"), (1.0, "patch"), (1.0, "conv")])
def test_losses_and_gradients(presence: float, stem: str, options: BaselineOptions):
    """With the trainer's masks and negatives, and without dropout, which is random."""
    config = small_case(presence, stem)
    model = small_model(config).eval()  # a conv stem's batch norm would see the two passes differently
    state, batch = state_of(config, model), small_batch(config, seed=3)
    schedule = Schedule(with_fusion=True, sync_probability=0.5, alpha=0.3, seed=SEED)
    ours, features = pretraining_losses(model, state.teacher, batch, state.queue, config, schedule)
    ours["total"].backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    with torch.no_grad():
        layout = PackedLayout.of_batch(batch)
        feats = (
            model.project_images(model.image(batch.pixels)),
            model.project_texts(model.text(batch.token_ids, layout), layout),
        )
    draw = batch.shard.product_ids, config.batch.margin, config.loss.temperature
    negatives = sample_hard_negatives(*feats, *draw, SEED), sample_hard_negatives(*reversed(feats), *draw, SEED + 1)
    theirs, their_features = baseline.baseline_losses(state, batch, config, schedule, options, negatives)
    theirs["total"].backward()

    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        assert torch.allclose(loss, theirs[name], rtol=1e-4, atol=1e-5), name
    for a, b in zip(features, their_features, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * scale + 1e-6, name


def test_dropout():
    """A tenth of the student's residuals and attention weights of texts; nothing of images and the teacher."""
    config = small_case()
    model, batch = small_model(config), small_batch(config)
    layout = PackedLayout.of_batch(batch)
    ids, valid = layout.pad(batch.token_ids), layout.valid
    exact, student = Albef(model, EXACT["written"]), Albef(model, BASELINES["albef"])
    assert torch.allclose(student.image(batch.pixels), exact.image(batch.pixels))
    plain, dropped = exact.text(ids, valid), torch.stack([student.text(ids, valid) for _ in range(20)])
    assert not torch.allclose(dropped[0], dropped[1], atol=1e-3)
    assert (dropped.mean(0) - plain).norm() < (dropped[0] - plain).norm() / 2
    assert student.dropout(torch.ones(100_000)).eq(0).float().mean() == pytest.approx(0.1, abs=0.01)
    with torch.no_grad():
        assert torch.allclose(student.text(ids, valid), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("sdpa", [False, True])
def test_attention(sdpa: bool, dropout: float, generator: torch.Generator):
    """Equal to the model's attention; on average with dropout, which SDPA does not have here."""
    lengths, width = [4, 2, 7], 8
    layout = PackedLayout.of(lengths)
    q = torch.randn(3, 5, 2, width, generator=generator)
    k, v = torch.randn(2, layout.total, 2, width, generator=generator)
    plain = Albef(small_model(small_case()), BaselineOptions(sdpa=sdpa, dropout=dropout))
    outputs = [plain.attention(q, layout.pad(k), layout.pad(v), layout.valid) for _ in range(400 if dropout else 1)]
    expected = attention(q, k, v, None, layout)
    assert torch.allclose(torch.stack(outputs).mean(0), expected, atol=0.1 if dropout else 1e-5)
    assert (dropout == 0 or sdpa) == outputs[0].equal(outputs[-1])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("token_score", "patch_score"), [("peak", "mean"), ("mass", "weighted"), ("cls", "cls"), ("output", "max")]
)
def test_masks(token_score: str, patch_score: str, layer: int):
    """Masks of the whole attention map are the operator's."""
    config = small_case(token_score=token_score, patch_score=patch_score, layer=layer)
    teacher, batch = small_model(config), small_batch(config, seed=5)
    layout, plain = PackedLayout.of_batch(batch), Albef(teacher, EXACT["written"])
    words = maskable(layout)
    with torch.no_grad():
        images, texts = plain.image(batch.pixels), plain.text(layout.pad(batch.token_ids), layout.valid)
        found = plain.masks(texts, layout.valid, images, words, config.mask)
        packed = layout.unpad(texts)
        q, k, v = teacher.fusion.cross_attention_qkv(packed, one_to_one(layout), images, layer)
    rules = {name: getattr(config.mask, name) for name in ("token_score", "patch_score", "token_ratio", "patch_ratio")}
    expected = ops.sync_mask(layout.pad(q).transpose(1, 2), k.transpose(1, 2), words, v=v.transpose(1, 2), **rules)
    assert found.token_mask.equal(expected.token_mask)
    assert found.patch_mask.equal(expected.patch_mask)
    assert torch.allclose(found.patch_score, expected.patch_score, atol=1e-6)


@pytest.mark.parametrize("margin", [-torch.inf, 0.0])
def test_negatives(generator: torch.Generator, margin: float):
    """Negatives are of other products and, where there are such, less similar than the true pair by the margin."""
    config = small_case()
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, margin=margin))
    anchors, candidates = torch.nn.functional.normalize(torch.randn(2, 12, 4, generator=generator), dim=-1)
    ids = torch.arange(12) // 3
    index, found = baseline.sample_negatives(anchors, candidates, ids, config)
    assert found.all()
    assert (ids[index] != ids).all()
    similarity = anchors @ candidates.T
    fits = (ids[:, None] != ids) & (similarity < similarity.diagonal()[:, None] - margin)
    assert (fits.gather(1, index[:, None])[:, 0] | ~fits.any(1)).all()
    assert not baseline.sample_negatives(anchors, candidates, ids * 0, config)[1].any()


@pytest.mark.parametrize("options", BASELINES.values(), ids=BASELINES)
def test_step_learns(options: BaselineOptions):
    """From drawing negatives to the teacher's update."""
    config = small_case(1.0)
    state, batch = state_of(config, small_model(config)), small_batch(config, seed=3)
    state.teacher = make_teacher(state.model)
    before = [parameter.clone() for parameter in state.teacher.parameters()]
    schedules = [Schedule(with_fusion=True, sync_probability=1.0, alpha=0.2, seed=seed) for seed in range(12)]
    steps = [baseline.baseline_step(state, batch, config, schedule, options) for schedule in schedules]
    assert steps[-1]["total"] < steps[0]["total"]
    assert any(not torch.equal(a, b) for a, b in zip(before, state.teacher.parameters(), strict=True))
    assert state.bank.filled.all()
