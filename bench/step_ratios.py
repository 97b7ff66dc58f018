"""The step against the parents' way, idea by idea, in turns: ours and up to three others at a time, all once in a round, ratios within a round.

    python bench/step_ratios.py [tiny|base] [--batch 64] [--precision float32|bfloat16] [--vocabulary 30522] [--rounds 8] [--each | --only ...]

`test_step.py` measures one provider after the other, and on a machine whose clock moves, what is measured minutes apart cannot be compared.
The table goes to bench/results/step_ratios-PRESET[-VOCABULARY]-PRECISION-ALLOCATOR.json, or to $OUT.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for _name in ("harness", "test_step"):
    _spec = importlib.util.spec_from_file_location(f"bench_{_name}", ROOT / "bench" / f"{_name}.py")
    sys.modules[f"bench_{_name}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[f"bench_{_name}"])
TOGETHER, WARM_UP = 3, 2
harness, cases = sys.modules["bench_harness"], sys.modules["bench_test_step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset", nargs="?", default="tiny", choices=("tiny", "base"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, help="instead of the preset's")
    parser.add_argument("--each", action="store_true", help="every idea by itself too")
    parser.add_argument("--only", nargs="+", default=[], help="these providers beside ours: as many as fit the memory")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    providers = [name for name in cases.PROVIDERS if given.each or not name.startswith(("ours but", "ours,"))]
    if given.precision == "float32":
        providers = [name for name in providers if name not in ("parents-same", "ours but float32")]
    providers = ["ours", *given.only] if given.only else providers
    others = [name for name in providers if name != "ours"]
    rows: dict[str, dict[str, float]] = {}
    for first in range(
        0, len(others), TOGETHER
    ):  # more of them would push each other's compiled products out of oneDNN's memory
        found = measure(["ours", *others[first : first + TOGETHER]], given, device)
        rows |= {name: row for name, row in found.items() if name not in rows}  # ours: of the first group
    for name, row in rows.items():
        print(
            f"{name:24s} {row['median_s']:8.3f} s (min {row['min_s']:.3f})  {row['to_ours']:.2f}x ours ({row['to_ours_at_best']:.2f}x at best)"
        )
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about = {
        "preset": given.preset,
        "batch": given.batch,
        "precision": given.precision,
        "vocabulary": given.vocab_size,
        "rounds": given.rounds,
        **harness.machine(device),
        "date": now,
    }
    case = f"{given.preset}-{given.vocab_size}" if given.vocabulary else given.preset
    path = harness.results_folder() / f"step_ratios-{case}-{given.precision}-{harness.allocator()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"providers": rows}, indent=1) + "\n")
    print(f"written: {path}")


def measure(names: list[str], given: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """The median and the least time of each provider's step, and the median over rounds of its ratio to ours. Each round has an order of its own."""
    steppers = {
        name: cases.stepper(name, given.preset, given.batch, given.precision, device, given.vocab_size)[2]
        for name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(given.rounds + WARM_UP):
        for name in random.Random(number).sample(names, len(names)):
            harness.synchronize(device)
            begin = time.perf_counter()
            steppers[name]()
            harness.synchronize(device)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            "median_s": statistics.median(times),
            "min_s": min(times),
            "to_ours": statistics.median(a / b for a, b in zip(times, seconds["ours"], strict=True)),
            "to_ours_at_best": min(times) / min(seconds["ours"]),
        }
        for name, times in seconds.items()
    }


if __name__ == "__main__":
    main()
