"""The optimiser of a run: AdamW for everything, or Muon for the weight matrices and AdamW for the rest; and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from syncmask_fast.config import OptimConfig


class Optimizer:
    """One or two of torch's optimisers, stepped together."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.peaks = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict]:
        """AdamW's groups first."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def states(self) -> Iterator[tuple[Tensor, dict]]:
        """Every parameter with the (changeable) state that its optimiser keeps of it."""
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    yield parameter, part.state[parameter]

    def scale_learning_rate(self, factor: float) -> None:
        """Sets every group's learning rate to `factor` times its peak."""
        for group, peak in zip(self.param_groups, self.peaks, strict=True):
            group["lr"] = factor * peak


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Fused AdamW, without weight decay for biases, norms, single vectors and the temperature; Muon for matrices where `muon_lr` is set.

    Muon makes the updates of a matrix orthogonal (Jordan et al. 2024). A row of an embedding is a vector of its own, so embeddings stay with AdamW.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if config.muon_lr is not None and p.ndim == 2 and id(p) not in embeddings]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, fused=True)]
    if config.muon_lr is not None:
        parts.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_decay))
    return Optimizer(parts)


def learning_rate_factor(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a cosine to `min_lr / lr` at the last step."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
