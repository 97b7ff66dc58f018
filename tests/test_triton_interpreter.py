"""Where no GPU is present, the tests of the Triton kernels run under Triton's interpreter, in a process of their own.

TRITON_INTERPRET must be set before triton is first imported and holds for the whole process, so that it cannot be
set beside tests that compile kernels or that ask which backends this machine has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in ROOT.glob("tests/test_*_triton.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests run on the GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels' own tests run in this process")
@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout + done.stderr
