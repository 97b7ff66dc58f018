"""What changes from step to step: the values that a step takes from its place in the training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from syncmask_fast.config import TrainConfig
from syncmask_fast.objective.masking import sync_probability


@dataclass(frozen=True)
class Schedule:
    """The values of one step, or of one of its micro-batches."""

    with_fusion: bool
    """Whether ITM, MLM and MIM are computed; False in the first `--loss.itc-only` of the training."""
    sync_probability: float
    """Probability that a sample gets sync masks rather than random ones."""
    alpha: float
    """Weight of the teacher's soft targets in ITC."""
    seed: int
    """All draws of the step (masks, negatives) follow from it."""

    @classmethod
    def at(cls, config: TrainConfig, step: int, steps: int, batches_per_epoch: int, micro_step: int = 0) -> Schedule:
        """Return the values of step `step` (from 0) of `steps`."""
        # A hash of the place rather than a saved generator: any step can be repeated after a resume.
        seed = np.random.SeedSequence([config.seed, step, micro_step]).generate_state(1, np.uint64)[0] >> 1
        return cls(
            with_fusion=step >= round(config.loss.itc_only * steps),
            sync_probability=sync_probability(step / steps, config.mask.ramp),
            # ALBEF: the teacher is of use after an epoch.
            alpha=config.loss.alpha * min(1.0, step * config.optim.grad_accum / batches_per_epoch),
            seed=int(seed),
        )
