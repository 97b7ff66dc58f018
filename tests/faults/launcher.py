"""Runs commands of the trainer as forks of one process that has everything imported: fifty starts cost seconds instead of minutes.

As a program it reads one JSON object a line, {"argv": [...], "log": path, "file_limit": bytes or null}, and answers with the process id of the run,
then with its exit code (negative: the signal that ended it).
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Launcher:
    """A context manager; one run at a time."""

    def __enter__(self) -> Launcher:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "tests.faults.launcher"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def start(self, argv: list[str], log: Path, file_limit: int | None = None) -> int:
        """Begins a run; returns its process id. log: gets what it prints. file_limit: the largest file that it may write, in bytes."""
        self._process.stdin.write(json.dumps({"argv": argv, "log": str(log), "file_limit": file_limit}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """The exit code of the run that was begun last; negative where a signal ended it."""
        return int(self._process.stdout.readline())

    def run(self, argv: list[str], log: Path, file_limit: int | None = None) -> int:
        self.start(argv, log, file_limit)
        return self.wait()


def serve() -> None:
    import nvidia.dali.fn  # noqa: F401

    from syncmask_fast import finetune, train  # noqa: F401
    from syncmask_fast.utils.errors import run_command

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if asked["file_limit"] is not None:
                signal.signal(
                    signal.SIGXFSZ, signal.SIG_IGN
                )  # then a write beyond the limit is an error, as on a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_limit"], resource.RLIM_INFINITY))
            code = 1
            try:
                run_command(functools.partial(train.main, asked["argv"]))
                code = 0
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:  # a crash without a sentence: code 1
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
