"""The log of a run: one JSON object a step in metrics.jsonl, progress lines, and TensorBoard if it is installed."""

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
from torch import Tensor

from syncmask_fast.config import TrainConfig
from syncmask_fast.utils.errors import UserError, warn


class MetricsLog:
    """Collect steps on the device and write them in groups, so that logging causes no host sync.

    start_step, steps: the step that the run resumes from, and its last one.
    peak_flops:        of the device, for the MFU.
    """

    def __init__(
        self, config: TrainConfig, start_step: int, steps: int, device: torch.device, peak_flops: float
    ) -> None:
        self.steps, self.every, self.device, self.peak_flops = steps, config.log_every, device, peak_flops
        self.path = config.out / "metrics.jsonl"
        offset, self._skipped_in_a_row = _resume_offset(self.path, start_step)
        # Unbuffered: what a write could not store on a full disk stays in `_unwritten`.
        self.file = open(self.path, "r+b" if self.path.exists() else "xb", buffering=0)
        # Steps after the checkpoint are repeated, so their rows go.
        self.file.truncate(offset)
        self.file.seek(offset)
        self._unwritten = b""
        self._rows: list[dict] = []
        self._losses: list[dict[str, Tensor]] = []
        self._clock, self._wait_seconds = time.perf_counter(), 0.0
        self._plan_seconds: float | None = None
        self.mask_summary = ""
        self.tensorboard = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(config.out / "tensorboard"), purge_step=start_step + 1)

    @property
    def consecutive_skips(self) -> int:
        """Steps up to the last one that were skipped in a row; 0 while some losses are not read yet."""
        return 0 if self._rows else self._skipped_in_a_row

    def log_step(self, row: dict[str, float], losses: dict[str, Tensor], pairs: int, flops: float | None) -> None:
        """Add one step.

        row:    "step", "epoch", "lr" and "wait_seconds", the running total of the loader.
        losses: float32 scalars on the device; "total" is written as `loss`, any other as `loss_NAME`.
        flops:  model FLOPs of the step; None if they are not counted.
        """
        now = time.perf_counter()
        seconds = max(now - self._clock, 1e-9)
        # Both are running totals, so a step's share is the difference.
        waited = row["wait_seconds"] - self._wait_seconds
        self._clock, self._wait_seconds = now, row["wait_seconds"]
        entry = {
            "step": row["step"],
            "epoch": row["epoch"],
            "pairs_per_s": round(pairs / seconds, 2),
            "data_wait_share": round(min(1.0, max(0.0, waited / seconds)), 4),
            "peak_gib": round(peak_bytes(self.device) / 2**30, 3),
            "lr": row["lr"],
        }
        if flops is not None:
            entry["mfu"] = round(flops / seconds / self.peak_flops, 5)
        if self._plan_seconds is not None:
            entry["plan_s"], self._plan_seconds = round(self._plan_seconds, 3), None
        self._rows.append(entry)
        self._losses.append(losses)

    def log_plan_time(self, epoch: int, seconds: float) -> None:
        """Print how long an epoch's order took; the next step's row has it, and its own time does not include it."""
        print(f"epoch {epoch} planned in {seconds:.1f} s", flush=True)
        # Move the clock instead of reading it: the step under way has already begun.
        self._plan_seconds = seconds
        self._clock += seconds

    def log_metrics(self, values: dict[str, float]) -> None:
        """Add further values, such as mask quality, to the last step's row.

        The next step's time does not include them.
        """
        self._rows[-1].update({name: round(value, 3) for name, value in values.items() if not math.isnan(value)})
        if "sync/patches/precision" in values:
            lift = values["sync/patches/precision"] / max(values["sync/patches/random"], 1e-9)
            self.mask_summary = f"  sync: patches {lift:.2f}x random, words AUC {values['sync/words/auc']:.0f}"
        self._clock = time.perf_counter()

    def print_if_due(self) -> None:
        """Write what has been collected and print a progress line, every `--log-every` steps and at the last one."""
        if not self._rows or (self._rows[-1]["step"] % self.every and self._rows[-1]["step"] != self.steps):
            return
        rows = self.flush()
        last, mean = rows[-1], _column_means(rows)
        parts = [f"{name.removeprefix('loss_')} {value:.3f}" for name, value in mean.items() if name[:5] == "loss_"]
        mfu = f"  MFU {100 * mean['mfu']:2.0f} %" if "mfu" in mean else ""
        # "loss" is missing where every step was skipped.
        losses = f"{mean.get('loss', math.nan):.3f}" + (f" ({' '.join(parts)})" if parts else "")
        print(
            f"step {last['step']:>5}/{self.steps} epoch {last['epoch']}  {mean['pairs_per_s']:6.0f} pairs/s{mfu}  "
            f"{last['peak_gib']:.1f} GiB  data {100 * mean['data_wait_share']:2.0f} %  "
            f"loss {losses}{self.mask_summary}",
            flush=True,
        )

    def flush(self) -> list[dict]:
        """Read the collected losses, write all rows that are not yet written, and return them.

        A step whose total is not finite was skipped: its row has "skipped", and values that are not finite are left
        out.
        """
        if not self._rows:
            return []
        # One copy to the host for all steps, which may have different losses.
        values = iter(torch.stack([x for losses in self._losses for x in losses.values()]).float().tolist())
        for row, losses in zip(self._rows, self._losses, strict=True):
            for name in losses:
                value = next(values)
                if math.isfinite(value):
                    row["loss" if name == "total" else f"loss_{name}"] = value
            self._skipped_in_a_row = 0 if "loss" in row else self._skipped_in_a_row + 1
            if "loss" not in row:
                row["skipped"] = 1
            # One line, one step: a reader can follow the file while it grows.
            self._unwritten += json.dumps(row).encode() + b"\n"
        self._write()
        rows, self._rows, self._losses = self._rows, [], []
        skipped = ", ".join(str(row["step"]) for row in rows if "skipped" in row)
        if skipped:
            warn(
                f"The loss or a gradient was not finite in step {skipped}, which changed nothing "
                f"({self._skipped_in_a_row} in a row now)."
            )
        if self.tensorboard is not None:
            self._write_tensorboard(rows)
        return rows

    def fsync(self) -> None:
        """Wait until every step is on the disk, so no checkpoint is newer than metrics.jsonl. errors: OSError."""
        self.flush()
        self._write()
        if self._unwritten:
            raise OSError(errno.ENOSPC, "metrics.jsonl cannot be written")
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write what is left and close the files."""
        self.flush()
        self._write()
        if self._unwritten:
            warn(f"{self.path} lacks its last rows: {self._unwritten.decode()}")
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write(self) -> None:
        """Write waiting rows. On a full disk the rest waits in memory, even from the middle of a line."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self.file.write(self._unwritten) :]
        except OSError as error:
            rows = self._unwritten.count(b"\n")
            warn(f"{self.path} cannot be written ({error.strerror}); {rows} rows wait in memory.")

    def _write_tensorboard(self, rows: list[dict]) -> None:
        try:
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        self.tensorboard.add_scalar(name, value, row["step"])
        except OSError as error:
            warn(f"TensorBoard's log cannot be written ({error.strerror}) and ends here; metrics.jsonl continues.")
            self.tensorboard = None


class NullLog:
    """The log of ranks that write nothing: `MetricsLog`'s methods without effect."""

    consecutive_skips = 0

    def log_step(self, row: dict[str, float], losses: dict[str, Tensor], pairs: int, flops: float | None) -> None:
        """Do nothing."""

    def log_plan_time(self, epoch: int, seconds: float) -> None:
        """Do nothing."""

    def log_metrics(self, values: dict[str, float]) -> None:
        """Do nothing."""

    def print_if_due(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _column_means(rows: list[dict]) -> dict[str, float]:
    """Return the mean of every column over the rows that have it."""
    # Rows differ: a skipped step has no loss, a loss can start later, and mask quality comes now and then.
    names = {name: None for row in rows for name in row}
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the device's allocator on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resume_offset(path: Path, step: int) -> tuple[int, int]:
    """Return the bytes of rows up to `step`, and how many steps at their end were skipped in a row.

    What follows is cut off: rows of later steps, half a row, or what a power loss has left.
    errors: UserError for a broken row before that.
    """
    if not path.is_file():
        return 0, 0
    offset = last = skipped = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            at = row["step"]
            if type(at) is not int or at <= last:
                raise ValueError(f"step {at!r} after step {last}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # Behind the checkpoint, or half a line: cut off. Before it, the user must decide.
            if last >= step or not line.endswith(b"\n"):
                break
            raise UserError(f"{path}: line {number} is not a step of a run ({error}). Remove the line.") from error
        if at > step or not line.endswith(b"\n"):
            break
        offset, last, skipped = offset + len(line), at, skipped + 1 if "skipped" in row else 0
    if last < step and last:
        warn(f"{path} ends at step {last}, but the checkpoint is of step {step}. The rows between are lost.")
    return offset, skipped
