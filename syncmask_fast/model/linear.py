"""Linear layers on the CPU in bfloat16: the bias within the product, and weight gradients as plain products.

PyTorch copies the bias into every row before the product, and takes a weight's gradient by a product of a transposed matrix, for which oneDNN needs
twice the time of a plain one. Elsewhere (CUDA, float32, processors for which oneDNN has no bfloat16) these layers are PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncmask_fast.kernels.transpose import transpose

RUNS_HERE: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[..., O] of x [..., I], weight [O, I] and bias [O]; within the CPU's autocast to bfloat16, x and the result in that."""
    if (
        not RUNS_HERE
        or x.is_cuda
        or not torch.is_autocast_enabled("cpu")
        or torch.get_autocast_dtype("cpu") != torch.bfloat16
    ):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.bfloat16(), weight, bias)


def replace_linear_layers(model: nn.Module) -> None:
    """Makes every `torch.nn.Linear` with a bias in the model a `Linear`; parameters and their names stay."""
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is not None:
            module.__class__ = Linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        low = weight.bfloat16()
        ctx.save_for_backward(x, low)
        ctx.dtypes = weight.dtype, bias.dtype
        if torch.compiler.is_compiling():  # which takes the product below with constant weights only
            return F.linear(x, low, bias.bfloat16())
        return torch.ops.mkldnn._linear_pointwise(x, low, bias.bfloat16(), "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ weight
        grads = grad.flatten(0, -2).contiguous()
        if ctx.needs_input_grad[1]:
            rows = x.flatten(0, -2).contiguous()
            # The narrower of the two is transposed.
            of_weight = (
                transpose(transpose(rows) @ grads) if rows.shape[1] < grads.shape[1] else transpose(grads) @ rows
            )
            of_weight = of_weight.to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            of_bias = (grads.new_ones(1, len(grads)) @ grads)[0].to(ctx.dtypes[1])
        return of_x, of_weight, of_bias
