"""What every operator gets from its one schema: backends, the reference where a kernel is missing, instruction sets."""

from __future__ import annotations

import warnings

import pytest
import torch

from syncmask_fast import _native
from syncmask_fast.kernels import (
    crop_resize,
    group_semi_hard,
    library,
    mine_semi_hard,
    packed_attention,
    sync_mask,
    transpose,
)

CPU = torch.device("cpu")
IDS, FEATS, STARTS = torch.arange(6), torch.eye(6)[:, :4].contiguous(), torch.tensor([0, 6], dtype=torch.int32)
HEADS = torch.ones(6, 1, 4)
OUT, THREE = torch.zeros(3, 2, 2), torch.ones(3)
# An operator and arguments that it takes.
CASES = {
    "sync_mask": (
        sync_mask.OPS,
        (torch.ones(2, 3, 4, 6), torch.ones(2, 3, 6, 6), torch.ones(2, 4) > 0, None, 0.15, 0.5, "peak", "max", 0.4),
    ),
    "mine_semi_hard": (mine_semi_hard.OPS, (FEATS, FEATS, IDS, IDS, torch.ones(6), 1, 0.0, None, 0)),
    "group_semi_hard": (group_semi_hard.OPS, (FEATS, FEATS, IDS, 1, 0.0, 0, None)),
    "packed_attention": (packed_attention.OPS, (HEADS, HEADS, HEADS, STARTS, STARTS, 0.5)),
    "crop_resize": (
        crop_resize.OPS,
        (torch.ones(5, 5, 3, dtype=torch.uint8), 0, 0, 5, 5, False, 1.0, 1.0, 1.0, THREE, THREE, OUT),
    ),
    "transpose": (transpose.OPS, (torch.ones(2, 3, dtype=torch.bfloat16),)),
}


@pytest.mark.parametrize("name", CASES)
def test_without_the_extension(name, monkeypatch):
    """The reference runs, and a warning names the operator and the reason, once."""
    ops, args = CASES[name]
    monkeypatch.setattr(_native, "_path", None)
    monkeypatch.setattr(_native, "_problem", "the C++ extension is not built")
    monkeypatch.setattr(library, "_warned", set())
    with pytest.raises(ValueError, match=r"backend is 'cpp', but the C\+\+ extension is not built; .*make install"):
        ops.pick("cpp", CPU)
    with pytest.warns(UserWarning, match=f"{name} runs its slow reference: .*not built.*make install"):
        first = ops.fallback(*args)  # `ops.auto` is the C++ kernel here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ops.fallback(*args)
    expected = ops.auto(*args)
    for results in (first, again):
        for got, want in zip(as_tuple(results), as_tuple(expected), strict=True):
            torch.testing.assert_close(got, want)


def as_tuple(results: torch.Tensor | tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...]:
    if results is None:
        return (OUT.clone(),)
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("name", CASES)
def test_pick(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ops, _ = CASES[name]
    assert ops.pick("auto", CPU) is ops.auto
    assert ops.pick("reference", CPU) is ops.reference
    with pytest.raises(ValueError, match="backend is 'fast'; expected one of 'auto', 'reference', 'triton', 'cpp'"):
        ops.pick("fast", CPU)
    message = f"backend is 'triton', which {name} does not have on cpu; expected 'auto' or 'reference'"
    with pytest.raises(ValueError, match=message):
        ops.pick("triton", CPU)
    with pytest.raises(ValueError, match=f"which {name} does not have on meta"):
        ops.pick("triton", torch.device("meta"))


def test_set_isa(isa):
    assert _native.isa() == isa
    with pytest.raises(ValueError, match="isa is 'sse9'; expected one of .*'generic'"):
        _native.set_isa("sse9")
    assert _native.isa() == isa
    _native.set_isa(None)
    assert _native.isa() == _native.isas()[0]


def test_num_sms():
    assert library.num_sms(CPU) == 1
    assert not library.has_triton(torch.device("meta"))
