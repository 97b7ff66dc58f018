"""The CPU's packed attention against attention in float64, block by block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncmask_fast import _native
from syncmask_fast.kernels.packed_attention import packed_attention
from syncmask_fast.model.attention import attention, sdpa_padded
from syncmask_fast.model.layout import PackedLayout

pytestmark = pytest.mark.skipif(not _native.loaded(), reason=f"needs the compiled library: {_native.status()}")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 0.01}
# Queries and keys of each block, heads, width: nothing to see, one, odd, prime, more than one tile of 64 queries, and a ViT-B's.
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
def test_output_and_gradients(queries, keys, heads, width, dtype, generator):
    """Queries, keys and values are views of one tensor with other strides, as of a projection; scores up to about 30."""
    rows = max(sum(queries), sum(keys))
    whole = (2 * torch.randn(3, heads, rows, width, generator=generator)).to(dtype).requires_grad_()
    parts = whole.transpose(1, 2).unbind()
    q, k, v = (x[: sum(n)] for x, n in zip(parts, (queries, keys, keys), strict=True))
    found = packed_attention(q, k, v, PackedLayout.of(queries).cu_seqlens, PackedLayout.of(keys).cu_seqlens)
    wanted = torch.randn(found.shape, generator=generator)
    found.backward(wanted.to(dtype))
    exact = whole.detach().double().requires_grad_()
    q, k, v = (x[: sum(n)] for x, n in zip(exact.transpose(1, 2).unbind(), (queries, keys, keys), strict=True))
    expected = by_definition(q, k, v, queries, keys)
    expected.backward(wanted.to(dtype).double())
    assert found.dtype == dtype
    assert found.is_contiguous()
    for ours, theirs in ((found, expected), (whole.grad, exact.grad)):
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * max(1, theirs.abs().max())


def test_what_is_outside_a_block_changes_nothing(generator):
    """Not even NaN and infinities; within it they are told."""
    queries, keys = PackedLayout.of([3, 2]), PackedLayout.of([20, 5])
    q, k, v = (torch.randn(n, 2, 16, generator=generator) for n in (5, 25, 25))
    alone = packed_attention(q[:3], k[:20], v[:20], queries.cu_seqlens[:2], keys.cu_seqlens[:2])
    k[20], v[21] = torch.nan, torch.inf
    both = packed_attention(q, k, v, queries.cu_seqlens, keys.cu_seqlens)
    assert both[:3].equal(alone)
    assert both[3:].isnan().all()


def test_scores_of_any_size(generator):
    q, k, v = (torch.randn(9, 1, 8, generator=generator) for _ in range(3))
    starts = PackedLayout.of([9]).cu_seqlens
    for shift in (-3e4, 3e4):
        found = packed_attention(torch.full_like(q, 1.0), k + shift, v, starts, starts)
        assert torch.allclose(found, by_definition(torch.full_like(q, 1.0), k + shift, v, [9], [9]), atol=0.02)
    assert packed_attention(q * 1e4, k * 1e4, v, starts, starts).isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(threads, generator):
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


def test_attention_takes_it_for_dense_and_packed_sequences(generator, monkeypatch):
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
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 2, 16, dtype=torch.float64)}, "float32 or bfloat16"),
        ({"k": torch.zeros(5, 1, 16)}, "k must be"),
        ({"v": torch.zeros(5, 2, 16, dtype=torch.bfloat16)}, "v must be"),
        ({"v": torch.zeros(4, 2, 16)}, "same rows"),
        ({"k": torch.zeros(5, 16, 2).mT}, "side by side"),
        ({"k_starts": torch.tensor([0, 5])}, "int32"),
        ({"k_starts": torch.tensor([0, 2, 5], dtype=torch.int32)}, "same blocks"),
        ({"q_starts": torch.tensor([0, 4], dtype=torch.int32)}, "rise from 0"),
        (
            {
                "q_starts": torch.tensor([0, 6, 5], dtype=torch.int32),
                "k_starts": torch.tensor([0, 1, 5], dtype=torch.int32),
            },
            "rise from 0",
        ),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    starts = torch.tensor([0, 5], dtype=torch.int32)
    inputs = {name: torch.zeros(5, 2, 16) for name in "qkv"} | {"q_starts": starts, "k_starts": starts}
    with pytest.raises(RuntimeError, match=message):
        packed_attention(**inputs | change)


def test_it_passes_pytorchs_own_checks(generator):
    q, k, v = (torch.randn(7, 2, 5, generator=generator).requires_grad_() for _ in range(3))
    starts = PackedLayout.of([3, 4]).cu_seqlens
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(
        torch.library.opcheck(
            torch.ops.syncmask.packed_attention, (q, k, v, starts, starts, 0.4), test_utils=tests
        ).values()
    ) == {"SUCCESS"}


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    """This file's comparison in a process that may not use wider vectors."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("within such a process")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "output_and_gradients or any_size",
    ]
    run = subprocess.run(
        command,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
