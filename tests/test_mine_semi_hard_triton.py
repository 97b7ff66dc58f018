"""The Triton kernels of mine_semi_hard against the reference in float64, on CUDA or under TRITON_INTERPRET=1.

Without either, `test_triton_interpreter.py` runs this file in a process of its own.
"""

from __future__ import annotations

import functools
import math
import os

import pytest
import torch

from syncmask_fast import ops
from syncmask_fast.kernels import library
from syncmask_fast.kernels import mine_semi_hard_triton as launcher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
__test__ = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # (N, M, D)
    (1, 1, 1),  # all ones
    (3, 2, 5),  # odd, and fewer candidates than k
    (31, 37, 11),  # prime
    (129, 65, 33),  # one more than a block of anchors and of candidates
    (5, 200, 257),  # several tiles and several chunks of D
    (65, 130, 200),  # the anchors stay, in half precision
]
run = functools.partial(ops.mine_semi_hard, backend="triton")


def draw(shape, generator, dtype=torch.float32):
    n, m, d = shape
    feats = [
        torch.nn.functional.normalize(torch.randn(rows, d, generator=generator), dim=1).to(dtype).to(DEVICE)
        for rows in (n, m)
    ]
    ids = [torch.randint(max(2, m // 3), (rows,), generator=generator).to(DEVICE) for rows in (n, m)]
    return *feats, *ids, torch.rand(n, generator=generator).to(DEVICE)


def draw_integers(n, m, generator, dtype=torch.float32):
    """Features whose similarities are small integers: exact in every order of summation, full of ties."""
    feats = [torch.randint(-2, 3, (rows, 6), generator=generator).to(dtype).to(DEVICE) for rows in (n, m)]
    ids = [torch.randint(7, (rows,), generator=generator).to(DEVICE) for rows in (n, m)]
    return *feats, *ids, torch.randint(0, 9, (n,), generator=generator).float().to(DEVICE)


def truth(args, **options):
    return ops.mine_semi_hard_reference(*(x.double() if x.is_floating_point() else x for x in args), **options)


def same(got, expected):
    assert got[0].equal(expected[0])
    assert got[1].equal(expected[1].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, generator):
    args = draw(shape, generator, dtype)
    for k, temperature in ((1, None), (5, 0.3)) if dtype == torch.float16 else ((5, None), (1, 0.3)):
        options = {"k": k, "margin": 0.02, "temperature": temperature, "seed": 11}
        index, score = run(*args, **options)
        truth_index, truth_score = truth(args, **options)
        assert (index.dtype, score.dtype) == (torch.int64, torch.float32)
        torch.testing.assert_close(score, truth_score.float(), rtol=1e-5, atol=1e-6)
        assert index.equal(truth_index)


@pytest.mark.parametrize(
    ("dtype", "width", "temperature"), [(torch.float32, 5, None), (torch.bfloat16, 130, None), (torch.float16, 5, 0.3)]
)
def test_small(dtype, width, temperature, generator):
    """Each kernel once, the anchors read in pieces and whole: the fast suite runs this under the interpreter."""
    args, options = draw((9, 12, width), generator, dtype), {"k": 2, "temperature": temperature, "seed": 11}
    index, score = run(*args, **options)
    truth_index, truth_score = truth(args, **options)
    torch.testing.assert_close(score, truth_score.float(), rtol=1e-5, atol=1e-6)
    assert index.equal(truth_index)


@pytest.mark.parametrize(
    ("k", "margin"), [(1, 0.0), (1, -math.inf), (3, 3.0), (16, -math.inf), (5, math.inf), (64, 0.0)]
)
def test_exact_with_ties(k, margin, generator):
    args = draw_integers(33, 70, generator, DTYPES[k % 3])
    same(run(*args, k=k, margin=margin), truth(args, k=k, margin=margin))


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("k", [1, 16])
def test_shares_do_not_show(k, temperature, generator, monkeypatch):
    """The candidates in one share, a few, and one share a tile; most of them twice."""
    anchors, candidates, anchor_ids, candidate_ids, positive = draw_integers(20, 75, generator)
    args = anchors, candidates.repeat(2, 1), anchor_ids, candidate_ids.repeat(2), positive
    for processors in (0, 1, 1000):
        monkeypatch.setattr(library, "num_sms", lambda device, count=processors: count)
        same(run(*args, k=k, temperature=temperature), truth(args, k=k, temperature=temperature))


def test_candidate_splits():
    assert launcher.candidate_splits(512, 1024, 16, 132) == 1
    assert launcher.candidate_splits(1, 1, 1, 132) == 1
    assert launcher.candidate_splits(1, 1024, 64, 132) == 16  # no more than the second kernel can put in order
    for blocks, tiles in ((1, 7), (3, 1000), (100, 100)):
        shares = launcher.candidate_splits(blocks, tiles, 16, 132)
        assert (shares - 1) * -(-tiles // shares) < tiles  # none is without a tile


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_empty(n, m):
    ids = [torch.zeros(rows, dtype=torch.int64, device=DEVICE) for rows in (n, m)]
    feats = [torch.zeros(rows, 4, device=DEVICE) for rows in (n, m)]
    index, score = run(*feats, *ids, torch.ones(n, device=DEVICE), k=3)
    assert index.shape == score.shape == (n, 3)
    assert index.eq(-1).all()
    assert score.eq(-math.inf).all()


def test_ids_all_equal(generator):
    anchors, candidates, *_, positive = draw((10, 90, 8), generator)
    ids = [torch.full((rows,), 2**40, device=DEVICE) for rows in (10, 90)]
    assert run(anchors, candidates, *ids, positive + 2, k=4)[0].eq(-1).all()
    assert (
        run(anchors, candidates, ids[0], ids[1] + 2**33, positive + 2, k=4)[0].ge(0).all()
    )  # the lower halves are equal


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_nan_and_infinity(temperature, generator):
    args = draw((6, 20, 8), generator)
    args[1][3], args[0][1], args[4][2] = math.nan, math.nan, math.nan
    args[4].add_(1)
    options = {"k": 20, "temperature": temperature, "seed": 2}
    index, score = run(*args, **options)
    expected = truth(args, **options)
    assert index.equal(expected[0])
    torch.testing.assert_close(score, expected[1].float())
    assert index[1:3].eq(-1).all()
    # A similarity that overflows to -inf is eligible, and the last of all.
    candidates = torch.tensor([[-3e38], [1.0], [-3e38], [2.0]], device=DEVICE)
    ids = torch.tensor([9], device=DEVICE), torch.tensor([1, 2, 3, 9], device=DEVICE)
    one = torch.full((1, 1), 1024.0, device=DEVICE), candidates, *ids, torch.tensor([1e30], device=DEVICE)
    index, score = run(*one, k=4, temperature=temperature)
    assert index.tolist() == [[1, 0, 2, -1]]
    assert score.tolist() == [[1024.0, -math.inf, -math.inf, -math.inf]]


def test_strides(generator):
    anchors, candidates, anchor_ids, candidate_ids, positive = draw((8, 70, 40), generator, torch.bfloat16)
    expected = run(anchors, candidates, anchor_ids, candidate_ids, positive, k=3)
    strided = (
        anchors.T.contiguous().T,
        torch.stack((candidates, candidates), 2)[:, :, 0],
        anchor_ids.repeat_interleave(2)[::2],
        candidate_ids.repeat_interleave(3)[::3],
        torch.stack((positive, positive), 1)[:, 0],
    )
    same(run(*strided, k=3), expected)
    index, _ = run(
        anchors[:1].expand(8, -1), candidates, anchor_ids[:1].expand(8), candidate_ids, positive[:1].expand(8), k=3
    )
    assert index.eq(index[:1]).all()


def test_draws_follow_the_distribution():
    """Two draws without replacement, by many anchors with the same five candidates."""
    s = torch.tensor([0.5, 0.1, -0.2, 0.3, 0.9], device=DEVICE)  # the last one is too similar
    n = 20_000 if DEVICE.type == "cuda" else 1_000
    ids = torch.full((n,), 9, device=DEVICE), torch.arange(5, device=DEVICE)
    args = torch.ones(n, 1, device=DEVICE), s[:, None], *ids, torch.full((n,), 0.8, device=DEVICE)
    index = run(*args, k=2, temperature=0.4, seed=7)[0].cpu()
    p = torch.softmax(s[:4].double().cpu() / 0.4, 0)
    pairs = (
        torch.zeros(16, dtype=torch.float64)
        .index_add_(0, index[:, 0] * 4 + index[:, 1], torch.ones(n, dtype=torch.float64))
        .view(4, 4)
    )
    expected = n * p[:, None] * p[None] / (1 - p[:, None])
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert pairs.diagonal().eq(0).all()
    assert ((pairs - expected) ** 2 / expected)[
        off_diagonal
    ].sum() < 31.3  # 0.1 % point of chi-squared with 11 degrees of freedom


def test_opcheck(generator):
    args = draw((9, 12, 4), generator)
    torch.library.opcheck(torch.ops.syncmask.mine_semi_hard_triton, (*args, 2, 0.1, 0.3, 3))

    def caller(*args):
        index, score = run(*args, k=2, temperature=0.2, seed=3)
        return index + 1, score * 2

    for a, b in zip(torch.compile(caller, fullgraph=True, backend="aot_eager")(*args), caller(*args), strict=True):
        assert a.equal(b)
    with pytest.raises(ValueError, match="k is 65; expected at most 64 for backend='triton'"):
        run(*args, k=65)
