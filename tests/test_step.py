"""One training step against the slow way: each sample alone, each pass of its own, nothing packed."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from syncmask_fast.data.loader import Batch
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import itc_loss, normalized_patches
from syncmask_fast.objective.masking import Masks, random_masks, sync_masks
from syncmask_fast.objective.memory import Features, Queue, make_teacher, update_teacher
from syncmask_fast.objective.negatives import sample_hard_negatives
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from tests.helpers import PAIRS, SEED, losses_of, small_batch, small_config, small_model, small_queue


class TestAgainstTheSlowWay:
    """The model, its teacher and the batch of all of them; the teacher is another model, so that no one takes the
    wrong one.
    """

    @pytest.fixture(
        params=[
            ("sync", 1.0, "pixels", "mask-tokens"),
            ("sync", 0.0, "teacher", "visible"),
            ("random", 0.5, "pixels", "mask-tokens"),
        ],
        ids=str,
    )
    def case(self, request: pytest.FixtureRequest):
        masking, share, target, copy = request.param
        base = small_config(masking=masking)
        loss = dataclasses.replace(base.loss, mim_target=target, mim_input=copy, itc=2.0, itm=3.0, mlm=5.0, mim=7.0)
        config = dataclasses.replace(base, loss=loss)
        model, teacher = small_model(config), make_teacher(small_model(config, seed=1))
        batch = small_batch(config, seed=3)
        with torch.no_grad():
            found, momentum = losses_of(config, model, batch, share=share, teacher=teacher)
        return config, model, teacher, batch, share, found, momentum

    @staticmethod
    def texts(batch: Batch) -> list[Tensor]:
        return list(batch.token_ids.split(batch.lengths))

    @classmethod
    def masks(cls, case) -> Masks:
        """The masks that the seed gives; share 0 or 1 makes the blend all of one kind."""
        config, model, teacher, batch, share, *_ = case
        layout = PackedLayout.of(batch.lengths)
        if config.masking == "sync" and share == 1:
            with torch.no_grad():
                return sync_masks(
                    teacher, teacher.image(batch.pixels), teacher.text(batch.token_ids, layout), layout, config.mask
                )
        return random_masks(layout, model.image.patches, config.mask, torch.Generator().manual_seed(SEED))

    @staticmethod
    @torch.no_grad()
    def fused(model: SyncMaskModel, ids: Tensor, pixels: Tensor) -> Tensor:
        alone = PackedLayout.of([len(ids)])
        return model.fusion(model.text(ids, alone), one_to_one(alone), model.image(pixels[None]))

    @staticmethod
    @torch.no_grad()
    def features(model: SyncMaskModel, batch: Batch) -> tuple[Tensor, Tensor]:
        images = torch.cat([model.project_images(model.image(x[None])) for x in batch.pixels])
        texts = [
            model.project_texts(model.text(ids, PackedLayout.of([len(ids)])), PackedLayout.of([len(ids)]))
            for ids in batch.token_ids.split(batch.lengths)
        ]
        return images, torch.cat(texts)

    def test_itc(self, case):
        config, model, teacher, batch, _, found, momentum = case
        for ours, slow in zip(momentum, self.features(teacher, batch), strict=True):
            assert torch.allclose(ours, slow, atol=1e-5)
        feats = (*self.features(model, batch), *self.features(teacher, batch))
        student, teacher_feats = Features(*feats[:2]), Features(*feats[2:])
        queue, ids = small_queue(config), batch.shard.product_ids
        slow = itc_loss(student, teacher_feats, ids, queue, model.temperature, 0.3, slice(0, PAIRS))
        assert found["itc"].item() == pytest.approx(slow.sum.item() / PAIRS, rel=1e-4)

    def test_itm(self, case):
        config, model, _, batch, _, found, _ = case
        images, texts = self.features(model, batch)
        draw = (batch.shard.product_ids, config.batch.margin, config.loss.temperature)
        negative_text, has_text = sample_hard_negatives(images, texts, *draw, SEED)
        negative_image, has_image = sample_hard_negatives(texts, images, *draw, SEED + 1)
        assert has_text.all()
        assert has_image.all()
        pairs = [(i, i, 1) for i in range(PAIRS)]
        pairs += [(i, int(negative_text[i]), 0) for i in range(PAIRS)]
        pairs += [(int(negative_image[i]), i, 0) for i in range(PAIRS)]
        ids, total = self.texts(batch), 0.0
        for image, text, matched in pairs:
            logits = model.itm_head(self.fused(model, ids[text], batch.pixels[image])[0]).double()
            total -= logits.log_softmax(0)[matched].item()
        assert found["itm"].item() == pytest.approx(total / len(pairs), rel=1e-4)

    def test_mlm_sees_the_full_image_and_the_masked_text(self, case):
        _, model, _, batch, _, found, _ = case
        masks, total, count = self.masks(case), 0.0, 0
        for i, ids in enumerate(self.texts(batch)):
            at = masks.token_mask[i, : len(ids)].nonzero()[:, 0]
            hidden = ids.index_fill(0, at, model.mask_id)
            logits = model.mlm_head(
                self.fused(model, hidden, batch.pixels[i])[at], model.text.word_embeddings.weight
            ).double()
            total += F.cross_entropy(logits, ids[at], reduction="sum").item()
            count += len(at)
        assert count >= PAIRS
        assert found["mlm"].item() == pytest.approx(total / count, rel=1e-4)

    def test_mim_sees_the_full_text_and_the_masked_image(self, case):
        config, model, teacher, batch, _, found, _ = case
        masks, errors = self.masks(case), []
        for i, ids in enumerate(self.texts(batch)):
            alone, pixels, mask = PackedLayout.of([len(ids)]), batch.pixels[i : i + 1], masks.patch_mask[i : i + 1]
            at = mask[0].nonzero()[:, 0]
            with torch.no_grad():
                text = model.text(ids, alone)
                if config.loss.mim_input == "visible":
                    vit = model.image.vit
                    rows = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + (~mask[0]).nonzero()[:, 0]])
                    seen = vit.norm(vit.blocks(vit._pos_embed(vit.patch_embed(pixels))[:, rows]))
                    predicted = model.mim_head(model.image.mask_token_queries(at[None]), text, alone, seen)
                else:
                    predicted = model.mim_head(model.image(pixels, mask)[1:, 1 + at], text, alone)
                if config.loss.mim_target == "pixels":
                    target = normalized_patches(pixels, config.image.patch, at[None])
                else:
                    full = teacher.image(pixels)[:, 1 + at]
                    target = (full - full.mean(-1, keepdim=True)) / (
                        full.var(-1, correction=0, keepdim=True) + 1e-5
                    ).sqrt()
            errors.append((predicted - target).double() ** 2)
        assert found["mim"].item() == pytest.approx(torch.cat(errors).mean().item(), rel=1e-4)

    def test_total_is_the_weighted_sum(self, case):
        found = case[5]
        assert found["total"].item() == pytest.approx(
            (2 * found["itc"] + 3 * found["itm"] + 5 * found["mlm"] + 7 * found["mim"]).item(), rel=1e-6
        )


@pytest.mark.parametrize(
    ("target", "copy"), [("pixels", "mask-tokens"), ("teacher", "mask-tokens"), ("pixels", "visible")]
)
@pytest.mark.parametrize("masking", ["sync", "random", "none"])
def test_every_parameter_learns(masking: str, target: str, copy: str):
    config = small_config(masking=masking)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, mim_target=target, mim_input=copy))
    model = small_model(config)
    found, _ = losses_of(config, model, small_batch(config))
    found["total"].backward()
    assert all(x.isfinite() for x in found.values())
    assert ("mlm" in found) == ("mim" in found) == (masking != "none")
    masked_only = ("image.mask_token", "mlm_head.", "mim_head.")
    for name, parameter in model.named_parameters():
        learns = masking != "none" or not name.startswith(masked_only)
        assert (
            parameter.grad is not None and bool(parameter.grad.isfinite().all() and parameter.grad.any())
        ) == learns, name


@pytest.mark.parametrize(("stem", "ratio"), [("patch", 0.5), ("conv", 0.5), ("patch", 1.0)])
def test_mim_of_visible_copies_learns_from_image_and_text(stem: str, ratio: float):
    """A batch by heart, by MIM alone: every part that it goes through moves, and the error falls.

    With nothing visible there is the text alone.
    """
    config = small_config(masking="random")
    config = dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, mim_input="visible", itc=0.0, itm=0.0, mlm=0.0),
        mask=dataclasses.replace(config.mask, patch_ratio=ratio),
        image=dataclasses.replace(config.image, patch=16, stem=stem),
    )
    model, batch = small_model(config), small_batch(config)
    teacher, optimizer = make_teacher(model), torch.optim.AdamW(model.parameters(), 3e-3)
    errors = []
    for _ in range(20):
        found, _ = losses_of(config, model, batch, teacher=teacher)
        found["total"].backward()
        errors.append(found["mim"].item())
        parts = [
            model.image.vit.blocks[0].attn.qkv,
            model.text.layers[0].attention.qkv,
            model.mim_head.visible_attention.kv,
        ]
        if ratio < 1:  # otherwise there is [CLS] alone to look at, however it is asked for
            parts.append(model.mim_head.visible_attention.q)
        assert all(part.weight.grad.any() for part in parts)
        optimizer.step()
        optimizer.zero_grad()
    assert errors[-1] < 0.9 * errors[0]


def test_rows_that_fill_up_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """As in bfloat16, here in float32. Fewer positions than the largest filling: it must come in several sequences."""
    config = small_config(masking="sync")
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, presence=1.0, presence_negatives=3))
    model, batch, outcomes = small_model(config), small_batch(config), []
    for multiple in (1, 2, 64, 1000):
        for module in ("layout", "encoders"):
            monkeypatch.setattr(f"syncmask_fast.model.{module}.rows_multiple", lambda device, n=multiple: n)
        model.zero_grad()
        found, _ = losses_of(config, model, batch)
        found["total"].backward()
        outcomes.append((found, [p.grad.clone() for p in model.parameters()]))
    for found, gradients in outcomes[1:]:
        for name, value in found.items():
            assert torch.allclose(value, outcomes[0][0][name], rtol=1e-5), name
        for ours, exact in zip(gradients, outcomes[0][1], strict=True):
            assert (ours - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-7


def test_alignment_alone_leaves_the_fusion_out():
    config = small_config()
    model = small_model(config)
    found, _ = losses_of(config, model, small_batch(config), fuse=False)
    found["total"].backward()
    assert found["total"] == found["itc"] * config.loss.itc
    assert found["itc"].item() == pytest.approx(
        losses_of(config, model, small_batch(config))[0]["itc"].item(), rel=1e-5
    )
    later = ("image.mask_token", "fusion.", "itm_head.", "mlm_head.", "mim_head.")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(later), name


@pytest.mark.parametrize("fuse", [True, False])
def test_presence_is_added_and_teaches_the_first_cross_attention(fuse: bool):
    config = small_config()
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, presence=11.0, presence_negatives=3))
    model, batch = small_model(config), small_batch(config)
    found, _ = losses_of(config, model, batch, fuse=fuse)
    without, _ = losses_of(small_config(), model, batch, fuse=fuse)
    assert found["total"].item() == pytest.approx((without["total"] + 11 * found["presence"]).item(), rel=1e-5)
    assert "presence" not in without
    found["total"].backward()
    assert model.fusion.layers[0].cross.q.weight.grad.any()
    assert model.fusion.layers[0].attention.qkv.weight.grad.any()


def test_collages_add_to_presence_and_teach_the_image_encoder_too():
    config = small_config()
    plain = dataclasses.replace(config, loss=dataclasses.replace(config.loss, itc=0.0, presence=1.0))
    cut = dataclasses.replace(plain, loss=dataclasses.replace(plain.loss, collages=0.5))
    model, batch = small_model(config), small_batch(config)
    without, found = (losses_of(c, model, batch, fuse=False)[0] for c in (plain, cut))
    assert found["presence"].item() == pytest.approx(without["presence"].item(), rel=1e-5)
    assert found["total"].item() == pytest.approx((without["total"] + found["collage"]).item(), rel=1e-5)
    found["total"].backward()
    assert model.image.vit.pos_embed.grad.any()


def test_presence_compares_with_every_other_image_where_there_are_few():
    config = small_config()
    model, batch, losses = small_model(config), small_batch(config), []
    for images in (PAIRS - 1, 100):
        changed = dataclasses.replace(
            config, loss=dataclasses.replace(config.loss, presence=1.0, presence_negatives=images)
        )
        losses.append(losses_of(changed, model, batch))
    assert losses[0][0]["presence"].item() == pytest.approx(losses[1][0]["presence"].item(), rel=1e-5)


def test_the_teacher_is_not_asked_where_nobody_needs_it(monkeypatch: pytest.MonkeyPatch):
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    teacher = make_teacher(small_model(config, seed=1))
    empty = Queue.empty(0, config.embed_dim, torch.device("cpu"))
    schedule = Schedule(with_fusion=False, sync_probability=0.0, alpha=0.0, seed=SEED)
    monkeypatch.setattr(teacher.image, "forward", lambda *_: pytest.fail("the teacher was asked"))
    found, momentum = pretraining_losses(model, teacher, batch, empty, config, schedule)
    assert found["itc"].isfinite()
    assert not momentum.images.requires_grad
    assert torch.allclose(momentum.images, model.project_images(model.image(batch.pixels)), atol=1e-6)


def test_draws_follow_the_seed():
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    first, again, other = (losses_of(config, model, batch, seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert first["itc"] == other["itc"]  # nothing is drawn for ITC
    assert first["mlm"] != other["mlm"]
    assert first["mim"] != other["mim"]


def test_one_product_in_the_batch_has_no_negatives():
    config = small_config()
    batch = small_batch(config)
    one_product = torch.zeros(PAIRS, dtype=torch.int64)
    batch.shard = dataclasses.replace(batch.shard, product_ids=one_product)
    model = small_model(config)
    found, _ = losses_of(config, model, batch)
    assert all(x.isfinite() for x in found.values())
    ids = batch.token_ids.split(batch.lengths)
    slow = 0.0
    for i in range(PAIRS):
        slow -= (
            model.itm_head(TestAgainstTheSlowWay.fused(model, ids[i], batch.pixels[i])[0])
            .double()
            .log_softmax(0)[1]
            .item()
            / PAIRS
        )
    assert found["itm"].item() == pytest.approx(slow, rel=1e-4)


@pytest.mark.parametrize("lengths", [[2, 2], [3, 2, 3], [24, 2, 3]])
def test_texts_with_hardly_a_word(lengths: list[int]):
    """No word to mask in some or all texts: losses stay finite."""
    config = small_config()
    pairs = len(lengths)
    ids = torch.cat([torch.tensor([2, *([7] * (n - 2)), 3]) for n in lengths])
    starts, places = PackedLayout.of(lengths).cu_seqlens, torch.arange(pairs)
    shard = BatchShard.whole(lengths, places, places)
    batch = Batch(torch.randn(pairs, 3, 48, 48), ids, starts, lengths, places, np.arange(pairs), places, shard)
    model = small_model(config)
    found, _ = losses_of(config, model, batch, share=1.0)
    found["total"].backward()
    assert all(x.isfinite() for x in found.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("margin", [-torch.inf, 0.0, 0.2])
def test_negatives_are_other_products_and_less_similar_where_there_are_such(generator: torch.Generator, margin: float):
    anchors, candidates = F.normalize(torch.randn(2, 24, 4, generator=generator), dim=-1)
    candidates[5] = -anchors[5]  # nothing is less similar than this true pair
    ids = torch.randint(0, 5, (24,), generator=generator)
    similarity = anchors.double() @ candidates.double().T
    fit = (ids[:, None] != ids) & (similarity < similarity.diagonal()[:, None] - margin)
    for seed in range(40):
        index, some = sample_hard_negatives(anchors, candidates, ids, margin, 0.5, seed)
        assert some.all()
        assert (ids[index] != ids).all()
        for i in range(24):
            assert fit[i, index[i]] or not fit[i].any()
    assert fit.any(1).all() == (margin == -torch.inf)  # otherwise the fallback was seen too
    first, again = (sample_hard_negatives(anchors, candidates, ids, margin, 0.5, 3)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_negatives_are_drawn_in_proportion_to_their_similarity():
    """One anchor, three candidates of other products: shares as in a softmax, the fourth is its own product."""
    anchors = torch.tensor([[1.0, 0.0]]).expand(4000, 2)
    angle = torch.tensor([0.3, 0.8, 1.2, 0.0])
    others = torch.stack([angle.cos(), angle.sin()], dim=1)
    # Rows are the anchors' own pairs, so that only the first four candidates are of other products.
    candidates = torch.cat([others, torch.tensor([[1.0, 0.0]]).expand(3996, 2)])
    ids = torch.tensor([1, 2, 3, *([0] * 3997)])
    index, some = sample_hard_negatives(anchors, candidates, ids, -torch.inf, 0.5, 11)
    assert some.all()
    drawn = index[3:].bincount(minlength=3)[:3] / 3997
    expected = (others[:3, 0] / 0.5).softmax(0)
    assert (drawn - expected).abs().max() < 6 * 0.5 / 4000**0.5


def test_no_other_product_is_no_negative(generator: torch.Generator):
    anchors, candidates = torch.randn(2, 5, 4, generator=generator)
    index, some = sample_hard_negatives(anchors, candidates, torch.full((5,), 7), 0.0, 0.1, 0)
    assert not some.any()
    assert ((index >= 0) & (index < 5)).all()  # safe to gather with


def test_update_teacher(generator: torch.Generator):
    config = small_config()
    model = small_model(config)
    teacher = make_teacher(small_model(config, seed=1))
    assert not any(p.requires_grad for p in teacher.parameters())
    weights = copy.deepcopy(model.state_dict())
    # Early on the teacher follows faster than the 0.9 asked for.
    for step, asked, momentum in ((10**6, 0.9, 0.9), (40, 0.9, 41 / 50), (0, 0.9, 0.1), (10**6, 0.0, 0.0)):
        before = copy.deepcopy(teacher.state_dict())
        update_teacher(teacher, model, asked, step)
        for name, value in teacher.state_dict().items():
            expected = momentum * before[name].double() + (1 - momentum) * weights[name].double()
            assert torch.allclose(value.double(), expected, atol=1e-6), name
            assert torch.equal(model.state_dict()[name], weights[name])


def test_update_teacher_takes_running_statistics_over():
    config = small_config(image=dataclasses.replace(small_config().image, patch=16, stem="conv"))
    model = small_model(config)
    teacher = make_teacher(model)
    model.image(torch.randn(4, 3, 48, 48))
    assert any(not torch.equal(a, b) for a, b in zip(model.buffers(), teacher.buffers(), strict=True))
    update_teacher(teacher, model, 0.9, 100)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), teacher.buffers(), strict=True))
