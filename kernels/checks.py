"""Checks of arguments that the operators share: a ValueError names the argument, what it is and what is expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)


def check_tensor(name: str, value: object, layout: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise unless `value` is a tensor with the dimensions that `layout` names and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected a tensor [{layout}]")
    if value.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected [{layout}]")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; expected {wanted}")


def check_shape(name: str, value: Tensor, shape: Sequence[int], why: str) -> None:
    """Raise unless `value.shape` is `shape`; `why` says where the expected shape comes from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(value.shape)}; expected {list(shape)} ({why})")


def check_same(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = False) -> None:
    """Raise unless `value` is on the device of `other`, and with `dtype=True` has its dtype."""
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}; expected {other.device}, where {other_name} is")
    if dtype and value.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {value.dtype}; expected {other.dtype}, as {other_name}")


def check_contiguous(name: str, value: Tensor) -> None:
    """Raise unless `value` is contiguous."""
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {list(value.stride())}; expected a contiguous tensor")


def check_number(name: str, value: object, low: float, high: float, expected: str) -> None:
    """Raise unless `value` is a real number (not NaN) with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_integer(name: str, value: object, low: int, high: int, expected: str) -> None:
    """Raise unless `value` is an integer with low <= value <= high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_margin(margin: object) -> None:
    """Raise unless `margin` is a number; infinities are allowed."""
    check_number("margin", margin, -math.inf, math.inf, "a number, infinities included, not NaN")
