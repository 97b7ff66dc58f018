"""AdamW, or Muon for weight matrices and AdamW for the rest, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from syncmask_fast.config import OptimConfig
from syncmask_fast.training.rollback import Rollback


class Optimizer:
    """One or two of torch's optimizers, stepped together.

    conv_views: for each convolution that Muon updates, the matrix that shares its memory -> the convolution's weight.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], conv_views: dict[Tensor, Tensor] | None = None) -> None:
        self.optimizers = optimizers
        self.conv_views = conv_views or {}
        self.peak_lrs = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict]:
        """AdamW's groups first."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, finite: Tensor | None = None) -> None:
        """Update parameters and state; change nothing where `finite`, a bool scalar on the device, is false."""
        # The view shares the weight's memory, but autograd knows only the convolution.
        for matrix, parameter in self.conv_views.items():
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        # A finite check on the host would stall the device: update, then undo where it was not finite.
        rollback = Rollback()
        for optimizer in self.optimizers:
            if finite is not None and isinstance(optimizer, torch.optim.Muon):
                self._snapshot_muon(optimizer, rollback)
            elif finite is not None:
                # Fused AdamW skips the update itself, as under torch.amp.GradScaler.
                optimizer.found_inf = 1 - finite.float()
            optimizer.step()
        if finite is not None:
            rollback.restore_unless(finite)

    @staticmethod
    def _snapshot_muon(optimizer: torch.optim.Muon, rollback: Rollback) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            state = optimizer.state[parameter]
            # Create it before the first step, so that it can be restored.
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            rollback.snapshot((parameter, *state.values()))

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.conv_views.values():
            parameter.grad = None

    def parameter_states(self) -> Iterator[tuple[Tensor, dict]]:
        """Yield every model parameter with the state, open to changes, that its optimizer keeps."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield self.conv_views.get(parameter, parameter), optimizer.state[parameter]

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Set every group's learning rate to a multiple of its peak."""
        for group, peak in zip(self.param_groups, self.peak_lrs, strict=True):
            group["lr"] = multiplier * peak


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Return fused AdamW, and with `--optim.muon-lr` Muon for matrices and convolutions (Jordan et al. 2024).

    Biases, norms, single vectors and the temperature have no weight decay.
    """
    # A row of an embedding is a vector of its own, so orthogonal updates make no sense there.
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    muon = [
        p for p in model.parameters() if p.ndim in (2, 4) and id(p) not in embeddings and config.muon_lr is not None
    ]
    muon_ids = {id(p) for p in muon}
    others = [p for p in model.parameters() if id(p) not in muon_ids]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # Fused: one kernel for all parameters, and it can skip an update on the device.
    adamw = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    if config.muon_lr is None:
        return Optimizer([adamw])
    # Muon takes matrices only: a convolution's kernel is one with a row for each output channel.
    conv_views = {nn.Parameter(p.detach().flatten(1)): p for p in muon if p.ndim == 4}
    matrices = [p for p in muon if p.ndim == 2] + list(conv_views)
    return Optimizer(
        [adamw, torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_weight_decay)], conv_views
    )


def lr_multiplier(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate as a fraction of its peak: linear warm-up, then a cosine to min_lr / lr."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
