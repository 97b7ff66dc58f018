"""The log of a run: one JSON object a step in metrics.jsonl, a progress line now and then, TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import resource
import time
from pathlib import Path

import torch

from syncmask_fast.errors import UserError
from syncmask_fast.step import Losses

LOSSES = ("loss_itc", "loss_itm", "loss_mlm", "loss_mim", "loss_presence")


class MetricsLog:
    """Collects steps on the device and writes them in groups, so that logging does not make the device wait."""

    def __init__(self, out: Path, start_step: int, steps: int, every: int, device: torch.device, peak_flops: float) -> None:
        self.steps, self.every, self.device, self.peak_flops = steps, every, device, peak_flops
        self.path = out / "metrics.jsonl"
        kept = _rows_up_to(self.path, start_step)
        self.file = open(self.path, "w", encoding="utf-8")
        self.file.writelines(kept)
        self.rows: list[dict] = []
        self.losses: list[torch.Tensor] = []
        self.clock, self.waited = time.perf_counter(), 0.0
        self.lift: str = ""
        self.planning: float | None = None
        self.board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)

    def add(self, step: int, epoch: int, pairs: int, flops: float | None, wait_seconds: float, lr: float, losses: Losses) -> None:
        """Adds one step. flops: of the model (`flops.step_flops`), None where they are not counted; wait_seconds: the loader's running total."""
        now = time.perf_counter()
        seconds = max(now - self.clock, 1e-9)
        wait = min(1.0, max(0.0, (wait_seconds - self.waited) / seconds))
        self.clock, self.waited = now, wait_seconds
        speed = {"pairs_per_s": round(pairs / seconds, 2), "data_wait_share": round(wait, 4)}
        if flops is not None:
            speed["mfu"] = round(flops / seconds / self.peak_flops, 5)
        self.rows.append({"step": step, "epoch": epoch, **speed, "peak_gib": round(peak_bytes(self.device) / 2**30, 3), "lr": lr})
        if self.planning is not None:
            self.rows[-1]["plan_s"], self.planning = round(self.planning, 3), None
        self.losses.append(torch.stack(list(losses)))

    def planned(self, epoch: int, seconds: float) -> None:
        """Prints what the plan of an epoch took, and keeps it for the row of the next step, whose own time it is not."""
        print(f"epoch {epoch} planned in {seconds:.1f} s", flush=True)
        self.planning = seconds
        self.clock += seconds

    def note(self, values: dict[str, float]) -> None:
        """Adds further values, such as the sync scores, to the last step's row; the time that they took is not the next step's."""
        self.rows[-1].update({name: round(value, 3) for name, value in values.items() if not math.isnan(value)})
        if "sync/patches/precision" in values:
            lift = values["sync/patches/precision"] / max(values["sync/patches/random"], 1e-9)
            self.lift = f"  sync: patches {lift:.2f}x random, words AUC {values['sync/words/auc']:.0f}"
        self.clock = time.perf_counter()

    def show_when_due(self) -> None:
        """Prints and writes what has come together, every `every` steps."""
        if self.rows and (self.rows[-1]["step"] % self.every == 0 or self.rows[-1]["step"] == self.steps):
            shown = self.flush()
            last = shown[-1]
            mean = {name: sum(row[name] for row in shown) / len(shown) for name in last if all(name in row for row in shown)}
            parts = " ".join(f"{name.removeprefix('loss_')} {mean[name]:.3f}" for name in LOSSES if name in mean)
            losses = f" ({parts})" if parts else ""  # a fine-tuning may have one loss alone
            mfu = f"  MFU {100 * mean['mfu']:2.0f} %" if "mfu" in mean else ""
            print(
                f"step {last['step']:>5}/{self.steps} epoch {last['epoch']}  {mean['pairs_per_s']:6.0f} pairs/s"
                f"{mfu}  {last['peak_gib']:.1f} GiB  data {100 * mean['data_wait_share']:2.0f} %  loss {mean['loss']:.3f}{losses}{self.lift}",
                flush=True,
            )

    def flush(self) -> list[dict]:
        """Writes all steps that are not yet written; returns their rows."""
        if not self.rows:
            return []
        values = torch.stack(self.losses).float().cpu().tolist()
        for row, (total, *parts) in zip(self.rows, values, strict=True):
            row |= {"loss": total} | {name: value for name, value in zip(LOSSES, parts, strict=True) if not math.isnan(value)}
            self.file.write(json.dumps(row) + "\n")
            if self.board is not None:
                for name, value in row.items():
                    if name != "step":
                        self.board.add_scalar(name, value, row["step"])
        self.file.flush()
        shown, self.rows, self.losses = self.rows, [], []
        return shown

    def close(self) -> None:
        self.flush()
        self.file.close()
        if self.board is not None:
            self.board.close()


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the device's allocator on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _rows_up_to(path: Path, step: int) -> list[str]:
    """The lines of an earlier part of the run that come before the checkpoint."""
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not a step of a run ({error}): remove the line.") from error
    return lines
