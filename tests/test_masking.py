"""Masks have the contracted size, lie on words and patches only, and sync masks are those of the operator on each
sample alone.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from syncmask_fast import ops
from syncmask_fast.config import MaskConfig
from syncmask_fast.model.layout import PackedLayout, one_to_one
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.masking import (
    Masks,
    maskable,
    mix_masks,
    num_masked,
    random_masks,
    sync_masks,
    sync_probability,
)
from syncmask_fast.objective.presence import random_rectangles
from tests.helpers import small_config, small_tokenizer

LENGTHS = [7, 3, 24, 2, 5, 13]  # one word, no word at all, the longest text there may be
PATCHES = 16


@pytest.fixture(scope="module")
def teacher() -> SyncMaskModel:
    torch.manual_seed(5)
    return SyncMaskModel(small_config(), small_tokenizer()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def features(teacher: SyncMaskModel) -> tuple[torch.Tensor, torch.Tensor, PackedLayout]:
    generator = torch.Generator().manual_seed(6)
    layout = PackedLayout.of(LENGTHS)
    ids = torch.randint(5, teacher.config.text.vocab_size, (layout.total,), generator=generator)
    pixels = torch.randn(len(LENGTHS), 3, 48, 48, generator=generator)
    return teacher.image(pixels), teacher.text(ids, layout), layout


def contracted(ratio: float, of: int) -> int:
    """floor(ratio * of + 0.5), at least 1, where there is something and the ratio is not 0."""
    return 0 if ratio == 0 or of == 0 else max(1, math.floor(ratio * of + 0.5))


def assert_contract(masks: Masks, config: MaskConfig, lengths: list[int], patches: int) -> None:
    assert masks.token_mask.shape == (len(lengths), max(lengths))
    assert masks.patch_mask.shape == (len(lengths), patches)
    for words, n in zip(masks.token_mask, lengths, strict=True):
        assert words.sum() == contracted(config.token_ratio, n - 2) == num_masked(config.token_ratio, n - 2)
        assert not words[0]
        assert not words[n - 1 :].any()
    assert (masks.patch_mask.sum(1) == contracted(config.patch_ratio, patches)).all()


@pytest.mark.parametrize(
    ("token_ratio", "patch_ratio"), [(0.15, 0.5), (0.0, 0.3), (0.5, 0.0), (1.0, 1.0), (0.01, 0.01)]
)
def test_sizes_and_places(teacher, features, generator, token_ratio: float, patch_ratio: float):
    config = MaskConfig(token_ratio=token_ratio, patch_ratio=patch_ratio, layer=2)
    images, text, layout = features
    random = random_masks(layout, PATCHES, config, generator)
    sync = sync_masks(teacher, images, text, layout, config)
    assert_contract(random, config, LENGTHS, PATCHES)
    assert_contract(sync, config, LENGTHS, PATCHES)
    for share in (0.0, 0.5, 1.0):
        assert_contract(mix_masks(sync, random, share, generator), config, LENGTHS, PATCHES)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.45, 0.55, 0.7])
def test_sizes_agree_for_every_length(generator, ratio: float):
    """What the host counts and what the device masks is the same number: also where ratio * words falls on a half."""
    lengths = list(range(2, 260))
    config = MaskConfig(token_ratio=ratio, patch_ratio=ratio)
    masks = random_masks(PackedLayout.of(lengths), 7, config, generator)
    assert masks.token_mask.sum(1).tolist() == [num_masked(ratio, n - 2) for n in lengths]
    truth = ops.sync_mask(
        torch.zeros(len(lengths), 1, 259, 4),
        torch.zeros(len(lengths), 1, 8, 4),
        maskable(PackedLayout.of(lengths)),
        token_ratio=ratio,
        token_score="peak",
    )
    assert truth.token_mask.sum(1).tolist() == [num_masked(ratio, n - 2) for n in lengths]


def test_random_masks_are_uniform_and_follow_the_seed():
    layout, config = PackedLayout.of([8] * 3000), MaskConfig(token_ratio=0.5, patch_ratio=0.25)
    first, again, other = (random_masks(layout, 8, config, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.token_mask, again.token_mask)
    assert torch.equal(first.patch_mask, again.patch_mask)
    assert not torch.equal(first.token_mask, other.token_mask)
    # Six standard deviations of a share over 3,000 samples.
    assert (first.token_mask[:, 1:7].float().mean(0) - 0.5).abs().max() < 6 * 0.5 / 3000**0.5
    assert (first.patch_mask.float().mean(0) - 0.25).abs().max() < 6 * 0.44 / 3000**0.5


def test_blend_takes_whole_samples():
    n = 4000
    sync = Masks(
        torch.ones(n, 3, dtype=torch.bool), torch.ones(n, 5, dtype=torch.bool), torch.zeros(n, 3), torch.zeros(n, 5)
    )
    random = Masks(*(torch.zeros_like(x) for x in sync))
    none, all_, some, again = (
        mix_masks(sync, random, share, torch.Generator().manual_seed(7)) for share in (0.0, 1.0, 0.3, 0.3)
    )
    assert not none.token_mask.any()
    assert not none.patch_mask.any()
    assert all_.token_mask.all()
    assert all_.patch_mask.all()
    assert torch.equal(some.token_mask.all(1), some.token_mask.any(1))
    assert torch.equal(some.token_mask.all(1), some.patch_mask.all(1))
    assert torch.equal(some.patch_mask.all(1), some.patch_mask.any(1))
    assert torch.equal(some.token_mask, again.token_mask)
    assert abs(some.token_mask[:, 0].float().mean().item() - 0.3) < 6 * 0.46 / n**0.5


@pytest.mark.parametrize(
    ("token_score", "patch_score", "layer"),
    [("output", "max", 1), ("output", "mean", 2), ("peak", "weighted", 2), ("mass", "cls", 2)],
)
def test_sync_masks_are_those_of_each_sample_alone(teacher, features, token_score: str, patch_score: str, layer: int):
    images, text, layout = features
    config = MaskConfig(layer=layer, token_score=token_score, patch_score=patch_score, token_ratio=0.4, patch_ratio=0.4)
    found = sync_masks(teacher, images, text, layout, config)
    for n, length in enumerate(LENGTHS):
        alone = PackedLayout.of([length])
        x, image = text[int(layout.cu_seqlens[n]) : int(layout.cu_seqlens[n + 1])], images[n : n + 1]
        for earlier in teacher.fusion.layers[: layer - 1]:
            x = earlier(x, one_to_one(alone), image)
        block = teacher.fusion.layers[layer - 1]
        x = block.attention(x, alone)
        heads = teacher.config.text.heads
        q = block.cross.q(x).reshape(1, length, heads, -1).transpose(1, 2)
        k, v = (y.reshape(1, PATCHES + 1, heads, -1).transpose(1, 2) for y in block.cross.kv(image).chunk(2, dim=-1))
        allowed = torch.tensor([[0 < i < length - 1 for i in range(length)]])
        values = v if token_score == "output" else None
        truth = ops.sync_mask(
            q, k, allowed, v=values, token_ratio=0.4, patch_ratio=0.4, token_score=token_score, patch_score=patch_score
        )
        assert torch.equal(found.token_mask[n, :length], truth.token_mask[0])
        assert torch.equal(found.patch_mask[n], truth.patch_mask[0])
        assert torch.allclose(found.token_score[n, 1 : length - 1], truth.token_score[0, 1 : length - 1], atol=1e-5)
        assert torch.allclose(found.patch_score[n], truth.patch_score[0], atol=1e-5)
        assert found.token_score[n, [0, length - 1]].isneginf().all()


def test_the_read_layer_matters(teacher, features):
    images, text, layout = features
    config = MaskConfig(layer=1)
    one, two = (sync_masks(teacher, images, text, layout, dataclasses.replace(config, layer=n)) for n in (1, 2))
    assert not torch.allclose(one.patch_score, two.patch_score, atol=1e-4)


def test_sync_share():
    for progress, share in ((0, 0), (0.1, 0), (0.25, 0.5), (0.4, 1), (0.9, 1), (0.175, 0.25)):
        assert sync_probability(progress, (0.1, 0.4)) == pytest.approx(share)
    assert [sync_probability(p, (0.3, 0.3)) for p in (0.0, 0.29, 0.3, 1.0)] == [0, 0, 1, 1]
    assert sync_probability(0.0, (0.0, 0.0)) == 1  # sync from the first step
    assert sync_probability(0.999, (1.0, 1.0)) == 0  # never


@pytest.mark.parametrize("grid", [(6, 6), (2, 3), (16, 16), (7, 5)])
def test_random_rectangles(grid: tuple[int, int], generator: torch.Generator):
    found = random_rectangles(500, grid, generator).view(500, *grid)
    assert torch.equal(found, found.any(2)[:, :, None] & found.any(1)[:, None, :])  # rows x columns
    for axis, side in ((2, grid[0]), (1, grid[1])):
        lines = found.any(axis)
        lengths = lines.sum(1)
        low, high = math.ceil(side / 3), max(math.ceil(side / 3), 2 * side // 3)
        assert set(lengths.tolist()) == set(range(low, high + 1))
        assert (lines.int().diff(dim=1).abs().sum(1) <= 2).all()  # in one piece
        assert lines.any(0).all()  # anywhere
