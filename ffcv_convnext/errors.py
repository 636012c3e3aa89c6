"""Errors that a user can fix, and their exit statuses."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command continues

USAGE_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PACKAGE = Path(__file__).resolve().parent


class Failure(RuntimeError):
    """Work started and could not be finished: a corrupt image, a full disk, a loss that is not finite.

    The message is one line with the place and the next action. Wrong settings and paths raise ValueError or
    FileNotFoundError instead, before work begins.
    """


class LostRank(Failure):
    """Another process of the run was lost first, so this one cannot go on."""


class Interrupted(RuntimeError):
    """A signal stopped the run after its state was saved."""


def exit_status(work: Callable[[], int]) -> int:
    """Do some work and return its exit status. Print errors that a user can fix as one line on stderr; raise others."""
    try:
        return work()
    except Interrupted as error:
        return complain(str(error), EXIT_INTERRUPTED)
    except Failure as error:
        return complain(f"error: {error}", EXIT_FAILURE)
    except USAGE_ERRORS as error:
        if not _raised_by_us(error):
            raise
        return complain(f"error: {error}", EXIT_USAGE)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        place = error.filename or "a file"
        return complain(f"error: {place} cannot be written: {error.strerror}; make room", EXIT_FAILURE)
    except KeyboardInterrupt:
        return complain("interrupted", 130)


def _raised_by_us(error: BaseException) -> bool:
    """Return whether this package raised the error itself: a ValueError from inside torch keeps its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents


def complain(line: str, status: int) -> int:
    """Print a line on stderr and return `status`."""
    sys.stderr.write(f"{line}\n")
    return status
