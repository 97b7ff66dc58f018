"""Shared by all tests: unwritten memory becomes NaN, and each test has a random generator of its own."""

from __future__ import annotations

import zlib

import pytest
import torch

torch.use_deterministic_algorithms(True, warn_only=True)  # also fills `torch.empty` with NaN


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator seeded from the test's own name and parameters."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))
