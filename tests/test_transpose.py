"""transpose against PyTorch's transposed copy: the same bits."""

from __future__ import annotations

import pytest
import torch

from syncmask_fast.kernels.transpose import OPS, transpose

# Fewer than a square of 8, whole squares, odd and prime, one tile of 32 x 64 and a little more.
SHAPES = [(1, 1), (0, 3), (3, 0), (8, 8), (7, 13), (33, 65), (32, 64), (64, 200), (131, 8), (300, 37)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, backend, generator):
    x = torch.randn(shape, generator=generator).bfloat16()
    found = transpose(x, backend=backend)
    assert found.equal(x.t())
    assert found.is_contiguous()
    assert found.data_ptr() != x.data_ptr() or x.numel() == 0


def test_edges(backend):
    """Bits that are no numbers go through."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    assert transpose(x, backend=backend).view(torch.int16).equal(x.view(torch.int16).t())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x is a list"),
        (torch.zeros(3, dtype=torch.bfloat16), r"x has shape \[3\]; expected \[R, C\]"),
        (torch.zeros(3, 4), "x has dtype float32; expected bfloat16"),
        (torch.zeros(3, 4, dtype=torch.bfloat16).t(), "expected a contiguous tensor"),
    ],
)
def test_errors(x, message):
    with pytest.raises(ValueError, match=message):
        transpose(x)


def test_threads_do_not_show(isa, generator):
    x, threads = torch.randn(500, 70, generator=generator).bfloat16(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert transpose(x).equal(x.t())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", [OPS.auto, OPS.reference], ids=str)
def test_opcheck(op, generator):
    torch.library.opcheck(op, (torch.randn(5, 9, generator=generator).bfloat16(),))


def test_compile(generator):
    compiled = torch.compile(lambda x: transpose(x * 2) + 1, fullgraph=True, backend="aot_eager")
    for shape in ((5, 9), (3, 4)):
        x = torch.randn(shape, generator=generator).bfloat16()
        assert compiled(x).equal((x * 2).t() + 1)
