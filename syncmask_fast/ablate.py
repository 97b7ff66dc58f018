"""The paper's two ablations, masking and batching, over seeds: `python -m syncmask_fast.ablate`.

A cell is one pretraining with its fine-tunings, each in a run folder. Finished runs are reused and interrupted ones
resumed. Table, plot and conclusions are rewritten after every cell.
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
    """Pretrain and fine-tune every combination of masking, batching and seed. Flags after `--` go to `train`."""

    out: Path = Path("runs/ablation")
    """Folder of all cells, table.md, table.json and plot.png."""
    data: str | None = None
    """Folder or address of shards. Unset: draw the lookbook."""
    preset: Literal["tiny", "base"] = "tiny"
    """Preset of every pretraining."""
    steps: int | None = None
    """Steps of every pretraining. Unset: the preset's."""
    masking: tuple[str, ...] = ("random", "sync")
    """`random`, `none`, `sync`, or score rules as `sync:TOKEN/PATCH`. Others are compared with the first."""
    every_rule: bool = False
    """Also run the other token and patch score rules, each with the preset's other rule, in the last --batching."""
    batching: tuple[Batching, ...] = ("random", "hard", "semi_hard")
    """Batchings to run. The last is compared with the others."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run per seed. One seed supports no conclusion."""
    tasks: tuple[Literal["composed", "category", "subcategory"], ...] = ("composed", "subcategory")
    """Fine-tunings of every cell. Retrieval and mask quality are measured without one."""
    tuning_steps: int | None = None
    """Steps of every fine-tuning. Unset: the recipe's."""
    inputs: Inputs = "image"
    """What recognition sees, `image` or `image+text`. Texts of the lookbook name the label."""

    def maskings(self, batching: str) -> list[str]:
        """Return the maskings to run with a batching."""
        names = list(self.masking)
        if self.every_rule and batching == self.batching[-1]:
            mask = PRESETS[self.preset][1].mask
            names += [f"sync:{rule}/{mask.patch_score}" for rule in TOKEN_SCORES if rule != mask.token_score]
            names += [f"sync:{mask.token_score}/{rule}" for rule in PATCH_SCORES if rule != mask.patch_score]
        return list(dict.fromkeys(names))

    def check(self) -> None:
        """Raise `UserError` for the first setting that cannot work."""
        if not (self.masking and self.batching and self.seeds):
            raise UserError("--masking, --batching or --seeds is empty. Give at least one value each.")
        rules = {f"sync:{token}/{patch}" for token in TOKEN_SCORES for patch in PATCH_SCORES}
        for name in self.masking:
            if name not in {"random", "none", "sync", *rules}:
                known = f"TOKEN of {', '.join(TOKEN_SCORES)} and PATCH of {', '.join(PATCH_SCORES)}"
                raise UserError(
                    f"--masking {name} is unknown. Give random, none, sync or sync:TOKEN/PATCH with {known}."
                )


@dataclass(frozen=True)
class Column:
    """A column of the table: how a cell's metrics give its value, None where they do not."""

    name: str
    value: Callable[[Results], float | None]


def _metric(name: str, key: str) -> Column:
    return Column(name, lambda results: results.get(key))


def _lift(name: str, key: str) -> Column:
    """Return a column of the precision divided by that of shuffled masks."""

    def lift(results: Results) -> float | None:
        shuffled = results.get(f"{key}/shuffled")
        return results[f"{key}/precision"] / shuffled if shuffled else None

    return Column(name, lift)


def _image_gain(results: Results) -> float | None:
    """Return the nats that the right image saves MLM at visible masked tokens, against a mismatched one."""
    right, mismatched = (results.get(f"mlm/visible-tokens/{name}") for name in ("nll", "nll-mismatched-image"))
    return None if right is None or mismatched is None else mismatched - right


COLUMNS = (
    _metric("retrieval R@1, 101 candidates", "retrieval/mean/101-candidate/R@1"),
    _metric("retrieval R@10, 101 candidates", "retrieval/mean/101-candidate/R@10"),
    _metric("text to image R@10, full gallery", "retrieval/t2i/full/R@10"),
    _metric("composed R@10, val-union", "composed/val-union/mean/R@10"),
    _metric("category accuracy, image+text", "category/image+text/accuracy"),
    _metric("category accuracy, image", "category/image/accuracy"),
    _metric("subcategory accuracy, image+text", "subcategory/image+text/accuracy"),
    _metric("subcategory accuracy, image", "subcategory/image/accuracy"),
    Column("MLM nats saved by the image at visible tokens", _image_gain),
    _metric("words AUC", "sync/words/auc"),
    _lift("visible words, times shuffled", "sync/words"),
    _lift("patches on target, times shuffled", "sync/patches"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    ablation, train_args = tyro.cli(Ablation, args=argv[:at], prog="python -m syncmask_fast.ablate"), argv[at + 1 :]
    ablation.check()
    check_settings(ablation, train_args)
    plan = [
        (masking, batching, seed)
        for seed in ablation.seeds
        for batching in ablation.batching
        for masking in ablation.maskings(batching)
    ]
    cells: Cells = {}
    for number, cell in enumerate(plan, 1):
        print(f"\ncell {number} of {len(plan)}: masking {cell[0]}, batching {cell[1]}, seed {cell[2]}", flush=True)
        cells[cell] = run_cell(ablation, cell, train_args)
        write_table(ablation.out, cells)
    print(markdown_table(table(cells)))
    print("\n" + "\n".join(conclusions(cells)) + f"\n\n{ablation.out / 'table.md'}\n{ablation.out / 'plot.png'}")


def check_settings(ablation: Ablation, train_args: list[str]) -> None:
    """Write settings.json, which all cells share. errors: UserError if earlier cells had other settings."""
    settings = {
        "preset": ablation.preset,
        "data": str(ablation.data),
        "steps": ablation.steps,
        "tuning_steps": ablation.tuning_steps,
        "train_args": train_args,
    }
    path = ablation.out / "settings.json"
    recorded = json.loads(path.read_text()) if path.is_file() else settings
    changed = [name for name in settings if settings[name] != recorded.get(name)]
    if changed:
        raise UserError(
            f"{ablation.out} has cells with other settings ({', '.join(changed)}). Use the same ones, or another --out."
        )
    ablation.out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def run_cell(ablation: Ablation, cell: tuple[str, str, int], train_args: list[str]) -> Results:
    """Return the metrics of a cell, after its missing runs."""
    masking, batching, seed = cell
    folder = ablation.out / f"{masking.replace(':', '-').replace('/', '-')}_{batching}_seed{seed}"
    kind, _, rules = masking.partition(":")
    common = ["--seed", str(seed), *(["--data", str(ablation.data)] if ablation.data else [])]
    # 1. The pretraining.
    flags = [ablation.preset, *common, "--masking", kind, "--batching", batching, "--out", str(folder / "pretraining")]
    if rules:
        token_score, _, patch_score = rules.partition("/")
        flags += ["--mask.token-score", token_score, "--mask.patch-score", patch_score]
    if ablation.steps:
        flags += ["--steps", str(ablation.steps)]
    results = _run_once(folder / "pretraining", train.main, [*flags, *train_args])
    # 2. Its fine-tunings.
    for task in ablation.tasks:
        recognition = task in ("category", "subcategory")
        out = folder / (f"{task}-{ablation.inputs}" if recognition else task)
        flags = [task, *common, "--model", str(folder / "pretraining" / "model"), "--out", str(out)]
        flags += ["--inputs", ablation.inputs] if recognition else []
        flags += ["--steps", str(ablation.tuning_steps)] if ablation.tuning_steps else []
        results |= _run_once(out, finetune.main, flags)
    return results


def _run_once(out: Path, run: Callable[[list[str]], None], flags: list[str]) -> Results:
    """Return the results of a run. Run it first if it has none, and delete its checkpoints, which nothing needs."""
    if not (out / "results.json").is_file():
        run(flags)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return json.loads((out / "results.json").read_text())


# Table, conclusions, plot ------------------------------------------------------------------------------------------


def by_cell(cells: Cells) -> dict[tuple[str, str], dict[int, Results]]:
    """Return (masking, batching) -> seed -> metrics."""
    seeds: dict[tuple[str, str], dict[int, Results]] = {}
    for (masking, batching, seed), results in cells.items():
        seeds.setdefault((masking, batching), {})[seed] = results
    return seeds


def columns(cells: Cells) -> list[Column]:
    """Return the columns for which every cell has a value."""
    return [column for column in COLUMNS if all(column.value(results) is not None for results in cells.values())]


def table(cells: Cells) -> list[dict[str, str]]:
    """Return a row per masking and batching: mean and standard deviation (n - 1) over seeds."""
    rows = []
    for (masking, batching), seeds in by_cell(cells).items():
        row = {"masking": masking, "batching": batching, "seeds": str(len(seeds))}
        for column in columns(cells):
            values = [column.value(results) for results in seeds.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            row[column.name] = f"{statistics.mean(values):.2f}{spread}"
        rows.append(row)
    return rows


def conclusions(cells: Cells) -> list[str]:
    """Return a sentence per comparison and column: the first masking, and the last batching, against each other one."""
    maskings = list(dict.fromkeys(masking for masking, _, _ in cells))
    batchings = list(dict.fromkeys(batching for _, batching, _ in cells))
    pairs = [(0, name, maskings[0]) for name in maskings[1:]] + [(1, batchings[-1], name) for name in batchings[:-1]]
    return [_conclusion(cells, column, *pair) for pair in pairs for column in columns(cells)]


def _conclusion(cells: Cells, column: Column, axis: int, name: str, baseline: str) -> str:
    """Say whether `name` differs from `baseline` in a column by more than the spread between seeds.

    axis: 0 compares maskings, 1 batchings. Differences are taken between cells that are otherwise equal and averaged
    within a seed. "Beyond the spread" means that the 95 % confidence interval of the mean (Student's t) excludes 0.
    """
    differences: dict[int, list[float]] = {}
    for cell, results in cells.items():
        other = cells.get((*cell[:axis], baseline, *cell[axis + 1 :]))
        if cell[axis] == name and other is not None:
            differences.setdefault(cell[2], []).append(column.value(results) - column.value(other))
    title = f"{('Masking', 'Batching')[axis]} {name} against {baseline}, {column.name}:"
    if not differences:
        return f"{title} no two cells differ in this only."
    by_seed = [statistics.mean(values) for values in differences.values()]
    mean, n = statistics.mean(by_seed), len(by_seed)
    if n == 1:
        return f"{title} {mean:+.2f} with one seed, which supports no conclusion."
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(by_seed) / n**0.5
    verdict = "no difference" if abs(mean) <= half else "more" if mean > 0 else "less"
    return f"{title} {mean:+.2f} ± {half:.2f} over {n} seeds: {verdict} beyond the spread between seeds."


def write_table(out: Path, cells: Cells) -> None:
    """Write table.md (table and conclusions), table.json (every cell) and plot.png."""
    sentences = "".join(f"- {sentence}\n" for sentence in conclusions(cells))
    text = f"{markdown_table(table(cells))}\n\nMean and standard deviation between seeds.\n\n{sentences}"
    (out / "table.md").write_text(text)
    write_json(out / "table.json", {" ".join(map(str, cell)): results for cell, results in cells.items()})
    plot(cells).savefig(out / "plot.png", dpi=120)


def plot(cells: Cells) -> Figure:
    """Return a panel per column: a dot per seed, a line at their mean."""
    shown, grouped = columns(cells), by_cell(cells)
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(5.2 * across, (1.3 + 0.3 * len(grouped)) * down), layout="constrained")
    for number, column in enumerate(shown):
        axes = figure.add_subplot(down, across, number + 1, title=column.name)
        for place, seeds in enumerate(grouped.values()):
            values = [column.value(results) for results in seeds.values()]
            axes.plot(values, [place] * len(values), "o", color="#4f46c8", alpha=0.6, markeredgewidth=0)
            axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="#1d1c1a", linewidth=2)
        names = [f"{masking}, {batching}" for masking, batching in grouped]
        axes.set_yticks(range(len(grouped)), names if number % across == 0 else [])
        axes.set_ylim(len(grouped) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    run_command(main)
