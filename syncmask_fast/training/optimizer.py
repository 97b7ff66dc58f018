"""The optimiser of a run: AdamW for everything, or Muon for the weight matrices and AdamW for the rest; and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from syncmask_fast.config import OptimConfig
from syncmask_fast.training.rollback import Rollback


class Optimizer:
    """One or two of torch's optimisers, stepped together.

    flattened: matrices that an optimiser holds in place of a parameter of more dimensions, whose memory they share.
    """

    def __init__(self, parts: list[torch.optim.Optimizer], flattened: dict[Tensor, Tensor] | None = None) -> None:
        self.parts = parts
        self.flattened = flattened or {}
        self.peaks = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict]:
        """AdamW's groups first."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, finite: Tensor | None = None) -> None:
        """Updates the parameters; where `finite`, a bool scalar on their device, is false, neither they nor the state change."""
        for matrix, parameter in self.flattened.items():
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        rollback = Rollback()
        for part in self.parts:
            if finite is not None and isinstance(part, torch.optim.Muon):
                for parameter in (p for group in part.param_groups for p in group["params"] if p.grad is not None):
                    kept = part.state[parameter]
                    if not kept:  # as Muon itself begins; made here, so that there is something to go back to
                        kept["momentum_buffer"] = torch.zeros_like(parameter)
                    rollback.snapshot((parameter, *kept.values()))
            elif finite is not None:
                part.found_inf = 1 - finite.float()  # fused AdamW heeds it, as torch.amp.GradScaler does
            part.step()
        if finite is not None:
            rollback.restore_unless(finite)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        for parameter in self.flattened.values():
            parameter.grad = None

    def states(self) -> Iterator[tuple[Tensor, dict]]:
        """Every parameter with the (changeable) state that its optimiser keeps of it."""
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield self.flattened.get(parameter, parameter), part.state[parameter]

    def set_lr_multiplier(self, factor: float) -> None:
        """Sets every group's learning rate to `factor` times its peak."""
        for group, peak in zip(self.param_groups, self.peaks, strict=True):
            group["lr"] = factor * peak


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Fused AdamW, without weight decay for biases, norms, single vectors and the temperature; where `muon_lr` is set, Muon for matrices and
    convolutions.

    Muon makes the updates of a matrix orthogonal (Jordan et al. 2024); a convolution's kernel is one with a row for each output channel. A row of an
    embedding is a vector of its own, so embeddings stay with AdamW.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    muon = config.muon_lr is not None
    taken = [p for p in model.parameters() if muon and (p.ndim == 2 or p.ndim == 4) and id(p) not in embeddings]
    others = {id(p): p for p in model.parameters()}
    for p in taken:
        del others[id(p)]
    groups = [
        {"params": [p for p in others.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, fused=True)]
    if not muon:
        return Optimizer(parts)
    flattened = {nn.Parameter(p.detach().flatten(1)): p for p in taken if p.ndim == 4}
    matrices = [p for p in taken if p.ndim == 2]
    parts.append(torch.optim.Muon([*matrices, *flattened], lr=config.muon_lr, weight_decay=config.muon_weight_decay))
    return Optimizer(parts, flattened)


def lr_multiplier(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine to `min_lr / lr` at the last step."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
