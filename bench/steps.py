"""What the benchmarks of the step share: configurations, batches, states, and each provider's step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bench.baseline import BASELINES, baseline_optimizer, baseline_step
from syncmask_fast.config import PRESETS, TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.distributed.gradients import GradientReducer
from syncmask_fast.distributed.group import SINGLE_PROCESS
from syncmask_fast.distributed.shard import BatchShard
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.memory import Features
from syncmask_fast.objective.pretraining import pretraining_losses
from syncmask_fast.objective.schedule import Schedule
from syncmask_fast.training.checkpoint import TrainState
from syncmask_fast.training.setup import configure_compute
from syncmask_fast.training.step import train_step
from tests.helpers import small_tokenizer

VISIBLE = "ours, visible copy"  # the same step with `--loss.mim-input visible`
COMPILED = "ours, compiled"  # with `--compile on`, which is auto's choice on CUDA
PROVIDERS = ["ours", VISIBLE, COMPILED, *BASELINES]
STEPS = 1000  # of the run that a step is the last of: sync masks everywhere
TEXT_TOKENS = 12, 50


def configuration(preset: str, batch_size: int, precision: str, vocab_size: int | None = None) -> TrainConfig:
    """Return a preset without pretrained texts, with another batch size, precision and perhaps vocabulary."""
    config = PRESETS[preset][1]
    text = dataclasses.replace(config.text, name=None, vocab_size=vocab_size or config.text.vocab_size)
    return dataclasses.replace(config, batch_size=batch_size, precision=precision, text=text, steps=STEPS, epochs=None)


def make_batches(config: TrainConfig, device: torch.device, count: int = 4) -> list[Batch]:
    """Return batches of random pixels and tokens. A tenth of the pairs have the product of the pair before."""
    batches, rng, n = [], np.random.default_rng(0), config.batch_size
    items = torch.arange(n, device=device)
    for _ in range(count):
        lengths = rng.integers(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1, n).tolist()  # other lengths in every batch
        products = torch.from_numpy(abs(np.arange(n) - (rng.random(n) < 0.1))).to(device)
        token_ids = torch.from_numpy(rng.integers(5, config.text.vocab_size, sum(lengths))).to(device)
        pixels = rng.standard_normal((n, 3, config.image.size, config.image.size), np.float32)
        batches.append(
            Batch(
                pixels=torch.from_numpy(pixels).to(device),
                token_ids=token_ids,
                cu_seqlens=PackedLayout.of(lengths, device).cu_seqlens,
                lengths=lengths,
                sample_ids=items,
                sample_ids_host=np.arange(n),
                epoch_positions=items,
                shard=BatchShard.whole(lengths, items, products),
            )
        )
    return batches


def make_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Return the state before a run's last step, with a full queue as after the first steps of a run."""
    torch.manual_seed(0)
    model = SyncMaskModel(config, small_tokenizer()).to(device)
    state = TrainState.create(model, config, {"samples": config.batch_size})
    state.step = STEPS - 1
    if size := config.loss.queue:
        features = torch.nn.functional.normalize(torch.randn(2, size, config.embed_dim, device=device), dim=-1)
        product_ids = torch.arange(size, device=device) + config.batch_size
        state.queue.enqueue(Features(*features), product_ids, 0, size)
    return state


@dataclass
class Stepper:
    """A provider ready to run."""

    state: TrainState
    batches: list[Batch]
    """Taken in turn."""
    step: Callable[[], object]
    """Take the next step."""


def make_stepper(provider: str, config: TrainConfig, device: torch.device) -> Stepper:
    """Return the stepper of one of `PROVIDERS`."""
    if provider == VISIBLE:
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, mim_input="visible"))
    if provider == COMPILED:
        config = dataclasses.replace(config, compile="on")
    state, batches = make_state(config, device), make_batches(config, device)
    turns = itertools.cycle(batches)
    if provider in BASELINES:
        state.optimizer = baseline_optimizer(state.model, config.optim)
        schedule, options = Schedule.at(config, state.step, STEPS, 1), BASELINES[provider]
        return Stepper(state, batches, lambda: baseline_step(state, next(turns), config, schedule, options))
    configure_compute(config, state)
    reducer = GradientReducer(state.model.parameters(), SINGLE_PROCESS)
    return Stepper(state, batches, lambda: train_step(state, turns, config, pretraining_losses, reducer, STEPS, 1))


def held_mib(state: TrainState) -> float:
    """Return the memory of what lasts from step to step: weights, teacher, optimizer, queue."""
    tensors = [*state.model.parameters(), *state.teacher.parameters(), *state.queue]
    for _, values in state.optimizer.parameter_states():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(x.nbytes for x in tensors) / 2**20
