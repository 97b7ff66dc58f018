"""The log of a run: one JSON object a step in metrics.jsonl, a progress line now and then, TensorBoard where it is installed."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import resource
import time
from pathlib import Path

import torch

from syncmask_fast.objective.pretraining import Losses
from syncmask_fast.utils.errors import UserError, warn

LOSSES = ("loss_itc", "loss_itm", "loss_mlm", "loss_mim", "loss_presence")


class MetricsLog:
    """Collects steps on the device and writes them in groups, so that logging does not make the device wait."""

    def __init__(
        self, out: Path, start_step: int, steps: int, every: int, device: torch.device, peak_flops: float
    ) -> None:
        self.steps, self.every, self.device, self.peak_flops = steps, every, device, peak_flops
        self.path = out / "metrics.jsonl"
        whole, self.skipped_in_a_row = _part_up_to(self.path, start_step)
        self.file = open(self.path, "r+b" if self.path.exists() else "xb", buffering=0)
        self.file.truncate(whole)  # what an earlier part of the run did after its checkpoint is done again
        self.file.seek(whole)
        self.unwritten = b""
        self.rows: list[dict] = []
        self.losses: list[torch.Tensor] = []
        self.clock, self.waited = time.perf_counter(), 0.0
        self.lift: str = ""
        self.planning: float | None = None
        self.board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)

    @property
    def skipped_now(self) -> int:
        """Steps up to the last that were skipped one after the other; 0 while there are steps whose losses were not read yet."""
        return 0 if self.rows else self.skipped_in_a_row

    def add(
        self, step: int, epoch: int, pairs: int, flops: float | None, wait_seconds: float, lr: float, losses: Losses
    ) -> None:
        """Adds one step. flops: of the model (`flops.step_flops`), None where they are not counted; wait_seconds: the loader's running total."""
        now = time.perf_counter()
        seconds = max(now - self.clock, 1e-9)
        wait = min(1.0, max(0.0, (wait_seconds - self.waited) / seconds))
        self.clock, self.waited = now, wait_seconds
        speed = {"pairs_per_s": round(pairs / seconds, 2), "data_wait_share": round(wait, 4)}
        if flops is not None:
            speed["mfu"] = round(flops / seconds / self.peak_flops, 5)
        self.rows.append(
            {"step": step, "epoch": epoch, **speed, "peak_gib": round(peak_bytes(self.device) / 2**30, 3), "lr": lr}
        )
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
            known = {
                name: [row[name] for row in shown if name in row]
                for name in ("pairs_per_s", "data_wait_share", "mfu", "loss", *LOSSES)
            }
            mean = {name: sum(values) / len(values) for name, values in known.items() if values}
            parts = " ".join(f"{name.removeprefix('loss_')} {mean[name]:.3f}" for name in LOSSES if name in mean)
            losses = f" ({parts})" if parts else ""  # a fine-tuning may have one loss alone
            mfu = f"  MFU {100 * mean['mfu']:2.0f} %" if "mfu" in mean else ""
            loss = mean.get("loss", math.nan)  # where every step was skipped
            print(
                f"step {last['step']:>5}/{self.steps} epoch {last['epoch']}  {mean['pairs_per_s']:6.0f} pairs/s"
                f"{mfu}  {last['peak_gib']:.1f} GiB  data {100 * mean['data_wait_share']:2.0f} %  loss {loss:.3f}{losses}{self.lift}",
                flush=True,
            )

    def flush(self) -> list[dict]:
        """Writes all steps that are not yet written; returns their rows.

        A step without a finite total was skipped: its row says so, and what is not a number is left out. On a full disk the rows wait in memory.
        """
        if not self.rows:
            return []
        values = torch.stack(self.losses).float().cpu().tolist()
        for row, losses in zip(self.rows, values, strict=True):
            row |= {name: value for name, value in zip(("loss", *LOSSES), losses, strict=True) if math.isfinite(value)}
            self.skipped_in_a_row = 0 if "loss" in row else self.skipped_in_a_row + 1
            if "loss" not in row:
                row["skipped"] = 1
            self.unwritten += json.dumps(row).encode() + b"\n"
        self._write()
        shown, self.rows, self.losses = self.rows, [], []
        skipped = [str(row["step"]) for row in shown if "skipped" in row]
        if skipped:
            warn(
                f"the loss or a gradient was not finite and changed nothing in step {', '.join(skipped)} ({self.skipped_in_a_row} in a row now)."
            )
        if self.board is not None:
            self._write_board(shown)
        return shown

    def sync(self) -> None:
        """Waits until the disk has kept every step so far, so that a checkpoint never knows of a step that metrics.jsonl has not. errors: OSError."""
        self.flush()
        self._write()
        if self.unwritten:
            raise OSError(errno.ENOSPC, "metrics.jsonl cannot be written")
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.flush()
        self._write()
        if self.unwritten:
            warn(f"{self.path} lacks its last rows: {self.unwritten.decode()}")
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _write(self) -> None:
        """Writes what waits; a full disk takes as much as it can, and the rest goes on there later, even within a line."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            warn(f"{self.path} cannot be written ({error.strerror}): {self.unwritten.count(10)} rows wait in memory.")

    def _write_board(self, rows: list[dict]) -> None:
        try:
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        self.board.add_scalar(name, value, row["step"])
        except OSError as error:
            warn(f"TensorBoard's log cannot be written ({error.strerror}): it ends here, metrics.jsonl does not.")
            self.board = None


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the device's allocator on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _part_up_to(path: Path, step: int) -> tuple[int, int]:
    """How many bytes of an earlier part of the run belong to steps up to `step`, and how many of these steps were skipped at the end of it.

    What comes behind is cut off, be it whole rows, half a row or what a machine that lost power has left.
    errors: UserError for a row before that which cannot be read.
    """
    if not path.is_file():
        return 0, 0
    end = last = skipped = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            at = row["step"]
            if type(at) is not int or at <= last:
                raise ValueError(f"step {at!r} after step {last}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if last >= step or not line.endswith(b"\n"):
                break
            raise UserError(f"{path}: line {number} is not a step of a run ({error}): remove the line.") from error
        if at > step or not line.endswith(b"\n"):
            break
        end, last, skipped = end + len(line), at, skipped + 1 if "skipped" in row else 0
    if last < step and last:
        warn(f"{path} ends at step {last}, but the checkpoint is of step {step}: the rows between are lost.")
    return end, skipped
