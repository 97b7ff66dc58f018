"""The long form of the fault tests, `make soak`: 50 kills, 1,000 mutants of each kind of input, and a full disk.
Prints one table for each.

Exit code 1 if anything was lost, or went by in silence, or crashed without a sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.kills import arguments, differences, kill_often
from tests.faults.launcher import ROOT, Launcher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mutants", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="feed the mutants of this kind alone, in this process")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.kind:
            print(json.dumps(feed_mutants(given.kind, Path(folder), given.mutants, given.seed)))
            return
        faults = soak_runs(Path(folder), given.kills, given.seed) + soak_inputs(given.mutants, given.seed)
    print("\nzero lost, zero silent" if not faults else "\n".join(["", "FAILED:", *faults]))
    raise SystemExit(bool(faults))


def soak_runs(folder: Path, kills: int, seed: int) -> list[str]:
    from syncmask_fast.sources.lookbook import draw_lookbook

    data, whole, killed = folder / "lookbook", folder / "whole", folder / "killed"
    draw_lookbook(data, products=22, eval_products=12, size=48, workers=1)
    steps = max(20, 4 * kills)
    with Launcher() as launcher:
        begin = time.perf_counter()
        if launcher.run(arguments(data, whole, steps), whole.with_suffix(".log")):
            return [whole.with_suffix(".log").read_text()[-2000:]]
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        moments = kill_often(launcher, arguments(data, killed, steps), killed, kills, seed, reach=4)
        found = differences(whole, killed)
        print(
            f"## {kills} SIGKILLs over a run of {steps} steps ({seconds:.0f} s undisturbed, "
            f"{time.perf_counter() - begin:.0f} s with the kills)\n"
        )
        again = killed.with_suffix(".log").read_text().count("resuming from")
        print(f"{again} of the {kills + 1} starts resumed from a checkpoint\n\n| moment | kills |\n|---|---|")
        for moment, count in moments.items():
            print(f"| {moment} | {count} |")
        print(
            f"\ndifferences from the run that was never stopped: {', '.join(found) or 'none, to the last bit'}\n",
            flush=True,
        )
        return [f"kills: {name}" for name in found] + soak_full_disk(launcher, folder, data, whole, steps)


def soak_full_disk(launcher: Launcher, folder: Path, data: Path, whole: Path, steps: int) -> list[str]:
    """A disk with room for two and a half checkpoints, where three are needed while one is being written; then one
    with room.
    """
    disk, log = folder / "disk", folder / "disk.log"
    disk.mkdir()
    size = sum(file.stat().st_size for file in (whole / "checkpoints").glob("*/*")) * 5 // 4
    mount = shutil.which("mount")
    mounted = (
        mount
        and subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode
        == 0
    )
    limit = None if mounted else size // 5  # where nothing can be mounted: no file may be larger than this
    try:
        argv = arguments(data, disk / "run", steps)
        code = launcher.run(argv, log, limit)
        said = log.read_text().splitlines()
        warned = sum("could not be written" in line and line.startswith("WARNING") for line in said)
        if mounted:
            subprocess.run([mount, "-o", f"remount,size={100 * size}", disk], check=True)
        again = launcher.run(argv, log)
        found = differences(whole, disk / "run") if again == 0 else [log.read_text()[-2000:]]
        print(f"## Disk full ({f'tmpfs of {size:,} bytes' if mounted else f'no file beyond {limit:,} bytes'})\n")
        print(
            f"{warned} of {steps // 2} checkpoints could not be written, each with a line that says so; "
            f"the run ended with code {code}:\n"
        )
        print(
            f"    {said[-1]}\n\nthen, with room: code {again}, "
            f"differences: {', '.join(found) or 'none, to the last bit'}\n",
            flush=True,
        )
        silent = not warned or code not in (0, 2) or any("Traceback" in line for line in said)
        return [f"disk full: {name}" for name in found] + [
            "disk full: no line said so, or the run ended in another way"
        ] * silent
    finally:
        if mounted:
            subprocess.run([shutil.which("umount"), disk], check=True)


def soak_inputs(mutants: int, seed: int) -> list[str]:
    """Each kind in a process of its own, so that one which ends its process is counted like the others."""
    from tests.faults.mutations import KINDS

    faults: list[str] = []
    print(f"## {mutants:,} mutants of each kind of input\n\n| input | how they ended |\n|---|---|", flush=True)
    for name in KINDS:
        command = [
            sys.executable,
            "-m",
            "tests.faults.soak",
            "--kind",
            name,
            "--mutants",
            str(mutants),
            "--seed",
            str(seed),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            faults.append(f"{name}: the process ended with {done.returncode}: {done.stderr[-1500:]}")
            print(f"| {name} | PROCESS ENDED |", flush=True)
            continue
        outcomes, crashes = json.loads(done.stdout.splitlines()[-1])
        faults += [f"{name}: {crash}" for crash in crashes[:5]]
        shown = [f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items(), key=lambda item: -item[1])]
        print(f"| {name} | {', '.join(shown)} |", flush=True)
    return faults


def feed_mutants(name: str, folder: Path, mutants: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many ended how, and what the crashes were: seed, error, place."""
    from tests.faults.mutations import KINDS, feed, watched

    kind = KINDS[name](folder / "files")
    outcomes: Counter[str] = Counter()
    crashes = []
    for number in range(mutants):
        data = kind.mutant(random.Random(f"{seed} {number}"))
        try:
            with watched(folder):
                outcomes[feed(kind, data)] += 1
        except BaseException as error:
            outcomes["CRASHED"] += 1
            trace, places = error.__traceback__, []
            while trace:
                places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
                trace = trace.tb_next
            crashes.append(
                f"mutant {number}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]} at {' '.join(places[-4:])}"
            )
    return outcomes, crashes


if __name__ == "__main__":
    main()
