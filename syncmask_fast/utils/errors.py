"""The error that users are meant to read, and warnings."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A problem that the user can fix: `<What> <problem>. <Fix>.`, naming the file or flag."""


def warn(text: str) -> None:
    """Print one line on stderr, for a problem that does not end a run."""
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an exception's message, or its type if it has none, on one line of at most `limit` characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def run_command(main: Callable[[], None]) -> None:
    """Run `main` as a command: a `UserError` or `OSError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
