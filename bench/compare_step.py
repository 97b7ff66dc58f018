"""The trainer's step against ALBEF's, in turns: ours and up to three others once per round, ratios within a round.

    python -m bench.compare_step [tiny|base] [--batch 64] [--precision float32|bfloat16] [--vocab-size 30522]
                                 [--rounds 8] [--only PROVIDER ...]

`bench_step.py` measures one provider after the other. If the clock changes meanwhile, such times cannot be
compared. The table goes to compare_step-PRESET[-VOCABULARY]-PRECISION-ALLOCATOR.csv in bench/results, or in $OUT.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import time

import torch

from bench import harness
from bench.steps import COMPILED, PROVIDERS, configuration, make_stepper
from syncmask_fast.config import TrainConfig

# More of them at a time would evict each other's compiled products from oneDNN's cache.
TOGETHER, WARM_UP = 3, 2


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset", nargs="?", default="tiny", choices=("tiny", "base"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, help="instead of the preset's")
    parser.add_argument(
        "--only", nargs="+", choices=PROVIDERS, help="compare ours with these: as many as fit the memory"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration(args.preset, args.batch, args.precision, args.vocab_size)
    # Compiling takes minutes; in float32 both precisions of the baseline are one.
    others = args.only or [name for name in PROVIDERS if name not in ("ours", COMPILED)]
    others = [name for name in others if not (name == "albef-bf16" and args.precision == "float32")]

    # 1. Measure in groups; the row of ours is that of the first group.
    rows: dict[str, dict[str, float]] = {}
    for first in range(0, len(others), TOGETHER):
        group = measure(["ours", *others[first : first + TOGETHER]], config, args.rounds, device)
        rows |= {name: row for name, row in group.items() if name not in rows}
    for name, row in rows.items():
        times = f"{row['median_s']:8.3f} s (min {row['min_s']:.3f})"
        print(f"{name:24s} {times}  {row['to_ours']:.2f}x ours ({row['to_ours_at_best']:.2f}x at best)")

    # 2. Write a line per provider.
    columns = {name: getattr(args, name) for name in ("preset", "batch", "precision", "vocab_size", "rounds")}
    columns |= harness.machine(device)
    name = f"{args.preset}-{args.vocab_size}" if args.vocab_size else args.preset
    path = harness.results_folder() / f"compare_step-{name}-{args.precision}-{harness.allocator()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"provider": provider, **row, **columns} for provider, row in rows.items()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)
    print(f"written: {path}")


def measure(
    providers: list[str], config: TrainConfig, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return each provider's median and least time of a step in seconds, and its ratio to ours."""
    steppers = {name: make_stepper(name, config, device) for name in providers}
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(rounds + WARM_UP):
        for name in random.Random(number).sample(providers, len(providers)):  # another order in each round
            harness.synchronize(device)
            begin = time.perf_counter()
            steppers[name].step()
            harness.synchronize(device)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    rows = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["ours"], strict=True)]
        rows[name] = {
            "median_s": round(statistics.median(times), 4),
            "min_s": round(min(times), 4),
            "to_ours": round(statistics.median(ratios), 3),
            "to_ours_at_best": round(min(times) / min(seconds["ours"]), 3),
        }
    return rows


if __name__ == "__main__":
    main()
