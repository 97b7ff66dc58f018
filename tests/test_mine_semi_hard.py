"""mine_semi_hard against a float64 oracle of plain loops, written from the contract only."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from syncmask_fast import _native, ops
from syncmask_fast.kernels import mine_semi_hard as module

# (N, M, D): all ones; fewer candidates than k; odd; primes; around powers of two; one more than the C++ kernel's tile
# (14 x 32, 6 x 16 or 4 x 8).
SHAPES = [(1, 1, 1), (3, 2, 5), (9, 15, 7), (15, 33, 17), (31, 37, 11), (63, 65, 33), (65, 127, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def mine(backend):
    return functools.partial(ops.mine_semi_hard, backend=backend)


def draw(shape, generator, dtype=torch.float32):
    n, m, d = shape
    anchors = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1).to(dtype)
    candidates = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1).to(dtype)
    products = max(2, m // 3)
    anchor_ids = torch.randint(products, (n,), generator=generator)
    candidate_ids = torch.randint(products, (m,), generator=generator)
    positive = torch.rand(n, generator=generator)
    return anchors, candidates, anchor_ids, candidate_ids, positive


def draw_integers(n, m, generator, products=7):
    """Features whose similarities are small integers: exact in every order of summation, full of ties."""
    anchors, candidates = (torch.randint(-2, 3, (rows, 6), generator=generator).float() for rows in (n, m))
    ids = [torch.randint(products, (rows,), generator=generator) for rows in (n, m)]
    return anchors, candidates, *ids, torch.randint(0, 9, (n,), generator=generator).float()


def oracle(anchors, candidates, anchor_ids, candidate_ids, positive, k, margin):
    """(index, score) in float64, one pair at a time."""
    index = torch.full((len(anchors), k), -1)
    score = torch.full((len(anchors), k), -math.inf, dtype=torch.float64)
    for i in range(len(anchors)):
        eligible = []
        for j in range(len(candidates)):
            s = float((anchors[i].double() * candidates[j].double()).sum())
            if candidate_ids[j] != anchor_ids[i] and s < float(positive[i]) - margin:
                eligible.append((-s, j))
        for place, (negative, j) in enumerate(sorted(eligible)[:k]):
            index[i, place], score[i, place] = j, -negative
    return index, score


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 5])
def test_matches_reference(shape, dtype, k, generator, mine):
    args = draw(shape, generator, dtype)
    index, score = mine(*args, k=k, margin=0.07)
    truth_index, truth_score = oracle(*args, k, 0.07)
    assert (index.dtype, score.dtype) == (torch.int64, torch.float32)
    torch.testing.assert_close(score, truth_score.float(), rtol=1e-5, atol=1e-6)
    assert index.equal(truth_index)


@pytest.mark.parametrize("k", [1, 2, 3, 17, 40, 60])
@pytest.mark.parametrize("margin", [0.0, 3.0, -math.inf, math.inf])
def test_exact_with_ties(k, margin, generator, mine):
    args = draw_integers(33, 40, generator)
    truth_index, truth_score = oracle(*args, k, margin)
    for dtype in DTYPES:
        feats = [x.to(dtype) for x in args[:2]]
        index, score = mine(*feats, *args[2:], k=k, margin=margin)
        assert index.equal(truth_index)
        assert score.equal(truth_score.float())
    if margin == math.inf:
        assert index.eq(-1).all()


def test_all_scores_equal(mine):
    ones = torch.ones(4, 3)
    ids = torch.arange(4)
    index, score = mine(ones, ones, ids, ids, torch.full((4,), 9.0), k=2)
    assert index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert score.eq(3).all()


def test_float64_reference(generator):
    args = draw((20, 30, 8), generator, torch.float64)
    index, score = ops.mine_semi_hard_reference(*args, k=4, margin=0.01)
    truth_index, truth_score = oracle(*args, 4, 0.01)
    assert score.dtype == torch.float64
    assert index.equal(truth_index)
    torch.testing.assert_close(score, truth_score, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_empty(n, m, temperature, mine):
    ids = torch.zeros(n, dtype=torch.int64), torch.ones(m, dtype=torch.int64)
    index, score = mine(torch.zeros(n, 4), torch.zeros(m, 4), *ids, torch.ones(n), k=3, temperature=temperature)
    assert index.shape == score.shape == (n, 3)
    assert index.eq(-1).all()
    assert score.eq(-math.inf).all()


def test_threshold_is_strict(mine):
    candidates = torch.tensor([[1.0], [2.0], [3.0]])
    ids = torch.tensor([7]), torch.tensor([1, 2, 3])
    index, _ = mine(torch.ones(1, 1), candidates, *ids, torch.tensor([3.0]), margin=1.0, k=3)
    assert index.tolist() == [[0, -1, -1]]  # 2 < 3 - 1 does not hold


def test_nan_is_not_eligible(generator, mine):
    anchors, candidates, anchor_ids, candidate_ids, positive = draw((6, 20, 8), generator)
    candidates[3] = math.nan
    anchors[1] = math.nan
    positive[2] = math.nan
    for temperature in (None, 0.5):
        index, score = mine(anchors, candidates, anchor_ids, candidate_ids, positive + 1, k=20, temperature=temperature)
        assert index[1:3].eq(-1).all()
        assert not index.eq(3).any()
        assert not score.isnan().any()
        assert index[0].ge(0).sum() == (candidate_ids != anchor_ids[0]).sum() - int(candidate_ids[3] != anchor_ids[0])


def test_large_values(generator, mine):
    anchors, candidates, *rest, positive = draw_integers(20, 30, generator)
    index, score = mine(anchors * 100, candidates * 100, *rest, positive * 1e4, k=4)
    truth_index, truth_score = oracle(anchors, candidates, *rest, positive, 4, 0.0)
    assert index.equal(truth_index)
    assert score.equal(truth_score.float() * 1e4)


def test_strides(generator, mine):
    anchors, candidates, anchor_ids, candidate_ids, positive = draw((8, 9, 6), generator)
    expected = mine(anchors, candidates, anchor_ids, candidate_ids, positive, k=3)
    got = mine(
        anchors.T.contiguous().T,
        torch.stack((candidates, candidates), 2)[:, :, 0],
        anchor_ids.repeat_interleave(2)[::2],
        candidate_ids,
        positive,
        k=3,
    )
    assert got[0].equal(expected[0])
    one = (anchors[:1].expand(8, -1), candidates, anchor_ids[:1].expand(8), candidate_ids, positive[:1].expand(8))
    index, _ = mine(*one, k=3)
    assert index.eq(index[:1]).all()


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_tiles_do_not_show(temperature, generator, monkeypatch):
    args = draw_integers(23, 40, generator)
    whole = ops.mine_semi_hard_reference(*args, k=5, temperature=temperature, seed=3)
    for elements in (1, 40 * 7):
        monkeypatch.setattr(module, "_TILE_ELEMENTS", elements)
        tiled = ops.mine_semi_hard_reference(*args, k=5, temperature=temperature, seed=3)
        assert whole[0].equal(tiled[0])
        assert whole[1].equal(tiled[1])


def python_noise(seed, i, j):
    """The documented noise in Python integers and float64."""

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    seed %= 2**64
    row = mix(i ^ mix(seed % 2**32 ^ mix(seed // 2**32 ^ 0x9E3779B9)))
    u = (mix((row + mix(j ^ 0x85EBCA6B)) % 2**32) + 0.5) / 2**32
    return -math.log(-math.log1p(-min(u, 1 - 2**-24)))


@pytest.mark.parametrize("seed", [0, 1, -1, 12345678901234567, 2**63 - 1, -(2**63), 2**64 - 1])
def test_noise_is_the_documented_one(seed):
    noise = module.gumbel_noise(seed, 5, 25, 30, torch.device("cpu"))
    truth = [[python_noise(seed, i, j) for j in range(30)] for i in range(5, 25)]
    torch.testing.assert_close(noise, torch.tensor(truth), rtol=1e-5, atol=1e-5)


def test_draws_are_the_documented_ones(generator, mine):
    args = draw_integers(12, 30, generator)
    anchors, candidates, anchor_ids, candidate_ids, positive = args
    index, score = mine(*args, k=6, margin=-2.0, temperature=1.7, seed=99)
    for i in range(12):
        keys = []
        for j in range(30):
            s = float((anchors[i] * candidates[j]).sum())
            if candidate_ids[j] != anchor_ids[i] and s < positive[i] + 2:
                keys.append((-(s / 1.7 + python_noise(99, i, j)), j))
        expected = [j for _, j in sorted(keys)[:6]]
        assert index[i, : len(expected)].tolist() == expected
        assert score[i, : len(expected)].equal(candidates[expected] @ anchors[i])
        assert index[i, len(expected) :].eq(-1).all()


def test_draws_follow_the_distribution(mine):
    """Two draws without replacement, by 20,000 anchors with the same five candidates."""
    s = torch.tensor([0.5, 0.1, -0.2, 0.3, 0.9])  # the last one is too similar
    n = 20_000
    index, _ = mine(
        torch.ones(n, 1),
        s[:, None],
        torch.full((n,), 9),
        torch.arange(5),
        torch.full((n,), 0.8),
        k=2,
        temperature=0.4,
        seed=7,
    )
    p = torch.softmax(s[:4].double() / 0.4, 0)
    pairs = torch.zeros(4, 4, dtype=torch.float64)
    pairs.view(-1).index_add_(0, index[:, 0] * 4 + index[:, 1], torch.ones(n, dtype=torch.float64))
    expected = n * p[:, None] * p[None] / (1 - p[:, None])
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert pairs.diagonal().eq(0).all()
    chi2 = ((pairs - expected) ** 2 / expected)[off_diagonal].sum()
    assert chi2 < 31.3  # 0.1 % point of chi-squared with 11 degrees of freedom


def test_seed_and_no_global_state(generator, mine):
    args = draw((40, 60, 8), generator)
    first = mine(*args, k=3, temperature=0.3, seed=5)
    torch.manual_seed(123)
    again = mine(*args, k=3, temperature=0.3, seed=5)
    other = mine(*args, k=3, temperature=0.3, seed=6)
    assert first[0].equal(again[0])
    assert not first[0].equal(other[0])
    assert mine(*args, temperature=0.3, seed=-1)[0].equal(mine(*args, temperature=0.3, seed=2**64 - 1)[0])
    # A draw never holds a candidate twice, and the noise of one anchor does not depend on the others.
    for row in first[0].tolist():
        real = [j for j in row if j >= 0]
        assert len(set(real)) == len(real)
    head = mine(args[0][:7], args[1], args[2][:7], args[3], args[4][:7], k=3, temperature=0.3, seed=5)
    assert head[0].equal(first[0][:7])


def test_low_temperature_is_the_highest(generator, mine):
    args = draw((30, 50, 16), generator)
    assert mine(*args, k=4, temperature=1e-6)[0].equal(mine(*args, k=4)[0])


def good():
    ids = torch.zeros(3, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    return dict(
        anchors=torch.zeros(3, 4),
        candidates=torch.zeros(5, 4),
        anchor_ids=ids[0],
        candidate_ids=ids[1],
        positive_score=torch.ones(3),
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"anchors": torch.zeros(3)}, ["anchors ", "[3]", "[N, D]"]),
        ({"anchors": torch.zeros(3, 4, dtype=torch.int32)}, ["anchors ", "int32", "float32"]),
        ({"candidates": torch.zeros(5, 6)}, ["candidates ", "[5, 6]", "[5, 4]"]),
        ({"candidates": torch.zeros(5, 4, dtype=torch.float16)}, ["candidates ", "float16"]),
        ({"candidates": torch.zeros(5, 4, device="meta")}, ["candidates ", "meta"]),
        ({"anchor_ids": torch.zeros(3)}, ["anchor_ids ", "float32", "int64"]),
        ({"anchor_ids": torch.zeros(4, dtype=torch.int64)}, ["anchor_ids ", "[4]", "[3]"]),
        ({"candidate_ids": torch.zeros(3, dtype=torch.int64)}, ["candidate_ids ", "[3]", "[5]"]),
        ({"positive_score": torch.zeros(5)}, ["positive_score ", "[5]", "[3]"]),
        ({"positive_score": torch.zeros(3, dtype=torch.int64)}, ["positive_score ", "int64"]),
        ({"k": 0}, ["k ", "0", "at least 1"]),
        ({"k": 1.5}, ["k ", "1.5"]),
        ({"margin": math.nan}, ["margin ", "nan"]),
        ({"temperature": 0.0}, ["temperature ", "0.0", "above 0"]),
        ({"temperature": -1}, ["temperature ", "-1"]),
        ({"temperature": math.inf}, ["temperature ", "inf"]),
        ({"seed": 2**64}, ["seed ", "64 bits"]),
        ({"seed": 0.5}, ["seed ", "0.5"]),
        ({"backend": "fast"}, ["backend ", "'fast'"]),
        ({"backend": "triton"}, ["backend ", "'triton'", "mine_semi_hard"]),
    ],
)
def test_errors(change, names):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        ops.mine_semi_hard(**(good() | change))
    for name in names:
        assert name in str(caught.value)


def test_gradients(generator, mine):
    args = draw((20, 30, 16), generator)
    plain = mine(*args, k=3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mine(args[0].requires_grad_(), *args[1:], k=3)
    assert cast[1].equal(plain[1])
    assert not cast[1].requires_grad


def near(index, score, args, **options):
    """Compare with the float64 reference: another candidate only where the scores are as near as rounding."""
    wide = [x.double() if x.is_floating_point() else x for x in args]
    truth_index, truth_score = ops.mine_semi_hard_reference(*wide, **options)
    torch.testing.assert_close(score, truth_score.float(), rtol=1e-5, atol=1e-6)
    assert index.lt(0).equal(truth_index.lt(0))
    found = index >= 0
    rows = torch.arange(len(index))[:, None].expand_as(index)[found]
    own = (wide[0][rows] * wide[1][index[found]]).sum(1)
    torch.testing.assert_close(own, truth_score[found], rtol=1e-5, atol=1e-6)
    assert (wide[3][index[found]] != wide[2][rows]).all()
    assert all(len(set(row.tolist()) - {-1}) == row.ge(0).sum() for row in index)
    assert (index == truth_index).double().mean() > 0.999


# Several of all that the C++ kernel takes at once: tiles, runs of candidates (128 at D 1024), blocks of anchors and
# vectors of winners.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "k"), [((200, 1000, 64), 16), ((30, 300, 1024), 64), ((1200, 70, 1000), 3), ((5, 3000, 17), 100)], ids=str
)
def test_several_tiles(shape, k, dtype, generator, mine):
    anchors, candidates, *ids, positive = draw(shape, generator, dtype)
    # No similarity so near the threshold that rounding decides.
    distance = anchors.double() @ candidates.double().T - (positive - 0.03)[:, None]
    positive[(distance.abs() < 1e-6).any(1)] += 1e-4
    args = anchors, candidates, *ids, positive
    near(*mine(*args, k=k, margin=0.03), args, k=k, margin=0.03)


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_duplicates(temperature, generator, mine):
    """Every candidate thirty times, far apart: each tie must be cut at the lowest index, in and across tiles."""
    anchors, candidates, anchor_ids, candidate_ids, positive = draw_integers(50, 40, generator)
    args = anchors, candidates.repeat(30, 1), anchor_ids, candidate_ids.repeat(30), positive
    index, score = mine(*args, k=50, temperature=temperature, seed=1)
    wide = [x.double() if x.is_floating_point() else x for x in args]
    truth_index, truth_score = ops.mine_semi_hard_reference(*wide, k=50, temperature=temperature, seed=1)
    assert index.equal(truth_index)
    assert score.equal(truth_score.float())


def test_ids_all_equal(generator, mine):
    anchors, candidates, *_, positive = draw((40, 90, 8), generator)
    for k in (1, 20):
        index, score = mine(anchors, candidates, torch.full((40,), 2**40), torch.full((90,), 2**40), positive + 2, k=k)
        assert index.eq(-1).all()
        assert score.eq(-math.inf).all()
    low, high = torch.full((40,), 5), torch.full((90,), 2**32 + 5)  # differ in their upper halves only
    assert mine(anchors, candidates, low, high, positive + 2, k=20)[0].ge(0).all()


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_eligible_minus_infinity(temperature, mine):
    """A similarity that overflows to -inf is eligible, and the last of all."""
    candidates = torch.tensor([[-3e38], [1.0], [-3e38], [2.0]])
    args = torch.full((1, 1), 1e10), candidates, torch.tensor([9]), torch.tensor([1, 2, 3, 9]), torch.tensor([1e30])
    index, score = mine(*args, k=4, temperature=temperature)
    assert index.tolist() == [[1, 0, 2, -1]]
    assert score.tolist() == [[1e10, -math.inf, -math.inf, -math.inf]]


@pytest.mark.parametrize(
    "shape", [(5, 40_000, 64), (300, 700, 64)], ids=str
)  # threads share out the candidates, the anchors
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_threads_do_not_show(shape, temperature, isa, generator):
    args = draw(shape, generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.mine_semi_hard(*args, k=20, temperature=temperature, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for index, score in results[1:]:
        assert index.equal(results[0][0])
        assert score.equal(results[0][1])


def test_auto_is_the_fastest(generator):
    args = draw((20, 30, 16), generator)
    auto = ops.mine_semi_hard(*args, k=3, temperature=0.2, seed=4)
    named = ops.mine_semi_hard(
        *args, k=3, temperature=0.2, seed=4, backend="cpp" if _native.is_loaded() else "reference"
    )
    assert auto[0].equal(named[0])
    assert auto[1].equal(named[1])


def test_opcheck(generator):
    args = draw((5, 7, 4), generator)
    for temperature in (None, 0.3):
        for op in (torch.ops.syncmask.mine_semi_hard, torch.ops.syncmask.mine_semi_hard_reference):
            torch.library.opcheck(op, (*args, 2, 0.1, temperature, 3))


def test_compile(generator):
    def caller(*args):
        index, score = ops.mine_semi_hard(*args, k=2, temperature=0.2, seed=3)
        return index + 1, score * 2

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    for shape in ((9, 12, 4), (5, 12, 4)):
        args = draw(shape, generator)
        for a, b in zip(compiled(*args), caller(*args), strict=True):
            assert a.equal(b)
