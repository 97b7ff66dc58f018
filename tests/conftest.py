"""Shared by all tests: unwritten memory becomes NaN; a random generator for each test; the operators' backends."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from syncmask_fast import _native

_native.load()
NOT_BUILT = pytest.mark.skipif(not _native.is_loaded(), reason=_native.describe())
ISAS = _native.isas() or [pytest.param("", marks=NOT_BUILT)]

torch.use_deterministic_algorithms(True, warn_only=True)  # also fills `torch.empty` with NaN


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator seeded from the test's own name and parameters."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU; the C++ kernels use it during the test."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The operators' `backend` argument: reference, then cpp on each instruction set of this CPU."""
    if request.param == "reference":
        yield "reference"
        return
    before = _native.isa()
    _native.set_isa(request.param)
    yield "cpp"
    _native.set_isa(before)
