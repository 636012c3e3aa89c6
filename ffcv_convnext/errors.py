"""Errors a user can act on, and the exit status that tells them apart."""

from __future__ import annotations

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command continues


class Failure(RuntimeError):
    """Work that began and could not be finished: a corrupt image, a full disk, a loss that is not finite.

    The message is one line that names the place and the next action. Wrong settings and paths are a ValueError or
    FileNotFoundError instead, raised before work begins.
    """


class Interrupted(RuntimeError):
    """A signal stopped the run after its state was saved."""
