"""The Triton kernels of sync_mask against the reference in float64, on CUDA or under TRITON_INTERPRET=1.

Without either, `test_triton_interpreter.py` runs this file in a process of its own.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch

from syncmask_fast.kernels import library
from syncmask_fast.kernels import sync_mask_triton as launcher
from syncmask_fast.kernels.sync_mask import PATCH_SCORES, TOKEN_SCORES, SyncMask, sync_mask_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
__test__ = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # (B, H, T, P, D)
    (1, 1, 1, 1, 1),  # all ones
    (3, 3, 5, 9, 7),  # odd, and fewer samples than a launch holds
    (1, 5, 13, 31, 17),  # prime
    (1, 2, 17, 65, 64),  # one more than a small block of tokens and of patches
    (1, 1, 65, 257, 33),  # one more than the largest one-pass block: two passes, several tiles
    (3, 1, 64, 36, 128),  # one head: one launch
]


def draw(shape, generator, dtype=torch.float32, spread=1.0):
    b, h, t, p, d = shape
    q, k, v = ((torch.randn(b, h, n, d, generator=generator) * spread).to(dtype).to(DEVICE) for n in (t, p + 1, p + 1))
    maskable = torch.rand(b, t, generator=generator) < 0.7
    maskable[:, 0] = False
    return q, k, v, maskable.to(DEVICE)


def run(q, k, maskable, v=None, token_ratio=0.15, patch_ratio=0.5, token_score="peak", patch_score="max", scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return SyncMask(
        *launcher.sync_mask_triton(q, k, maskable, v, token_ratio, patch_ratio, token_score, patch_score, scale)
    )


def truth(q, k, maskable, v=None, **options):
    return sync_mask_reference(q.double(), k.double(), maskable, v=None if v is None else v.double(), **options)


def highest(score, among, count):
    """Indices of the `count` highest: NaN last, ties by index (Python's sort is stable)."""
    return sorted(among, key=lambda i: (math.isnan(score[i]), 0.0 if math.isnan(score[i]) else -score[i]))[:count]


def check(got, expected, maskable, rtol=2e-5, atol=1e-7):
    """Scores near the truth; masks are the highest of the kernel's own scores, as many as in the truth."""
    for mine, other in ((got.token_score, expected.token_score), (got.patch_score, expected.patch_score)):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other.float(), rtol=rtol, atol=atol, equal_nan=True)
    everything = torch.ones_like(got.patch_mask)
    for mask, score, other, eligible in (
        (got.token_mask, got.token_score, expected.token_mask, maskable),
        (got.patch_mask, got.patch_score, expected.patch_mask, everything),
    ):
        assert mask.dtype == torch.bool
        assert mask.is_contiguous()
        for marks, row, wanted, among in zip(mask.cpu(), score.cpu(), other.cpu(), eligible.cpu(), strict=True):
            best = highest(row.tolist(), among.nonzero()[:, 0].tolist(), int(wanted.sum()))
            assert marks.nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, generator):
    q, k, v, maskable = draw(shape, generator, dtype)
    for token_score, patch_score in zip(TOKEN_SCORES, PATCH_SCORES, strict=True):
        rules = {"v": v, "token_score": token_score, "patch_score": patch_score}
        check(run(q, k, maskable, **rules), truth(q, k, maskable, **rules), maskable)


@pytest.mark.parametrize(
    ("dtype", "token_score"),
    [(torch.bfloat16, "peak"), (torch.float32, "mass"), (torch.float16, "output")],  # one pass, two passes, with v
    ids=str,
)
def test_small(dtype, token_score, generator):
    """Each kernel once: the fast suite runs this under the interpreter."""
    q, k, v, maskable = draw((2, 3, 5, 9, 7), generator, dtype)
    rules = {"v": v, "token_score": token_score}
    check(run(q, k, maskable, **rules), truth(q, k, maskable, **rules), maskable)


def test_every_pair_of_rules(generator):
    q, k, v, maskable = draw((2, 2, 7, 10, 5), generator)
    maskable[1] = False  # a sample without a word: patch scores of "cls", no masked word
    for token_score, patch_score in itertools.product(TOKEN_SCORES, PATCH_SCORES):
        rules = {"v": v, "token_score": token_score, "patch_score": patch_score}
        got = run(q, k, maskable, **rules)
        check(got, truth(q, k, maskable, **rules), maskable)
        assert not got.token_mask[1].any()


def same(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 3, 9, 20, 8), (1, 2, 70, 130, 8)], ids=str)
def test_splits_do_not_show(shape, generator, monkeypatch):
    """One program a sample or one a head, both phases in one launch or in two: the same bits."""
    q, k, v, maskable = draw(shape, generator, torch.bfloat16)
    results = []
    for processors in (0.1, 1, 10_000):
        monkeypatch.setattr(library, "num_sms", lambda device, count=processors: count)
        results.append(run(q, k, maskable, v, token_score="output"))
    same(results[0], results[1])
    same(results[0], results[2])


def test_heads_per_program():
    assert launcher.heads_per_program(256, 12, 256) == 12  # fills the device by itself: one launch
    assert launcher.heads_per_program(1, 12, 132) == 1
    assert launcher.heads_per_program(4096, 1, 132) == 1
    assert all(1 <= launcher.heads_per_program(b, 7, 132) <= 7 for b in (2, 19, 38, 133, 1000))


@pytest.mark.parametrize("ratio", [0, 0.01, 0.15, 0.35, 0.5, 1])
def test_counts(ratio, generator):
    q, k, _, _ = draw((31, 1, 31, 13, 4), generator, torch.float16)
    maskable = torch.arange(31)[None] < torch.arange(31)[:, None]  # 0 to 30 words, in order
    got = run(q, k, maskable.to(DEVICE), token_ratio=ratio, patch_ratio=ratio)
    # 0.15 * 10 and 0.35 * 10 are halves in float64 and not in float32.
    assert got.token_mask.sum(1).tolist() == [
        min(m, max(1, math.floor(ratio * m + 0.5))) if ratio else 0 for m in range(31)
    ]
    assert got.patch_mask.sum(1).tolist() == [max(1, math.floor(ratio * 13 + 0.5)) if ratio else 0] * 31


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype):
    q, k, v = (torch.ones(2, 2, n, 4, dtype=dtype, device=DEVICE) for n in (40, 51, 51))
    maskable = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    maskable[:, 0] = False
    maskable[1, 2] = False
    for token_score, patch_score in zip(TOKEN_SCORES, PATCH_SCORES, strict=True):
        got = run(q, k, maskable, v, token_score=token_score, patch_score=patch_score)
        assert got.token_mask[0].nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5, 6]  # floor(0.15 * 39 + 0.5)
        assert got.token_mask[1].nonzero()[:, 0].tolist() == [1, 3, 4, 5, 6, 7]
        assert got.patch_mask[0].nonzero()[:, 0].tolist() == list(range(25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 9, 12, 16), (1, 1, 9, 300, 16)], ids=str)
def test_large_logits(shape, dtype, generator):
    q, k, v, maskable = draw(shape, generator, dtype, spread=60.0)
    q = (q * (12_000 / (q.float() @ k.float().mT * 0.25).abs().max())).to(dtype)
    assert (q.float() @ k.float().mT * 0.25).abs().max() > 1e4
    for token_score, patch_score in zip(TOKEN_SCORES, PATCH_SCORES, strict=True):
        rules = {"v": v, "token_score": token_score, "patch_score": patch_score}
        # A float32 logit of 1e4 is off by up to 1e-3, and so is the weight's relative error.
        check(run(q, k, maskable, **rules), truth(q, k, maskable, **rules), maskable, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patches", [8, 300], ids=str)
def test_nan(dtype, patches, generator):
    q, k, v, _ = draw((2, 2, 10, patches, 4), generator, dtype)
    maskable = torch.ones(2, 10, dtype=torch.bool, device=DEVICE)
    maskable[:, [0, 9]] = False
    q[:, :, 9] = math.nan  # padding may hold anything
    clean = run(q, k, maskable, v, token_score="output")
    assert not clean.patch_score.isnan().any()
    assert not clean.token_score.isnan().any()
    q[0, 1, 2:5] = math.nan  # three of eight words of sample 0, in one head
    for patch_score, (ratio, among_nan) in zip(PATCH_SCORES, ((0.5, 0), (6 / 8, 1), (1.0, 3), (6 / 8, 1)), strict=True):
        options = {"token_ratio": ratio, "patch_score": patch_score}
        got = run(q, k, maskable, **options)
        check(got, truth(q, k, maskable, **options), maskable)
        assert got.token_mask[0, 2:5].sum() == among_nan
        assert bool(got.patch_score[0].isnan().all()) == (patch_score != "cls")
    v[1, :, 0] = math.nan
    k[0, 0, patches] = math.nan  # every row of a head
    options = {"v": v, "token_score": "output"}
    check(run(q, k, maskable, **options), truth(q, k, maskable, **options), maskable)


def test_strides(generator):
    q, k, v, maskable = draw((3, 4, 6, 10, 8), generator, torch.bfloat16)
    plain = run(q, k, maskable, v, token_score="output")
    # As a projection leaves them, [B, T, H, D] seen as [B, H, T, D]; width outermost; every second sample.
    views = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        lambda x: x.repeat_interleave(2, 0)[::2],
    )
    for view in views:
        same(run(view(q), view(k), maskable.T.contiguous().T, view(v), token_score="output"), plain)
    one_image, one_text = k[:1].expand(3, -1, -1, -1), maskable[:1].expand(3, -1)
    same(run(q, one_image, one_text), run(q, one_image.contiguous(), one_text.contiguous()))


def test_empty_batch(generator):
    q, k, _, maskable = draw((0, 2, 6, 5, 4), generator)
    assert [tuple(x.shape) for x in run(q, k, maskable)] == [(0, 6), (0, 5), (0, 6), (0, 5)]


def test_scale(generator):
    q, k, v, maskable = draw((2, 2, 5, 6, 8), generator)
    for scale in (0.9, -0.4, 0.0):
        check(run(q, k, maskable, v, scale=scale), truth(q, k, maskable, v, scale=scale), maskable)


def test_available():
    assert library.has_triton(DEVICE)
