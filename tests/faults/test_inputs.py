"""Files that others may have written, changed by hypothesis: each is read, repaired or refused."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.mutations import KINDS, READ, Kind, feed, watched

EXAMPLES = 15  # of each kind; `make soak` feeds 1,000


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return KINDS[request.param](tmp_path_factory.mktemp("kind") / "files")


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False))
def test_mutants_never_crash(kind: Kind, draw: random.Random):
    data = kind.mutant(draw)
    with watched(kind.folder.parent):
        feed(kind, data)


def test_what_is_whole_is_read(kind: Kind):
    """Else the kind would test refusals alone."""
    if hasattr(kind, "whole"):
        with watched(kind.folder.parent):
            assert feed(kind, kind.whole) in (READ, "accepted: it fits the shards")


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("open('elsewhere', 'w')", "open"),
        ("os.mkdir('elsewhere')", "os.mkdir"),
        ("os.system('true')", "os.system"),
        ("pickle.loads(pickle.dumps(os.getcwd))", "pickle.find_class"),
        ("bytearray(2**33)", "MemoryError"),
    ],
)
def test_the_guard_sees_what_it_forbids(code: str, seen: str, tmp_path: Path):
    program = f"import os, pickle\nfrom tests.faults.mutations import Path, watched\nos.chdir({str(tmp_path)!r})\n"
    program += f"with watched(Path('allowed')):\n    {code}\n"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode != 0
    assert seen in done.stderr
