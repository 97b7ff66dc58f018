"""The trainer's step against the parents' way (`baseline.py`): all of its ways at once, and each alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from syncmask_fast.config import PRESETS, TrainConfig
from syncmask_fast.data.loader import Batch
from syncmask_fast.model.layout import PackedLayout
from syncmask_fast.model.syncmask_model import SyncMaskModel
from syncmask_fast.objective.losses import Queue
from syncmask_fast.objective.pretraining import make_teacher
from syncmask_fast.train import configure_compute, train_step
from syncmask_fast.training.checkpoint import FeatureBank, TrainState
from syncmask_fast.training.flops import peak_flops, step_flops
from syncmask_fast.training.optimizer import make_optimizer
from tests.helpers import small_tokenizer

_spec = importlib.util.spec_from_file_location("bench_baseline", Path(__file__).with_name("baseline.py"))
baseline = sys.modules["bench_baseline"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(baseline)

SWITCHES = [field.name for field in dataclasses.fields(baseline.Ways)]
# "parents" is what someone gets who follows the papers; "parents-same" is the same in the trainer's precision; "parents-kind" has PyTorch's fused
# attention and no dropout besides.
WAYS = {"parents": baseline.Ways.all(), "parents-same": dataclasses.replace(baseline.Ways.all(), float32=False)}
WAYS["parents-kind"] = dataclasses.replace(
    WAYS["parents-same"], written_attention=False, dropout=False, fused_attention=True
)
WAYS |= {f"ours but {name}": baseline.Ways(**{name: True}) for name in SWITCHES}
VISIBLE = "ours, visible copy"  # the same step with `--loss.mim-input visible`
COMPILED = "ours, compiled"  # with `--compile on`, which is auto's choice on CUDA anyway
PROVIDERS = ["ours", VISIBLE, COMPILED, *WAYS]
ONLY_ON_CPU = {COMPILED, "ours but wide_residuals", "ours but plain_linear"}  # what a GPU has anyway, or never has
# Preset, batch size, precision. On the CPU a base step takes many seconds; on a card the largest batch is to fill it.
CASES = {
    "cpu": [
        (preset, batch, precision)
        for preset, batch in (("tiny", 64), ("base", 8))
        for precision in ("float32", "bfloat16")
    ],
    "cuda": [("tiny", 64, "bfloat16"), *(("base", batch, "bfloat16") for batch in (32, 128, 256))],
}
EACH_SWITCH_AT = ("tiny", 64, "float32"), ("tiny", 64, "bfloat16"), ("base", 128, "bfloat16")
STEPS, ROUNDS = 1000, {("tiny", "cpu"): 10, ("base", "cpu"): 2, ("tiny", "cuda"): 20, ("base", "cuda"): 5}
TEXT_TOKENS = 12, 50


def configuration(preset: str, batch_size: int, precision: str, vocabulary: int | None = None) -> TrainConfig:
    """A preset as it stands, but for a tokenizer from elsewhere, and a vocabulary of another size where one is given."""
    config = PRESETS[preset][1]
    text = dataclasses.replace(config.text, name=None, vocab_size=vocabulary or config.text.vocab_size)
    return dataclasses.replace(config, batch_size=batch_size, precision=precision, text=text, steps=STEPS, epochs=None)


def make_batches(config: TrainConfig, device: torch.device, count: int = 4) -> list[Batch]:
    """Random pixels and words; every batch has other lengths, as in training. A tenth of the pairs are of the product before."""
    made, rng = [], np.random.default_rng(0)
    for _ in range(count):
        n = config.batch_size
        lengths = rng.integers(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1, n).tolist()
        products = np.arange(n) - (rng.random(n) < 0.1)
        ids = torch.from_numpy(rng.integers(5, config.text.vocab_size, sum(lengths)))
        pixels = torch.from_numpy(rng.standard_normal((n, 3, config.image.size, config.image.size), np.float32))
        places = torch.arange(n, device=device)
        made.append(
            Batch(
                pixels.to(device),
                ids.to(device),
                PackedLayout.of(lengths, device).cu_seqlens,
                lengths,
                torch.from_numpy(abs(products)).to(device),
                places,
                places,
                np.arange(n),
            )
        )
    return made


def make_state(config: TrainConfig, device: torch.device, ways=None) -> TrainState:
    torch.manual_seed(0)
    model = SyncMaskModel(config, small_tokenizer()).to(device)
    optimizer = (
        make_optimizer(model, config.optim) if ways is None else baseline.baseline_optimizer(model, config.optim, ways)
    )
    queue = Queue.empty(config.loss.queue, config.embed_dim, device)
    if config.loss.queue:  # full, as after the first steps of a run
        queue.enqueue(
            *torch.nn.functional.normalize(torch.randn(2, config.loss.queue, config.embed_dim, device=device), dim=-1),
            torch.arange(config.loss.queue, device=device) + config.batch_size,
            0,
            config.loss.queue,
        )
    bank = FeatureBank.empty(config.batch_size, config.embed_dim, device)
    return TrainState(
        model, make_teacher(model), optimizer, queue, bank, torch.arange(config.batch_size), step=STEPS - 1
    )


def stepper(
    provider: str, preset: str, batch_size: int, precision: str, device: torch.device, vocabulary: int | None = None
) -> tuple[TrainState, list[Batch], Callable]:
    """The provider's state, the batches it takes in turn, and a function that does its next step."""
    config = configuration(preset, batch_size, precision, vocabulary)
    if provider == VISIBLE:
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, mim_input="visible"))
    if provider == COMPILED:
        config = dataclasses.replace(config, compile="on")
    ways = WAYS.get(provider)
    state, made = make_state(config, device, ways), make_batches(config, device)
    batches = itertools.cycle(made)
    if ways is not None:
        return (
            state,
            made,
            lambda: baseline.baseline_step(
                config, state, next(batches), ways, sync_share=1.0, alpha=config.loss.alpha, seed=0
            ),
        )
    configure_compute(config, state.model, state.teacher, device)
    return state, made, lambda: train_step(config, state, batches, STEPS, 1)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", range(4))
def test_step(case, provider, device, benchmark, measured):
    if case >= len(CASES[device.type]):
        pytest.skip("no such case on this device")
    preset, batch_size, precision = CASES[device.type][case]
    if device.type == "cuda" and provider in ONLY_ON_CPU:
        pytest.skip("no difference on CUDA")
    if precision == "float32" and provider in ("parents-same", "ours but float32"):
        pytest.skip("the same as another provider")
    if provider.startswith(("ours but", "ours,")) and CASES[device.type][case] not in EACH_SWITCH_AT:
        pytest.skip("each switch is measured for one case of a preset")
    measured.require_green("baseline")
    state, made, step = stepper(provider, preset, batch_size, precision, device)
    if device.type == "cuda":
        try:
            step()
        except torch.cuda.OutOfMemoryError:
            pytest.skip(f"{provider} does not fit at batch size {batch_size}")
    flops = sum(step_flops(state.model, batch.lengths, fuse=True) for batch in made) / len(made)
    dtype = getattr(torch, precision)
    measured.measure_whole(
        benchmark,
        operator="step",
        provider=provider,
        device=device,
        dtype=dtype,
        case=dict(preset=preset, batch=batch_size, tokens="-".join(map(str, TEXT_TOKENS))),
        function=step,
        items=batch_size,
        rounds=ROUNDS[preset, device.type],
        warm_up=3 if device.type == "cuda" else 1,  # compiling, and a few of the different shapes
        facts=lambda seconds: {"mfu": flops / seconds / peak_flops(device, dtype), "held_mib": held_mib(state)},
    )


def held_mib(state: TrainState) -> float:
    """What is held from step to step: weights, teacher, optimiser, queue. A step's peak is this and extra_mib."""
    tensors = [*state.model.parameters(), *state.teacher.parameters(), *state.queue]
    tensors += [
        value for _, kept in state.optimizer.states() for value in kept.values() if isinstance(value, torch.Tensor)
    ]
    return sum(x.numel() * x.element_size() for x in tensors) / 2**20
