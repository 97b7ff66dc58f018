"""The one kind of error that users are meant to read, and the warnings beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something that the user can mend: one plain sentence that names the file or flag and says how."""


def warn(text: str) -> None:
    """One loud line on stderr, for what does not end a run but must not go unseen."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an exception's message on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


def run_command(main: Callable[[], None]) -> None:
    """Runs `main` as a command: a `UserError`, or a file that the system refuses, becomes one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
