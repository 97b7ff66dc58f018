"""What the three operators share: checks at the edge, precision, and the choice of a backend."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import numbers
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from syncmask_fast import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)
BACKENDS = ("auto", "reference", "triton", "cpp")


def check_tensor(name: str, value: object, layout: str, dtypes: Sequence[torch.dtype]) -> None:
    """ValueError unless `value` is a tensor with the dimensions that `layout` names and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor [{layout}]")
    if value.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected [{layout}]")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; expected {wanted}")


def check_shape(name: str, value: Tensor, shape: Sequence[int], why: str) -> None:
    """ValueError unless `value.shape` is `shape`; `why` says where the expected shape comes from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)} ({why})")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = False) -> None:
    """ValueError unless `value` lies on the device of `other`, and with `dtype=True` has its dtype."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}; expected {other.device}, where {other_name} is")
    if dtype and value.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {value.dtype}; expected {other.dtype}, as {other_name}")


def check_number(name: str, value: object, low: float, high: float, expected: str) -> None:
    """ValueError unless `value` is a real number (not NaN) with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_integer(name: str, value: object, low: int, high: int, expected: str) -> None:
    """ValueError unless `value` is an integer with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_margin(margin: object) -> None:
    check_number("margin", margin, -math.inf, math.inf, "a number, infinities included, not NaN")


def check_backend(op: str, backend: object, built: Sequence[str], device: torch.device) -> None:
    """ValueError unless `backend` is one of BACKENDS and, where asked for by name, in `built` here."""
    check_choice("backend", backend, BACKENDS)
    if backend == "cpp" and not _native.loaded():
        raise ValueError(f"backend is 'cpp', but {_native.status()}; expected 'auto' or 'reference'")
    if backend not in ("auto", *built):
        have = " or ".join(map(repr, ("auto", *built)))
        raise ValueError(f"backend is {backend!r}, which {op} does not have on {device}; expected {have}")


def reference_dtype(value: Tensor) -> torch.dtype:
    """The dtype in which a reference computes: float64 for float64 inputs (an oracle), otherwise float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def autocast_off(value: Tensor) -> contextlib.AbstractContextManager:
    """Turns autocast off: float32 products inside an operator stay float32 in a caller's autocast region."""
    return torch.autocast(value.device.type, enabled=False)


@torch.compiler.assume_constant_result
def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`: CUDA, or the CPU under TRITON_INTERPRET=1; Triton importable."""
    if importlib.util.find_spec("triton") is None:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" or (device.type == "cpu" and interpreted)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; elsewhere (Triton's interpreter) one, so that small tests take every path."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_warned: set[str] = set()


def warn_slow(op: str, reason: str) -> None:
    """Says once for each operator that it runs its slow reference, and why."""
    if op not in _warned:
        _warned.add(op)
        warnings.warn(f"{op} runs its slow reference: {reason}", stacklevel=2)


NO_TRITON = "Triton is missing; to have it, `pip install triton`"
