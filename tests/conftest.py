"""Shared by all tests: NaN in unwritten memory, a random generator for each test, operators' backends, one lookbook."""

from __future__ import annotations

import fcntl
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from syncmask_fast import _native
from tests.faults.launcher import Launcher

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


@pytest.fixture(scope="session")
def lookbook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set of 96-px images: 5 batches of 16 to train on, 105 products to evaluate on. Tests only read it.

    The workers of pytest-xdist have folders with a common parent: the first one draws for all.
    """
    from syncmask_fast.sources.lookbook import draw_lookbook  # tests of the operators never pay for it

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "popen-" in base.name else base) / "lookbook"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draw_lookbook(folder, products=22, eval_products=105, size=96, workers=1)
    return folder


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Start training runs as forks of one process; see tests/faults/launcher.py."""
    with Launcher() as started:
        yield started
