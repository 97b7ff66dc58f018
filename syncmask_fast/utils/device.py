"""The device and what a process may use of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

from syncmask_fast.utils.errors import UserError

if TYPE_CHECKING:
    import torch

BFLOAT16_WIDTH = 128  # on the CPU, narrower models lose more in conversions than they gain in products (docs/step.md)


def choose_device(name: str) -> torch.device:
    """Return the device of a --device flag; "auto" is CUDA if there is one. errors: UserError."""
    import torch  # here, because packing needs `cpu_cores` and starts workers without torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown. Give auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--device {name} needs a CUDA device that PyTorch can use, but there is none. Give --device cpu."
        )
    return device


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast_dtype(precision: str, device: torch.device, width: int) -> torch.dtype:
    """Return the dtype of matrix products: bfloat16 or float32.

    precision: "float32", "bfloat16", or "auto": bfloat16 on CUDA, and on CPUs with AMX or AVX512_BF16 for models of at
               least `BFLOAT16_WIDTH`.
    """
    import torch

    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast and width >= BFLOAT16_WIDTH else torch.float32


def tune_malloc() -> None:
    """Let glibc keep freed memory instead of returning it: on the CPU, fresh pages cost more than many operators."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 256 * 2**20)
