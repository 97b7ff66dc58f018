"""One schema, three operators: syncmask::NAME (the fastest kernel here), NAME_reference and NAME_triton.

`syncmask::NAME` dispatches by device. Its CPU kernel is in csrc/NAME.cpp, its CUDA kernel in Triton or in csrc/NAME.cu.
Where a kernel is missing it runs the reference, and warns once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_fast import _native
from syncmask_fast.kernels import checks

BACKENDS = ("auto", "reference", "triton", "cpp")
NO_TRITON = "Triton is missing; to have it, `pip install triton`"
NO_CUDA = f"{_native.CUDA_LIBRARY} is not built; to have it, install nvcc and run `make install`"


@dataclass(frozen=True)
class Ops:
    """The operators of one schema."""

    name: str
    auto: torch._ops.OpOverload
    reference: torch._ops.OpOverload
    triton: torch._ops.OpOverload | None
    has_cuda_source: bool  # csrc/NAME.cu exists
    fallback: Callable  # what `auto` runs where a kernel is missing

    def pick(self, backend: str, device: torch.device) -> torch._ops.OpOverload:
        """Return the operator for a `backend` argument; ValueError where that backend is unknown or missing here."""
        if backend == "auto":
            return self.auto
        checks.check_choice("backend", backend, BACKENDS)
        if backend == "reference":
            return self.reference
        if backend == "cpp" and not _native.is_loaded():
            raise ValueError(f"backend is 'cpp', but {_native.describe()}; expected 'auto' or 'reference'")
        available = ["auto", "reference"]
        if _native.is_loaded() if device.type == "cpu" else self.has_cuda_source and _native.is_cuda_loaded():
            available.append("cpp")
        if self.triton is not None and has_triton(device):
            available.append("triton")
        if backend not in available:
            expected = " or ".join(map(repr, available))
            raise ValueError(
                f"backend is {backend!r}, which {self.name} does not have on {device}; expected {expected}"
            )
        return self.triton if backend == "triton" else self.auto


def define(
    name: str,
    schema: str,
    *,
    fake: Callable,
    reference: Callable,
    triton: str | None = None,
    triton_takes: Callable[..., bool] = lambda *args: True,
    cuda: Callable | None = None,
) -> Ops:
    """Register syncmask::NAME, NAME_reference and (with `triton`) NAME_triton; return them.

    schema:       arguments and results, as torch.library.define takes them.
    fake:         shapes and dtypes of the results, for torch.compile.
    reference:    the definition in plain PyTorch; called with the schema's arguments by name.
    triton:       "module:function" of the launcher; imported at the first call, because it needs triton.
    triton_takes: whether the Triton kernels support these arguments; elsewhere the reference runs, without a warning.
    cuda:         the operator on CUDA where csrc/NAME.cu is built.
    """

    def run_reference(*args):
        return reference(**dict(zip(names, args, strict=False)))  # trailing defaults may be left out

    def run_slow(*args):
        device = args[0].device
        reasons = {"cpu": _native.describe, "cuda": lambda: NO_TRITON if triton else NO_CUDA}
        _warn_slow(name, reasons.get(device.type, lambda: f"it has no kernel for {device.type}")())
        return run_reference(*args)

    def run_triton(*args):
        module, function = triton.split(":")
        return getattr(importlib.import_module(f"syncmask_fast.kernels.{module}"), function)(*args)

    def run_cuda(*args):
        if cuda is not None and _native.is_cuda_loaded():
            return cuda(*args)
        if triton is not None and not triton_takes(*args):
            return run_reference(*args)
        if triton is not None and has_triton(args[0].device):
            return run_triton(*args)
        return run_slow(*args)

    bodies = {"": run_slow, "_reference": run_reference} | ({"_triton": run_triton} if triton else {})
    for suffix, body in bodies.items():
        qualified = f"syncmask::{name}{suffix}"
        torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
        # The weakest key: csrc/NAME.cpp, which registers for the CPU, takes over there.
        torch.library.impl(qualified, "CompositeExplicitAutograd", body)
        torch.library.register_fake(qualified, fake)
    torch.library.impl(f"syncmask::{name}", "CUDA", run_cuda)
    auto, by_reference, by_triton = (
        getattr(torch.ops.syncmask, name + suffix).default if suffix in bodies else None
        for suffix in ("", "_reference", "_triton")
    )
    names = [argument.name for argument in auto._schema.arguments]
    _native.load()
    if cuda is not None:
        _native.load_cuda()
    return Ops(name, auto, by_reference, by_triton, cuda is not None, run_slow)


class LaunchConfig(NamedTuple):
    """Constants and launch options of one Triton kernel."""

    kernel: str
    constants: dict[str, int | bool]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """What a launch takes by keyword."""
        return self.constants | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def reference_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype in which a reference computes: float64 for float64 inputs (an oracle), else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def autocast_off(value: Tensor) -> contextlib.AbstractContextManager:
    """Turn autocast off: float32 products inside an operator stay float32 in a caller's autocast region."""
    return torch.autocast(value.device.type, enabled=False)


@torch.compiler.assume_constant_result
def has_triton(device: torch.device) -> bool:
    """Return whether Triton kernels run on `device`: on CUDA, or on the CPU under TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" or (device.type == "cpu" and interpreted)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the multiprocessors of a CUDA device; elsewhere 1, so that small tests take every path."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_warned: set[str] = set()


def _warn_slow(name: str, reason: str) -> None:
    """Warn once for each operator that its slow reference runs, and why."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name} runs its slow reference: {reason}", stacklevel=3)
