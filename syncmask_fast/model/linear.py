"""Linear layers on the CPU in bfloat16: the bias within the product, and weight gradients as plain products.

PyTorch copies the bias into every row before the product. It computes a weight's gradient as a product of a transposed
matrix, for which oneDNN needs twice the time of a plain one. On CUDA, in float32, and on processors for which oneDNN
has no bfloat16 these layers are PyTorch's.

Shape letters: I inputs, O outputs of a layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncmask_fast.kernels.transpose import transpose

BF16_AVAILABLE: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return [..., O] of x [..., I], weight [O, I] and bias [O], in bfloat16 within the CPU's autocast to it."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if not BF16_AVAILABLE or x.is_cuda or not autocast:
        return F.linear(x, weight, bias)
    return _Linear.apply(x.bfloat16(), weight, bias)


def replace_linear_layers(model: nn.Module) -> None:
    """Replace each `torch.nn.Linear` that has a bias by `Linear`, keeping the parameters and their names."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.bias is not None:
                setattr(parent, name, _with_parameters_of(child))


def _with_parameters_of(layer: nn.Linear) -> Linear:
    """Return a `Linear` that holds the layer's own parameters, not copies."""
    # On the meta device it allocates nothing and draws no random numbers.
    new = Linear(layer.in_features, layer.out_features, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Saved for the backward pass too: no second conversion.
        low = weight.bfloat16()
        ctx.save_for_backward(x, low)
        ctx.dtypes = weight.dtype, bias.dtype
        # The compiler takes the product below with constant weights only.
        if torch.compiler.is_compiling():
            return F.linear(x, low, bias.bfloat16())
        return torch.ops.mkldnn._linear_pointwise(x, low, bias.bfloat16(), "none", [], "")

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        grad = grad.flatten(0, -2).contiguous()
        if ctx.needs_input_grad[1]:
            rows = x.flatten(0, -2).contiguous()
            # Transpose the narrower of the two: fewer bytes to move.
            if rows.shape[1] < grad.shape[1]:
                grad_weight = transpose(transpose(rows) @ grad)
            else:
                grad_weight = transpose(grad) @ rows
            grad_weight = grad_weight.to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            # A product with ones: the sum over rows with float32 sums, in one pass.
            grad_bias = (grad.new_ones(1, len(grad)) @ grad)[0].to(ctx.dtypes[1])
        return grad_x, grad_weight, grad_bias
