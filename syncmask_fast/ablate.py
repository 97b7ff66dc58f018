"""The paper's two ablations: `python -m syncmask_fast.ablate`: how masks are chosen x how batches are grouped x seeds, equal steps, one table.

A cell is one pretraining with its fine-tunings, a run's folder each. A finished run is never done again, a run that was cut off goes on, and table,
plot and verdict are written anew after every cell.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure
from scipy.stats import t as student

from syncmask_fast import finetune, train
from syncmask_fast.config import PRESETS, Batching, Inputs
from syncmask_fast.ops import PATCH_SCORES, TOKEN_SCORES
from syncmask_fast.utils.errors import UserError, run_command
from syncmask_fast.utils.files import write_json
from syncmask_fast.utils.terminal import markdown_table

Results = dict[str, float]
Cells = dict[tuple[str, str, int], Results]  # (masking, batching, seed) -> all metrics of its runs


@dataclass(frozen=True)
class Ablation:
    """Pretrains and fine-tunes every combination of masking, batching and seed. What follows -- goes to every pretraining as it is."""

    out: Path = Path("runs/ablation")
    """Folder of all cells, and of table.md, table.json, plot.png."""
    data: str | None = None
    """Folder of shards; unset draws the lookbook."""
    preset: Literal["tiny", "base"] = "tiny"
    steps: int | None = None
    """Steps of every pretraining; unset is the preset's length."""
    masking: tuple[str, ...] = ("random", "sync")
    """Of random, none, sync (the preset's score rule) and sync:WORDS/PATCHES (that rule), such as sync:mass/max. The first is the baseline."""
    every_rule: bool = False
    """Adds every word rule with the preset's patch rule, and every patch rule with its word rule, in the last of --batching alone."""
    batching: tuple[Batching, ...] = ("random", "hard", "semi_hard")
    """The last is the one that is compared with the others."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[Literal["composed", "category", "subcategory"], ...] = ("composed", "subcategory")
    """Fine-tunings of every cell; retrieval and synchrony are measured without one."""
    tuning_steps: int | None = None
    """Steps of every fine-tuning; unset is the recipe's length."""
    inputs: Inputs = "image"
    """What recognition sees. Texts of the lookbook name the label, so that its pictures alone are the telling task."""

    def maskings(self, batching: str) -> list[str]:
        """The maskings to run with a batching."""
        names = list(self.masking)
        if self.every_rule and batching == self.batching[-1]:
            mask = PRESETS[self.preset][1].mask
            names += [f"sync:{words}/{mask.patch_score}" for words in TOKEN_SCORES if words != mask.token_score]
            names += [f"sync:{mask.token_score}/{patches}" for patches in PATCH_SCORES if patches != mask.patch_score]
        return list(dict.fromkeys(names))

    def check(self) -> None:
        """Raises `UserError` for the first setting that cannot work."""
        if not (self.masking and self.batching and self.seeds):
            raise UserError("--masking, --batching and --seeds need at least one value each.")
        for name in self.masking:
            kind, _, rule = name.partition(":")
            words, _, patches = rule.partition("/")
            if name not in ("random", "none", "sync") and not (
                kind == "sync" and words in TOKEN_SCORES and patches in PATCH_SCORES
            ):
                known = f"WORDS of {', '.join(TOKEN_SCORES)} and PATCHES of {', '.join(PATCH_SCORES)}"
                raise UserError(
                    f"--masking {name} is unknown: give random, none, sync or sync:WORDS/PATCHES with {known}."
                )


@dataclass(frozen=True)
class Column:
    """A column of the table: how a cell's metrics give its value, None where they do not."""

    name: str
    value: Callable[[Results], float | None]


def _metric(name: str, key: str) -> Column:
    return Column(name, lambda results: results.get(key))


def _lift(name: str, key: str) -> Column:
    """A share in percent as a multiple of that of shuffled masks."""
    return Column(
        name,
        lambda results: (
            results[f"{key}/precision"] / results[f"{key}/shuffled"] if results.get(f"{key}/shuffled") else None
        ),
    )


def _picture_gain(results: Results) -> float | None:
    right, other = (results.get(f"mlm/words-in-view/{name}") for name in ("nats", "nats-with-another-picture"))
    return None if right is None or other is None else other - right


COLUMNS = (
    _metric("retrieval R@1, 101 candidates", "retrieval/mean/101-candidate/R@1"),
    _metric("retrieval R@10, 101 candidates", "retrieval/mean/101-candidate/R@10"),
    _metric("text to image R@10, full gallery", "retrieval/t2i/full/R@10"),
    _metric("composed R@10, val-union", "composed/val-union/mean/R@10"),
    _metric("category accuracy, image+text", "category/image+text/accuracy"),
    _metric("category accuracy, image", "category/image/accuracy"),
    _metric("subcategory accuracy, image+text", "subcategory/image+text/accuracy"),
    _metric("subcategory accuracy, image", "subcategory/image/accuracy"),
    Column("nats that the picture saves at masked words in view", _picture_gain),
    _metric("words AUC", "sync/words/auc"),
    _lift("words in view, times shuffled", "sync/words"),
    _lift("patches on target, times shuffled", "sync/patches"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    ablation = tyro.cli(Ablation, args=argv[:at], prog="python -m syncmask_fast.ablate")
    ablation.check()
    more = argv[at + 1 :]
    same_settings(ablation, more)
    plan = [
        (masking, batching, seed)
        for seed in ablation.seeds
        for batching in ablation.batching
        for masking in ablation.maskings(batching)
    ]
    cells: Cells = {}
    for number, cell in enumerate(plan, 1):
        print(f"\ncell {number} of {len(plan)}: masking {cell[0]}, batching {cell[1]}, seed {cell[2]}", flush=True)
        cells[cell] = run_cell(ablation, cell, more)
        write_table(ablation.out, cells)
    print(markdown_table(table(cells)))
    print("\n" + "\n".join(verdict(cells)) + f"\n\n{ablation.out / 'table.md'}\n{ablation.out / 'plot.png'}")


def same_settings(ablation: Ablation, more: list[str]) -> None:
    """Keeps what must be equal in all cells beside them; raises `UserError` where the cells that are there were made otherwise."""
    now = {
        "preset": ablation.preset,
        "data": str(ablation.data),
        "steps": ablation.steps,
        "tuning_steps": ablation.tuning_steps,
        "more": more,
    }
    known = ablation.out / "settings.json"
    before = json.loads(known.read_text()) if known.is_file() else now
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        raise UserError(
            f"{ablation.out} holds an ablation with other settings ({', '.join(changed)}): use the same ones, or another --out."
        )
    ablation.out.mkdir(parents=True, exist_ok=True)
    write_json(known, now)


def run_cell(ablation: Ablation, cell: tuple[str, str, int], more: list[str]) -> Results:
    """The metrics of a cell, of which only what is not there yet is run."""
    masking, batching, seed = cell
    folder = ablation.out / f"{masking.replace(':', '-').replace('/', '-')}_{batching}_seed{seed}"
    kind, _, rule = masking.partition(":")
    common = ["--seed", str(seed), *(["--data", str(ablation.data)] if ablation.data else [])]
    flags = [ablation.preset, *common, "--masking", kind, "--batching", batching, "--out", str(folder / "pretraining")]
    if rule:
        words, _, patches = rule.partition("/")
        flags += ["--mask.token-score", words, "--mask.patch-score", patches]
    if ablation.steps:
        flags += ["--steps", str(ablation.steps)]
    results = _once(folder / "pretraining", lambda: train.main([*flags, *more]))
    for task in ablation.tasks:
        recognition = task in ("category", "subcategory")
        out = folder / (f"{task}-{ablation.inputs}" if recognition else task)
        flags = [task, *common, "--model", str(folder / "pretraining" / "model"), "--out", str(out)]
        flags += ["--inputs", ablation.inputs] if recognition else []
        flags += ["--steps", str(ablation.tuning_steps)] if ablation.tuning_steps else []
        results |= _once(out, lambda flags=flags: finetune.main(flags))
    return results


def _once(out: Path, run: Callable[[], None]) -> Results:
    """The results of a run, which is done if it has none yet. A finished run's checkpoints are of no more use."""
    if not (out / "results.json").is_file():
        run()
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return json.loads((out / "results.json").read_text())


# Table, plot, verdict ---------------------------------------------------------------------------------------------------------------------


def groups(cells: Cells) -> dict[tuple[str, str], dict[int, Results]]:
    """(masking, batching) -> seed -> metrics."""
    found: dict[tuple[str, str], dict[int, Results]] = {}
    for (masking, batching, seed), results in cells.items():
        found.setdefault((masking, batching), {})[seed] = results
    return found


def columns(cells: Cells) -> list[Column]:
    """The columns that every cell has a value for."""
    return [column for column in COLUMNS if all(column.value(results) is not None for results in cells.values())]


def table(cells: Cells) -> list[dict[str, str]]:
    """A row for each masking and batching: mean and, with two seeds or more, standard deviation (n - 1) between seeds."""
    rows = []
    for (masking, batching), seeds in groups(cells).items():
        row = {"masking": masking, "batching": batching, "seeds": str(len(seeds))}
        for column in columns(cells):
            values = [column.value(results) for results in seeds.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            row[column.name] = f"{statistics.mean(values):.2f}{spread}"
        rows.append(row)
    return rows


def verdict(cells: Cells) -> list[str]:
    """A sentence for each comparison and column: the first masking against each other one, the last batching against each other one."""
    maskings = list(dict.fromkeys(masking for masking, _, _ in cells))
    batchings = list(dict.fromkeys(batching for _, batching, _ in cells))
    pairs = [(0, name, maskings[0]) for name in maskings[1:]] + [(1, batchings[-1], name) for name in batchings[:-1]]
    return [_sentence(cells, column, place, ours, theirs) for place, ours, theirs in pairs for column in columns(cells)]


def _sentence(cells: Cells, column: Column, place: int, ours: str, theirs: str) -> str:
    """Whether `ours` differs from `theirs` in one column by more than seeds do.

    The differences are taken within a seed, between cells that are otherwise equal, and averaged over these. "Beyond the spread between seeds" means
    that the 95 % confidence interval of the mean difference (Student's t over seeds) does not hold 0.
    """
    found: dict[int, list[float]] = {}
    for cell, results in cells.items():
        if cell[place] == ours:
            other = cells.get((theirs, *cell[1:]) if place == 0 else (cell[0], theirs, cell[2]))
            if other is not None:
                found.setdefault(cell[2], []).append(column.value(results) - column.value(other))
    what = f"{('Masking', 'Batching')[place]} {ours} against {theirs}, {column.name}:"
    if not found:
        return f"{what} no two cells differ in this alone."
    each = [statistics.mean(values) for values in found.values()]
    mean, n = statistics.mean(each), len(each)
    if n == 1:
        return f"{what} {mean:+.2f} with one seed, from which nothing follows."
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(each) / n**0.5
    said = "no difference" if abs(mean) <= half else "more" if mean > 0 else "less"
    return f"{what} {mean:+.2f} ± {half:.2f} over {n} seeds: {said} beyond the spread between seeds."


def write_table(out: Path, cells: Cells) -> None:
    """Writes table.md (table and verdict), table.json (every cell) and plot.png."""
    said = "".join(f"- {sentence}\n" for sentence in verdict(cells))
    (out / "table.md").write_text(
        markdown_table(table(cells)) + "\n\nMean and standard deviation between seeds.\n\n" + said
    )
    write_json(out / "table.json", {" ".join(map(str, cell)): results for cell, results in cells.items()})
    plot(cells).savefig(out / "plot.png", dpi=120)


def plot(cells: Cells) -> Figure:
    """A panel for each column: a dot for each seed, a line for their mean."""
    shown, grouped = columns(cells), groups(cells)
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(5.2 * across, (1.3 + 0.3 * len(grouped)) * down), layout="constrained")
    for number, column in enumerate(shown, 1):
        axes = figure.add_subplot(down, across, number, title=column.name)
        for place, seeds in enumerate(grouped.values()):
            values = [column.value(results) for results in seeds.values()]
            axes.plot(values, [place] * len(values), "o", color="#4f46c8", alpha=0.6, markeredgewidth=0)
            axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="#1d1c1a", linewidth=2)
        axes.set_yticks(
            range(len(grouped)),
            [f"{masking}, {batching}" for masking, batching in grouped] if (number - 1) % across == 0 else [],
        )
        axes.set_ylim(len(grouped) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    run_command(main)
