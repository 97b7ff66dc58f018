"""Where no GPU is present, the tests of the Triton kernels run under Triton's interpreter, in a process of their own.

TRITON_INTERPRET must be set before triton is first imported and holds for the whole process. So it cannot be set in a
process that compiles kernels or that asks which backends this machine has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(f"tests/{path.name}" for path in ROOT.glob("tests/test_*_triton.py"))
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests run on the GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels' own tests run in this process"),
]


def run_pytest(*arguments: str) -> None:
    """Run pytest under the interpreter; fail with its output."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_small_shapes():
    """Every kernel at one small shape."""
    run_pytest(*FILES, "-k", "test_small")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_everything(name):
    run_pytest(name)
