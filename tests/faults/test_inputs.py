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


FORBIDDEN_ACTS = {
    "open('elsewhere', 'w')": "open",
    "os.mkdir('other')": "os.mkdir",
    "os.system('true')": "os.system",
    "pickle.loads(pickle.dumps(os.getcwd))": "pickle.find_class",
    "bytearray(2**33)": "MemoryError",
}
# Audit hooks cannot be removed, so each act runs in a fork of one child that has everything imported.
WATCHED_FORKS = """
import os, pickle, sys, traceback
from tests.faults.mutations import Path, watched
os.chdir(sys.argv[1])
for number, code in enumerate(sys.argv[2:]):
    child = os.fork()
    if child == 0:
        sys.stderr = open(f"{number}.log", "w")
        try:
            with watched(Path("allowed")):
                exec(code)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_guard(tmp_path: Path):
    """The guard of these tests sees every act that it forbids."""
    command = [sys.executable, "-c", WATCHED_FORKS, str(tmp_path), *FORBIDDEN_ACTS]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    for number, seen in enumerate(FORBIDDEN_ACTS.values()):
        assert seen in (tmp_path / f"{number}.log").read_text().splitlines()[-1]
