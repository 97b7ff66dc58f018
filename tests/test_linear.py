"""The CPU's bfloat16 linear layers against PyTorch's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from syncmask_fast.model.linear import Linear, linear, replace_linear_layers


@pytest.mark.parametrize("rows", [(0,), (1,), (37,), (3, 5, 11)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (8, 24), (24, 8), (17, 101)])
def test_as_near_to_float64_as_pytorchs(rows, inputs, outputs, generator):
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((*rows, inputs), (outputs, inputs), (outputs,))
    )
    given = torch.randn(*rows, outputs, generator=generator)
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)):
        leaves = [y.to(dtype).requires_grad_() for y in (x, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found = function(*leaves)
        assert found.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
        results.append((found, *torch.autograd.grad(found, leaves, given.to(found.dtype))))
    assert [y.dtype for y in results[0][1:]] == [torch.float32] * 3
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        error = (ours - exact).norm()
        assert error <= 0.01 * exact.norm()
        assert error <= 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.slow
def test_compiled(generator):
    layer, results = Linear(24, 40), []
    x, given = torch.randn(37, 24, generator=generator), torch.randn(37, 40, generator=generator).bfloat16()
    for function in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = function(x)
        found.backward(given)
        results.append((found, layer.weight.grad, layer.bias.grad))
    for eager, compiled in zip(*results, strict=True):
        assert eager.dtype == compiled.dtype
        assert torch.allclose(eager.float(), compiled.float(), rtol=0.02, atol=0.02)


def test_pytorchs_own_where_nothing_is_gained(generator):
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 3), (4, 3), (4,)))
    assert linear(x, weight, bias).equal(F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.float16):
        assert linear(x, weight, bias).equal(F.linear(x, weight, bias))


def test_pytorchs_own_where_onednn_has_no_bfloat16():
    """In a process that may not use AVX-512, as on an older processor: `--precision bfloat16` still runs there."""
    code = """
import torch
from syncmask_fast.model import linear
layer = linear.Linear(6, 5)
with torch.autocast("cpu", torch.bfloat16):
    layer(torch.randn(4, 6)).float().sum().backward()
print(linear.BF16_AVAILABLE, layer.weight.grad.shape)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("torch.Size([5, 6])\n")


def test_layers_are_taken_over_with_their_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False), torch.nn.LayerNorm(2))
    before = dict(model.named_parameters())
    replace_linear_layers(model)
    assert [type(part) for part in model] == [Linear, torch.nn.Linear, torch.nn.LayerNorm]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        model[0](torch.randn(2, 3)).sum().backward()
    assert model[0].weight.grad.dtype == torch.float32


def test_frozen_weights_and_inputs(generator):
    layer = Linear(6, 5)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 6, generator=generator, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.allclose(torch.full((5,), 4.0))
    assert x.grad.allclose(layer.weight.bfloat16().float().sum(0).expand(4, 6), rtol=0.02, atol=0.02)
