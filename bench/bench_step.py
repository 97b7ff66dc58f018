"""The trainer's step against ALBEF's (bench/baseline.py)."""

from __future__ import annotations

import pytest
import torch

from bench.steps import COMPILED, PROVIDERS, TEXT_TOKENS, VISIBLE, configuration, held_mib, make_stepper
from syncmask_fast.training.flops import peak_flops, step_flops

# Preset, batch size, precision. On the CPU a base step takes many seconds; on a card the largest batch is to fill it.
CASES = {
    "cpu": [("tiny", 64, "float32"), ("tiny", 64, "bfloat16"), ("base", 8, "float32"), ("base", 8, "bfloat16")],
    "cuda": [("tiny", 64, "bfloat16"), *(("base", batch, "bfloat16") for batch in (32, 128, 256))],
}
VARIANTS_AT = ("tiny", 64, "float32"), ("tiny", 64, "bfloat16"), ("base", 128, "bfloat16")
ROUNDS = {("tiny", "cpu"): 10, ("base", "cpu"): 2, ("tiny", "cuda"): 20, ("base", "cuda"): 5}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", range(4))
def test_step(case, provider, device, benchmark, measured):
    preset, batch_size, precision = CASES[device.type][case]
    if device.type == "cuda" and provider == COMPILED:
        pytest.skip("ours is compiled on CUDA")
    if precision == "float32" and provider == "albef-bf16":
        pytest.skip("the same as albef")
    if provider in (VISIBLE, COMPILED) and CASES[device.type][case] not in VARIANTS_AT:
        pytest.skip("variants are measured for one case of a preset")
    measured.require_green("baseline")
    stepper = make_stepper(provider, configuration(preset, batch_size, precision), device)
    if device.type == "cuda":
        try:
            stepper.step()
        except torch.cuda.OutOfMemoryError:
            pytest.skip(f"{provider} does not fit at batch size {batch_size}")
    flops = [step_flops(stepper.state.model, batch.lengths, with_fusion=True) for batch in stepper.batches]
    dtype = getattr(torch, precision)

    def facts(seconds: float) -> dict[str, float]:
        mfu = sum(flops) / len(flops) / seconds / peak_flops(device, dtype)
        return {"mfu": mfu, "held_mib": held_mib(stepper.state)}

    measured.measure_whole(
        benchmark,
        operator="step",
        provider=provider,
        device=device,
        dtype=dtype,
        case=dict(preset=preset, batch=batch_size, tokens="-".join(map(str, TEXT_TOKENS))),
        function=stepper.step,
        items=batch_size,
        rounds=ROUNDS[preset, device.type],
        warm_up=3 if device.type == "cuda" else 1,  # compiling, and a few of the different shapes
        facts=facts,
    )
