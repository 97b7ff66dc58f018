"""packed_attention against attention in float64, block by block."""

from __future__ import annotations

import pytest
import torch

from syncmask_fast.kernels.packed_attention import BACKWARD_OPS, OPS, packed_attention, packed_attention_reference
from syncmask_fast.model.attention import attention, sdpa_padded
from syncmask_fast.model.layout import PackedLayout

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 0.01}
# Queries and keys of each block, heads, width: no key, one, odd, prime, more than one tile of 64 queries, a ViT-B's.
CASES = [
    ([1], [1], 1, 1),
    ([2, 0, 3, 1], [3, 2, 0, 1], 2, 7),
    ([3, 70, 0, 129], [5, 17, 4, 33], 2, 64),
    ([37] * 3, [37] * 3, 2, 64),
    ([193, 5], [257, 263], 3, 31),
    ([64, 65], [16, 15], 1, 130),
]


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: list[int], keys: list[int]
) -> torch.Tensor:
    out = []
    for rows, of_keys, of_values in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        scores = torch.einsum("ihd,jhd->hij", rows, of_keys) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), of_values))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("queries", "keys", "heads", "width"), CASES, ids=str)
def test_matches_reference(queries, keys, heads, width, dtype, backend, generator):
    """Queries, keys and values are views of one tensor, as a projection leaves them; scores up to about 30."""
    rows = max(sum(queries), sum(keys))
    whole = (2 * torch.randn(3, heads, rows, width, generator=generator)).to(dtype).requires_grad_()
    parts = whole.transpose(1, 2).unbind()
    q, k, v = (x[: sum(n)] for x, n in zip(parts, (queries, keys, keys), strict=True))
    starts = PackedLayout.of(queries).cu_seqlens, PackedLayout.of(keys).cu_seqlens
    found = packed_attention(q, k, v, *starts, backend=backend)
    wanted = torch.randn(found.shape, generator=generator)
    found.backward(wanted.to(dtype))
    exact = whole.detach().double().requires_grad_()
    q, k, v = (x[: sum(n)] for x, n in zip(exact.transpose(1, 2).unbind(), (queries, keys, keys), strict=True))
    expected = by_definition(q, k, v, queries, keys)
    torch.testing.assert_close(packed_attention_reference(q, k, v, *starts), expected)
    expected.backward(wanted.to(dtype).double())
    assert found.dtype == dtype
    assert found.is_contiguous()
    for ours, theirs in ((found, expected), (whole.grad, exact.grad)):
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * max(1, theirs.abs().max())


def test_edges(backend, generator):
    """What is outside a block changes nothing, not even NaN and infinities; within it they show."""
    queries, keys = PackedLayout.of([3, 2]), PackedLayout.of([20, 5])
    q, k, v = (torch.randn(n, 2, 16, generator=generator) for n in (5, 25, 25))
    first = packed_attention(q[:3], k[:20], v[:20], queries.cu_seqlens[:2], keys.cu_seqlens[:2], backend=backend)
    k[20], v[21] = torch.nan, torch.inf
    both = packed_attention(q, k, v, queries.cu_seqlens, keys.cu_seqlens, backend=backend)
    assert both[:3].equal(first)
    assert both[3:].isnan().all()


def test_large_scores(backend, generator):
    q, k, v = (torch.randn(9, 1, 8, generator=generator) for _ in range(3))
    starts = PackedLayout.of([9]).cu_seqlens
    for shift in (-3e4, 3e4):
        found = packed_attention(torch.full_like(q, 1.0), k + shift, v, starts, starts, backend=backend)
        assert torch.allclose(found, by_definition(torch.full_like(q, 1.0), k + shift, v, [9], [9]), atol=0.02)
    assert packed_attention(q * 1e4, k * 1e4, v, starts, starts, backend=backend).isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_show(threads, isa, generator):
    q, k, v = (torch.randn(300, 3, 32, generator=generator).requires_grad_() for _ in range(3))
    starts = PackedLayout.of([100, 1, 199]).cu_seqlens
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found = packed_attention(q, k, v, starts, starts)
            results.append((found, *torch.autograd.grad(found.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_attention_uses_it(generator, monkeypatch):
    layout = PackedLayout.of([4, 1, 6])
    images, texts = torch.randn(3, 10, 2, 16, generator=generator), torch.randn(11, 2, 16, generator=generator)
    cases = [
        (images, images, images),
        (texts, images, images, layout, None),
        (images, texts, texts, None, layout),
        (texts, texts, texts, layout, layout),
    ]
    for case in cases:
        assert torch.allclose(attention(*case), sdpa_padded(*case), atol=1e-6)
    monkeypatch.setattr("syncmask_fast.model.attention.sdpa_padded", lambda *case: pytest.fail("padded"))
    for case in cases:
        attention(*case)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"q": torch.zeros(5, 2, 16, dtype=torch.float64)}, "q has dtype float64; expected float32 or bf"),
        (ValueError, {"q": torch.zeros(5, 16)}, r"q has shape \[5, 16\]; expected \[T, H, D\]"),
        (ValueError, {"k": torch.zeros(5, 1, 16)}, r"k has shape \[5, 1, 16\]; expected \[5, 2, 16\]"),
        (ValueError, {"v": torch.zeros(5, 2, 16, dtype=torch.bfloat16)}, "v has dtype bfloat16; expected float32"),
        (ValueError, {"v": torch.zeros(4, 2, 16)}, r"v has shape .* \(the shape of k\)"),
        (ValueError, {"k_starts": torch.tensor([0, 5])}, "k_starts has dtype int64; expected int32"),
        (ValueError, {"k_starts": torch.tensor([0, 2, 5], dtype=torch.int32)}, "as many blocks as q_starts"),
        (ValueError, {"backend": "triton"}, "which packed_attention does not have"),
        (RuntimeError, {"k": torch.zeros(5, 16, 2).mT}, "next to each other"),
        (RuntimeError, {"q_starts": torch.tensor([0, 4], dtype=torch.int32)}, "rise from 0"),
        (
            RuntimeError,
            {
                "q_starts": torch.tensor([0, 6, 5], dtype=torch.int32),
                "k_starts": torch.tensor([0, 1, 5], dtype=torch.int32),
            },
            "rise from 0",
        ),
    ],
)
def test_errors(error, change, message):
    starts = torch.tensor([0, 5], dtype=torch.int32)
    inputs = {name: torch.zeros(5, 2, 16) for name in "qkv"} | {"q_starts": starts, "k_starts": starts}
    with pytest.raises(error, match=message):
        packed_attention(**inputs | change)


@pytest.mark.parametrize("op", [OPS.auto, OPS.reference], ids=str)
def test_opcheck(op, generator):
    q, k, v = (torch.randn(7, 2, 5, generator=generator).requires_grad_() for _ in range(3))
    starts = PackedLayout.of([3, 4]).cu_seqlens
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = torch.library.opcheck(op, (q, k, v, starts, starts, 0.4), test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}
    backward = {OPS.auto: BACKWARD_OPS.auto, OPS.reference: BACKWARD_OPS.reference}[op]
    q, k, v = (x.detach() for x in (q, k, v))
    out, log_sums = op(q, k, v, starts, starts, 0.4)
    torch.library.opcheck(backward, (out, q, k, v, out, log_sums, starts, starts, 0.4), test_utils=tests[:2])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile(backend, generator):
    starts = PackedLayout.of([3, 4]).cu_seqlens

    def caller(q, k, v):
        return packed_attention(q * 2, k, v, starts, starts, backend=backend).square().sum()

    q, k, v = (torch.randn(7, 2, 5, generator=generator).requires_grad_() for _ in range(3))
    results = [
        torch.autograd.grad(run(q, k, v), (q, k, v))
        for run in (caller, torch.compile(caller, fullgraph=True, backend="aot_eager"))
    ]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)
