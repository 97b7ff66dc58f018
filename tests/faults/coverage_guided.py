"""Coverage-guided fuzzing of one kind of input with atheris, which is no dependency of the project (`pip install
atheris`).

    python -m tests.faults.coverage_guided KIND -max_total_time=60

KIND is one of `mutations.KINDS`; what follows it goes to libFuzzer. It ends at the first crash, with its traceback and
the input in a file.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["syncmask_fast"]):
    from tests.faults.mutations import KINDS, feed, watched


def main() -> None:
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as corpus:
        kind = KINDS[name](Path(folder) / "files")
        for seed in range(20):
            (Path(corpus) / str(seed)).write_bytes(kind.mutant(random.Random(seed)))

        def one(data: bytes) -> None:
            with watched(Path(folder)):
                feed(kind, data)

        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
