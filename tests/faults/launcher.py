"""Run commands as forks of one process that has everything imported: fifty starts cost seconds instead of minutes.

As a program it reads one JSON object a line, {"module", "argv", "log", "ranks", "file_limit"}, and answers with the
process ids as a JSON list, then with the exit codes (negative: the signal that ended the process).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("syncmask_fast.train", "syncmask_fast.finetune", "tests.distributed_worker")
GRACE_SECONDS = 20  # after the first failure of a rank, before the others are killed


class Launcher:
    """A context manager; one run, of one or several ranks, at a time."""

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

    def start_ranks(
        self, ranks: int, module: str, argv: list[str], log: Path, file_limit: int | None = None
    ) -> list[int]:
        """Start `module.main(argv)` on several ranks, as torchrun would; return the process ids.

        ranks:      how many; with 1 the environment is that of a process without torchrun.
        log:        gets what all of them print.
        file_limit: the largest file that they may write, in bytes.
        """
        request = {"module": module, "argv": argv, "log": str(log), "ranks": ranks, "file_limit": file_limit}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def wait_ranks(self) -> list[int]:
        """Return the exit codes of the run that was started last; negative where a signal ended a process."""
        return json.loads(self._process.stdout.readline())

    def start(self, argv: list[str], log: Path, file_limit: int | None = None) -> int:
        """Start a training run of one process; return its id."""
        return self.start_ranks(1, "syncmask_fast.train", argv, log, file_limit)[0]

    def wait(self) -> int:
        """Return the exit code of the run of one process that was started last."""
        return self.wait_ranks()[0]

    def run(self, argv: list[str], log: Path, file_limit: int | None = None) -> int:
        self.start(argv, log, file_limit)
        return self.wait()


def serve() -> None:
    import nvidia.dali.fn  # noqa: F401

    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        environments = rank_environments(request["ranks"])
        children = [fork(request, environment) for environment in environments]
        print(json.dumps(children), flush=True)
        print(json.dumps(wait_for(children)), flush=True)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return what torchrun would set for each rank; nothing for a single process."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{name: str(value) for name, value in each.items()} for each in environments]


def fork(request: dict, environment: dict[str, str]) -> int:
    """Return the id of a child that runs the request and exits."""
    from syncmask_fast.utils.errors import run_command

    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if request["file_limit"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
        run_command(functools.partial(sys.modules[request["module"]].main, request["argv"]))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:  # a crash without a sentence: code 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_for(children: list[int]) -> list[int]:
    """Return the exit codes; once one rank has failed, the others have some seconds until they are killed."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if deadline is None and any(codes.values()):
            deadline = time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


if __name__ == "__main__":
    serve()
