"""`pytest bench --benchmark-only`: measure, write bench/results, and repeat with the tuned allocator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bench import harness

_session = harness.Session()
_AGAIN = "SYNCMASK_BENCH_AGAIN"  # set in the second process: the tests have passed in the first


@pytest.fixture
def measured() -> harness.Session:
    if _AGAIN in os.environ:
        _session.require_green = lambda operator: None
    return _session


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cuda" and _AGAIN in os.environ:
        pytest.skip("the allocator of the host makes no difference")
    return torch.device(request.param)


def pytest_terminal_summary(terminalreporter, config) -> None:
    for line in _session.table():
        terminalreporter.write_line(line)
    for path in _session.write():
        terminalreporter.write_line(f"written: {path}")


def pytest_unconfigure(config) -> None:
    """malloc reads its settings when a process starts, so the other setting takes another process."""
    on_cpu = any(row["device"] == "cpu" for row in _session.rows)
    if on_cpu and harness.allocator() == "default" and _AGAIN not in os.environ:
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        run = subprocess.run(command, env=os.environ | harness.TUNED | {_AGAIN: "1"}, cwd=config.invocation_params.dir)
        if run.returncode != 0:
            print("the benchmarks with the tuned allocator failed", file=sys.stderr)
