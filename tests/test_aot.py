"""Every Triton configuration compiles for every target, without register spills, and fits its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_configuration_compiles(tmp_path):
    triton = pytest.importorskip("triton")
    if not Path(triton.knobs.nvidia.ptxas.path).exists():
        pytest.skip("this build of triton has no ptxas")
    # A process of its own: under TRITON_INTERPRET kernels cannot be compiled.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "syncmask_fast.kernels.aot", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    from syncmask_fast.kernels import aot

    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len({(row["configuration"], row["target"]) for row in rows})
    assert {(row["configuration"], row["target"]) for row in rows} == {
        (one.name, f"sm_{target}") for one in aot.configurations() for target in aot.TARGETS
    }
    for row in rows:
        assert row["stack"] == 0, f"{row} spills registers"
        assert row["registers"] * row["warps"] * 32 <= 65536, f"{row} does not fit the registers"
        assert row["shared"] <= aot.SHARED_LIMIT[int(row["target"].removeprefix("sm_"))], f"{row} does not fit"
