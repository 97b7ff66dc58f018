"""sync_mask against a float64 oracle of plain loops, written from the contract only."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bench import harness
from syncmask_fast import _native, ops
from syncmask_fast.kernels import sync_mask as module

needs_cpp = pytest.mark.skipif(not _native.is_loaded(), reason=_native.describe())
TOKEN_RULES = ("peak", "mass", "cls", "output")
PATCH_RULES = ("mean", "cls", "weighted", "max")
# (B, H, T, P, D): all ones; odd; primes; one below and above a power of two; the model's own at 96 px; one more
# than the C++ kernel's vectors (16), its words at a time (64 or 24) and its keys at a time (24, 12, 8, 6).
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 3, 5, 9, 7),
    (2, 5, 13, 31, 11),
    (2, 2, 17, 63, 33),
    (4, 4, 32, 36, 64),
    (2, 1, 97, 24, 17),
    (1, 2, 150, 61, 16),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape, generator, dtype=torch.float32, spread=1.0):
    b, h, t, p, d = shape
    q, k, v = (torch.randn(b, h, n, d, generator=generator) * spread for n in (t, p + 1, p + 1))
    maskable = torch.rand(b, t, generator=generator) < 0.7
    maskable[:, 0] = False
    return q.to(dtype), k.to(dtype), v.to(dtype), maskable


def oracle(q, k, maskable, v, token_rule, patch_rule, token_ratio=0.15, patch_ratio=0.5, scale=None):
    """The four outputs in float64, one sample, head, token and patch at a time."""
    q, k, v = (x.double() for x in (q, k, v))
    b, h, t, d = q.shape
    p = k.shape[2] - 1
    scale = 1 / math.sqrt(d) if scale is None else scale
    token = torch.full((b, t), -math.inf, dtype=torch.float64)
    patch = torch.zeros(b, p, dtype=torch.float64)
    for n in range(b):
        a = torch.stack([torch.softmax(q[n, g] @ k[n, g].T * scale, 1) for g in range(h)])  # [H, T, 1+P]
        words = [i for i in range(t) if maskable[n, i]]
        for i in words:
            if token_rule == "peak":
                heads = [a[g, i, 1:].max() for g in range(h)]
            elif token_rule == "mass":
                heads = [1 - a[g, i, 0] for g in range(h)]
            elif token_rule == "cls":
                heads = [a[g, i, 0] for g in range(h)]
            else:
                heads = [((a[g, i] @ v[n, g]) ** 2).sum().sqrt() for g in range(h)]
            token[n, i] = sum(heads) / h
        for j in range(p):
            column = a[:, :, 1 + j]
            if patch_rule == "cls" or not words:
                heads = [column[g, 0] for g in range(h)]
            elif patch_rule == "mean":
                heads = [sum(column[g, i] for i in words) / len(words) for g in range(h)]
            elif patch_rule == "max":
                heads = [max(column[g, i] for i in words) for g in range(h)]
            else:
                heads = [sum(a[g, i, 1:].max() * column[g, i] for i in words) / len(words) for g in range(h)]
            patch[n, j] = sum(heads) / h
    token_mask = torch.zeros(b, t, dtype=torch.bool)
    patch_mask = torch.zeros(b, p, dtype=torch.bool)
    for n in range(b):
        words = [i for i in range(t) if maskable[n, i]]
        m = len(words)
        count = 0 if m == 0 or token_ratio == 0 else min(m, max(1, math.floor(token_ratio * m + 0.5)))
        token_mask[n, highest(token[n], words, count)] = True
        count = 0 if patch_ratio == 0 else max(1, math.floor(patch_ratio * p + 0.5))
        patch_mask[n, highest(patch[n], list(range(p)), count)] = True
    return token_mask, patch_mask, token, patch


def highest(score, among, count):
    """Indices of the highest scores: NaN last, ties by index (Python's sort is stable)."""
    key = [(-math.inf if math.isnan(s) else s) for s in score.tolist()]
    return sorted(sorted(among, key=lambda i: -key[i]), key=lambda i: math.isnan(score[i]))[:count]


def assert_marks(mask, own_score, truth_score, eligible, count):
    """`mask` marks the `count` highest of the operator's own scores, and of the true ones up to rounding."""
    expected = torch.zeros_like(mask)
    expected[highest(own_score, eligible, count)] = True
    assert mask.equal(expected)
    best = truth_score[highest(truth_score, eligible, count)]
    torch.testing.assert_close(truth_score[mask].sum(), best.sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, backend, generator):
    q, k, v, maskable = draw(shape, generator, dtype)
    for token_rule, patch_rule in zip(TOKEN_RULES, PATCH_RULES, strict=True):
        got = ops.sync_mask(q, k, maskable, v=v, token_score=token_rule, patch_score=patch_rule, backend=backend)
        truth = ops.SyncMask(*oracle(q, k, maskable, v, token_rule, patch_rule))
        # The inputs are exact in float64: only float32 arithmetic separates the two, whatever the dtype.
        torch.testing.assert_close(got.token_score, truth.token_score.float(), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(got.patch_score, truth.patch_score.float(), rtol=2e-5, atol=1e-6)
        for n in range(shape[0]):
            words = maskable[n].nonzero()[:, 0].tolist()
            marked = int(truth.token_mask[n].sum())
            assert_marks(got.token_mask[n], got.token_score[n], truth.token_score[n], words, marked)
            marked, patches = int(truth.patch_mask[n].sum()), list(range(shape[3]))
            assert_marks(got.patch_mask[n], got.patch_score[n], truth.patch_score[n], patches, marked)


@pytest.mark.parametrize("token_rule", TOKEN_RULES)
@pytest.mark.parametrize("patch_rule", PATCH_RULES)
def test_float64_reference(token_rule, patch_rule, generator):
    q, k, v, maskable = draw((3, 3, 7, 10, 5), generator, torch.float64)
    maskable[1] = False  # a sample without a word
    rules = {"token_score": token_rule, "patch_score": patch_rule}
    got = ops.sync_mask_reference(q, k, maskable, v=v, **rules)
    truth = ops.SyncMask(*oracle(q, k, maskable, v, token_rule, patch_rule))
    assert got.token_score.dtype == got.patch_score.dtype == torch.float64
    torch.testing.assert_close(got.token_score, truth.token_score, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.patch_score, truth.patch_score, rtol=1e-12, atol=1e-14)
    assert got.token_mask.equal(truth.token_mask)
    assert got.patch_mask.equal(truth.patch_mask)


@pytest.mark.parametrize("token_ratio", [0, 0.01, 0.15, 0.25, 0.5, 0.999, 1])
@pytest.mark.parametrize("patch_ratio", [0, 0.01, 0.3, 0.5, 1])
def test_counts(token_ratio, patch_ratio, backend, generator):
    q, k, _, _ = draw((21, 1, 21, 13, 4), generator)
    maskable = torch.arange(21)[None] < torch.arange(21)[:, None]  # 0 to 20 words, in order
    got = ops.sync_mask(q, k, maskable, token_ratio=token_ratio, patch_ratio=patch_ratio, backend=backend)
    for m in range(21):
        expected = min(m, max(1, math.floor(token_ratio * m + 0.5))) if token_ratio else 0
        assert int(got.token_mask[m].sum()) == expected, m
        assert not got.token_mask[m, m:].any()
    expected = max(1, math.floor(patch_ratio * 13 + 0.5)) if patch_ratio else 0
    assert got.patch_mask.sum(1).tolist() == [expected] * 21
    assert ops.masked_patches(13, patch_ratio) == expected


def test_no_maskable_token(backend, generator):
    q, k, v, maskable = draw((3, 2, 6, 5, 4), generator)
    maskable[1] = False
    for token_rule, patch_rule in itertools.product(TOKEN_RULES, PATCH_RULES):
        got = ops.sync_mask(q, k, maskable, v=v, token_score=token_rule, patch_score=patch_rule, backend=backend)
        from_cls = torch.softmax((q[1, :, :1] @ k[1].mT) * 4**-0.5, -1).mean(0)[0, 1:]
        torch.testing.assert_close(got.patch_score[1], from_cls)
        assert got.token_score[1].eq(-math.inf).all()
        assert not got.token_mask[1].any()
        assert got.patch_mask[1].sum() == 3


def test_empty_batch(backend, generator):
    q, k, _, maskable = draw((0, 2, 6, 5, 4), generator)
    got = ops.sync_mask(q, k, maskable, backend=backend)
    assert [tuple(x.shape) for x in got] == [(0, 6), (0, 5), (0, 6), (0, 5)]


@pytest.mark.parametrize("token_rule", TOKEN_RULES)
@pytest.mark.parametrize("patch_rule", PATCH_RULES)
def test_ties_go_to_the_lowest_index(token_rule, patch_rule, backend):
    q, k, v = torch.ones(2, 2, 40, 4), torch.ones(2, 2, 51, 4), torch.ones(2, 2, 51, 4)
    maskable = torch.ones(2, 40, dtype=torch.bool)
    maskable[:, 0] = False
    maskable[1, 2] = False
    got = ops.sync_mask(q, k, maskable, v=v, token_score=token_rule, patch_score=patch_rule, backend=backend)
    assert got.token_mask[0].nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5, 6]  # floor(0.15 * 39 + 0.5)
    assert got.token_mask[1].nonzero()[:, 0].tolist() == [1, 3, 4, 5, 6, 7]
    assert got.patch_mask[0].nonzero()[:, 0].tolist() == list(range(25))


def test_partial_ties(backend, generator):
    """Scores of few values, from repeated keys and queries: every tie group is cut at its lowest indices."""
    q = torch.randn(1, 1, 3, 8, generator=generator)[:, :, torch.randint(3, (50,), generator=generator)]
    k = torch.randn(1, 1, 4, 8, generator=generator)[:, :, torch.randint(4, (61,), generator=generator)]
    maskable = torch.rand(1, 50, generator=generator) < 0.8
    for ratio in (0.1, 0.35, 0.6, 0.9):
        got = ops.sync_mask(q, k, maskable, token_ratio=ratio, patch_ratio=ratio, backend=backend)
        words = maskable[0].nonzero()[:, 0].tolist()
        for mask, score, among in (
            (got.token_mask[0], got.token_score[0], words),
            (got.patch_mask[0], got.patch_score[0], list(range(60))),
        ):
            assert score[torch.isfinite(score)].unique().numel() < 20
            expected = sorted(highest(score, among, int(mask.sum())))
            assert mask.nonzero()[:, 0].tolist() == expected


def test_nan_ranks_below_numbers(backend, generator):
    q, k, v, _ = draw((2, 2, 10, 8, 4), generator)
    maskable = torch.ones(2, 10, dtype=torch.bool)
    maskable[:, [0, 9]] = False
    q[0, 1, 2:5] = math.nan  # three of eight words of sample 0, in one head
    q[:, :, 9] = math.nan  # padding may hold anything
    v[1, :, 0] = math.nan
    got = ops.sync_mask(q, k, maskable, token_ratio=0.5, backend=backend)
    assert got.token_score[0].isnan().nonzero()[:, 0].tolist() == [2, 3, 4]
    assert not got.token_mask[0, 2:5].any()
    assert got.token_mask[0].sum() == 4
    assert not got.patch_score[1].isnan().any()
    everything = ops.sync_mask(q, k, maskable, token_ratio=1.0, backend=backend)
    assert everything.token_mask.equal(maskable)  # NaN words still come before what is not maskable
    most = ops.sync_mask(q, k, maskable, token_ratio=6 / 8, backend=backend)
    assert most.token_mask[0].nonzero()[:, 0].tolist() == [1, 2, 5, 6, 7, 8]  # the lowest of the NaN words
    assert got.patch_mask[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]  # "max" over NaN is NaN: ties
    output = ops.sync_mask(q, k, maskable, v=v, token_score="output", backend=backend)
    assert output.token_score[1, 1:9].isnan().all()
    assert output.token_mask[1].nonzero()[:, 0].tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype, backend, generator):
    q, k, v, maskable = draw((2, 2, 9, 12, 16), generator, dtype, spread=50.0)
    assert (q.float() @ k.float().mT * 0.25).abs().max() > 5e3
    for token_rule, patch_rule in zip(TOKEN_RULES, PATCH_RULES, strict=True):
        got = ops.sync_mask(q, k, maskable, v=v, token_score=token_rule, patch_score=patch_rule, backend=backend)
        truth = ops.SyncMask(*oracle(q, k, maskable, v, token_rule, patch_rule))
        # A float32 logit of 1e4 is off by up to 1e-3, and so is the weight's relative error.
        torch.testing.assert_close(got.token_score, truth.token_score.float(), rtol=5e-3, atol=1e-3)
        torch.testing.assert_close(got.patch_score, truth.patch_score.float(), rtol=5e-3, atol=1e-3)


def test_scale(backend, generator):
    q, k, v, maskable = draw((2, 2, 5, 6, 8), generator)
    got = ops.sync_mask(q, k, maskable, scale=0.9, backend=backend)
    truth = ops.SyncMask(*oracle(q, k, maskable, v, "peak", "max", scale=0.9))
    torch.testing.assert_close(got.patch_score, truth.patch_score.float())
    assert not torch.allclose(got.patch_score, ops.sync_mask(q, k, maskable, backend=backend).patch_score)


def test_strides(backend, generator):
    q, k, v, maskable = draw((3, 4, 6, 10, 8), generator)
    plain = ops.sync_mask(q, k, maskable, v=v, token_score="output", backend=backend)
    # As a projection leaves them: [B, T, H, D] seen as [B, H, T, D].
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    got = ops.sync_mask(
        strided[0], strided[1], maskable.T.contiguous().T, v=strided[2], token_score="output", backend=backend
    )
    one_image = k[:1].expand(3, -1, -1, -1)
    expanded = ops.sync_mask(q, one_image, maskable[:1].expand(3, -1), backend=backend)
    repeated = ops.sync_mask(q, one_image.contiguous(), maskable[:1].repeat(3, 1), backend=backend)
    for a, b in ((got, plain), (expanded, repeated)):
        assert a.token_mask.equal(b.token_mask)
        assert a.patch_mask.equal(b.patch_mask)
        torch.testing.assert_close(a.token_score, b.token_score)
        torch.testing.assert_close(a.patch_score, b.patch_score)
        assert all(x.is_contiguous() for x in a)


def test_tiles_do_not_show(generator, monkeypatch):
    q, k, _, maskable = draw((7, 2, 6, 10, 8), generator)
    whole = ops.sync_mask_reference(q, k, maskable)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 2 * 6 * 11)
    tiled = ops.sync_mask_reference(q, k, maskable)
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients(backend, generator):
    q, k, _, maskable = draw((2, 2, 6, 10, 8), generator)
    plain = ops.sync_mask(q, k, maskable, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ops.sync_mask(q.requires_grad_(), k, maskable, backend=backend)
    assert cast.token_score.equal(plain.token_score)
    assert not cast.token_score.requires_grad


def test_deterministic(backend, generator):
    q, k, v, maskable = draw((3, 4, 16, 36, 16), generator, torch.bfloat16)
    first = ops.sync_mask(q, k, maskable, v=v, token_score="output", backend=backend)
    for _ in range(3):
        again = ops.sync_mask(q, k, maskable, v=v, token_score="output", backend=backend)
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def good(generator=None):
    b, h, t, p, d = 2, 3, 4, 5, 6
    return {
        "q": torch.zeros(b, h, t, d),
        "k": torch.zeros(b, h, p + 1, d),
        "maskable": torch.ones(b, t, dtype=torch.bool),
    }


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"q": torch.zeros(3, 4, 6)}, ["q ", "[3, 4, 6]", "[B, H, T, D]"]),
        ({"q": torch.zeros(2, 3, 4, 6, dtype=torch.int64)}, ["q ", "int64", "float32"]),
        ({"q": torch.zeros(2, 3, 4, 6, dtype=torch.float64)}, ["q ", "float64"]),
        ({"q": [[1.0]]}, ["q ", "list"]),
        ({"q": torch.zeros(2, 0, 4, 6)}, ["q ", "[2, 0, 4, 6]"]),
        ({"k": torch.zeros(2, 3, 6, 7)}, ["k ", "[2, 3, 6, 7]", "[2, 3, 6, 6]"]),
        ({"k": torch.zeros(1, 3, 6, 6)}, ["k ", "[1, 3, 6, 6]"]),
        ({"k": torch.zeros(2, 3, 1, 6)}, ["k ", "2 keys"]),
        ({"k": torch.zeros(2, 3, 6, 6, dtype=torch.bfloat16)}, ["k ", "bfloat16", "float32"]),
        ({"k": torch.zeros(2, 3, 6, 6, device="meta")}, ["k ", "meta", "cpu"]),
        ({"maskable": torch.ones(2, 4)}, ["maskable ", "float32", "bool"]),
        ({"maskable": torch.ones(2, 5, dtype=torch.bool)}, ["maskable ", "[2, 5]", "[2, 4]"]),
        ({"token_score": "output"}, ["v ", "None", "output"]),
        ({"token_score": "output", "v": torch.zeros(2, 3, 5, 6)}, ["v ", "[2, 3, 5, 6]", "[2, 3, 6, 6]"]),
        ({"token_score": "best"}, ["token_score", "'best'", "'peak'"]),
        ({"patch_score": "peak"}, ["patch_score", "'peak'", "'weighted'"]),
        ({"token_ratio": 1.01}, ["token_ratio", "1.01", "0 to 1"]),
        ({"patch_ratio": -0.1}, ["patch_ratio", "-0.1", "0 to 1"]),
        ({"patch_ratio": math.nan}, ["patch_ratio", "nan"]),
        ({"token_ratio": "0.5"}, ["token_ratio", "'0.5'"]),
        ({"scale": math.inf}, ["scale", "inf"]),
        ({"backend": "cuda"}, ["backend", "'cuda'", "'auto'"]),
    ],
)
def test_errors(change, names):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        ops.sync_mask(**(good() | change))
    for name in names:
        assert name in str(caught.value)


def test_unknown_backends_name_what_there_is(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match="backend is 'triton', which sync_mask does not have on cpu; expected 'auto' or 'reference'"
    ):
        ops.sync_mask(**good(), backend="triton")


def test_attention_summary(backend, generator):
    q, k, v, maskable = draw((3, 2, 6, 10, 8), generator)
    rules = {"v": v, "token_score": "output", "patch_score": "weighted", "scale": 0.7, "backend": backend}
    masks = ops.sync_mask(q, k, maskable, **rules)
    token_score, patch_score = ops.attention_summary(q, k, maskable, **rules)
    assert token_score.equal(masks.token_score)
    assert patch_score.equal(masks.patch_score)
    with pytest.raises(ValueError, match="patch_score is 'peak'; expected one of"):
        ops.attention_summary(q, k, maskable, patch_score="peak")


# Several times what the kernel takes at once: words, keys, and a head width that is no multiple of a vector.
@pytest.mark.parametrize(
    "shape", [(1, 1, 512, 300, 24), (1, 2, 40, 4096, 128), (17, 3, 130, 97, 40), (2, 16, 3, 1, 16)], ids=str
)
def test_large_shapes(shape, backend, generator):
    q, k, v, maskable = draw(shape, generator)
    wide = [x.double() for x in (q, k, v)]
    for token_rule, patch_rule in zip(TOKEN_RULES, PATCH_RULES, strict=True):
        rules = {"token_score": token_rule, "patch_score": patch_rule}
        got = ops.sync_mask(q, k, maskable, v=v, **rules, backend=backend)
        truth = ops.sync_mask_reference(*wide[:2], maskable, v=wide[2], **rules)
        torch.testing.assert_close(got.token_score, truth.token_score.float(), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(got.patch_score, truth.patch_score.float(), rtol=2e-5, atol=1e-6)
        assert got.token_mask.sum(1).equal(truth.token_mask.sum(1))
        assert got.patch_mask.sum(1).equal(truth.patch_mask.sum(1))


def test_infinite_and_nan_elements(backend, generator):
    """As the float64 reference: a word with a NaN or +inf logit is NaN throughout, -inf is a weight of 0."""
    q, k, v, maskable = draw((3, 2, 20, 30, 8), generator)
    maskable[:, 1:4] = True
    q[0, 0, 1], q[0, 1, 2, 3] = math.inf, math.nan
    k[1, 0, 5, 2], k[1, 1, 0] = -math.inf, math.nan
    k[2, 0, 7] = 0
    q[2, 0, :, 0], k[2, 0, 7, 0] = 1, -math.inf
    for token_rule, patch_rule in itertools.product(TOKEN_RULES, PATCH_RULES):
        rules = {"token_score": token_rule, "patch_score": patch_rule}
        got = ops.sync_mask(q, k, maskable, v=v, **rules, backend=backend)
        truth = ops.sync_mask_reference(q.double(), k.double(), maskable, v=v.double(), **rules)
        torch.testing.assert_close(got.token_score, truth.token_score.float(), rtol=2e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(got.patch_score, truth.patch_score.float(), rtol=2e-5, atol=1e-6, equal_nan=True)


def test_strides_of_every_kind(isa, generator):
    """Rows that lie apart, elements that lie apart, heads and samples that share memory; each dtype."""
    for dtype in DTYPES:
        q, k, v, maskable = draw((4, 3, 21, 26, 17), generator, dtype)
        k, v = k[:1].expand(4, -1, -1, -1), v[:, :1].expand(-1, 3, -1, -1)
        plain = [x.contiguous() for x in (q, k, v)]
        expected = ops.sync_mask(*plain[:2], maskable, v=plain[2], token_score="output", backend="cpp")
        for change in (
            lambda x: x,
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            lambda x: x.mT.contiguous().mT,
            lambda x: torch.stack((x, x), -1)[..., 1],
            lambda x: torch.cat((x, x), 2)[:, :, : x.shape[2]],
        ):
            a, b, c = (change(x) for x in (q, k, v))
            got = ops.sync_mask(a, b, maskable.T.contiguous().T, v=c, token_score="output", backend="cpp")
            assert all(x.equal(y) for x, y in zip(got, expected, strict=True))


def test_threads_do_not_show(isa, generator):
    """Samples are shared out for many samples, heads and words for few: the bits are the same."""
    threads = torch.get_num_threads()
    try:
        for shape, rule in itertools.product([(1, 3, 150, 40, 16), (9, 2, 70, 33, 8), (30, 3, 12, 20, 8)], PATCH_RULES):
            q, k, v, maskable = draw(shape, generator)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(
                    ops.sync_mask(q, k, maskable, v=v, token_score="output", patch_score=rule, backend="cpp")
                )
            for other in results[1:]:
                assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_cpp
def test_memory():
    """Peak memory grows by far less than one attention map, whose 256 MiB the plain way needs."""
    q, k, words = torch.randn(32, 8, 64, 16), torch.randn(32, 8, 4097, 16), torch.ones(32, 64, dtype=torch.bool)
    extra = harness.extra_mib(lambda: ops.sync_mask(q, k, words, backend="cpp"), q.device)
    if math.isnan(extra):
        pytest.skip("the kernel does not report the peak of memory")
    assert extra < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sync_mask", "sync_mask_reference"])
def test_opcheck(name, dtype, generator):
    q, k, v, maskable = draw((2, 2, 6, 10, 8), generator, dtype)
    for values, token_rule in ((None, "peak"), (v, "output")):
        args = (q, k, maskable, values, 0.15, 0.5, token_rule, "max", 8**-0.5)
        torch.library.opcheck(getattr(torch.ops.syncmask, name), args)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("cpp", marks=needs_cpp)])
def test_compile(backend, generator):
    q, k, _, maskable = draw((2, 2, 6, 10, 8), generator)

    def caller(q, k, maskable):
        masks = ops.sync_mask(q * 1.0, k, maskable, token_ratio=0.3, backend=backend)
        scores = ops.attention_summary(q * 1.0, k, maskable, backend=backend)
        return masks.token_mask.sum(1), masks.patch_score * 2, scores[1] + 1

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    for batch in (2, 1, 2):
        args = q[:batch], k[:batch], maskable[:batch]
        for a, b in zip(compiled(*args), caller(*args), strict=True):
            torch.testing.assert_close(a, b)
