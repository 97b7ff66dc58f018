"""Which device a command runs on, and how many CPU cores it may use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from syncmask_fast.utils.errors import UserError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> torch.device:
    """Return the device of a --device flag; "auto" is CUDA if there is a CUDA device, else the CPU.

    errors: UserError for an unknown name, and for CUDA without a CUDA device.
    """
    import torch  # here, because packing needs `cpu_cores` and starts workers without torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown. Give auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} needs a CUDA device, and PyTorch finds none. Give auto or cpu.")
    return device


def cpu_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
