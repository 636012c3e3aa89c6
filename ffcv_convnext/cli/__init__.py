"""The command line: `ffcv-convnext write|train|ladder|report|export|bench|doctor|verify|data`.

Exit status: 0 done, 1 failed, 2 wrong usage, 75 interrupted and ready to be resumed. Errors that a user can fix are
one line on stderr; other errors keep their traceback.
"""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Callable, Sequence

from ffcv_convnext import __version__
from ffcv_convnext.cli.data import data, verify, write
from ffcv_convnext.cli.ladder import ladder
from ffcv_convnext.cli.measure import bench, doctor
from ffcv_convnext.cli.runs import export, report, train
from ffcv_convnext.config import nearest
from ffcv_convnext.errors import EXIT_USAGE, complain, exit_status

EXIT_BROKEN_PIPE = 141  # as of a program that SIGPIPE ended
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "write": write,
    "train": train,
    "ladder": ladder,
    "report": report,
    "export": export,
    "bench": bench,
    "doctor": doctor,
    "verify": verify,
    "data": data,
}


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argv defaults to the process's."""
    if logging.lastResort is not None:  # prints warnings of commands that set up no logging
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    return _quiet_without_reader(lambda: exit_status(lambda: COMMANDS[name](sys.argv[1:] if argv is None else argv)))


def _quiet_without_reader(work: Callable[[], int]) -> int:
    """Do some work and return its exit status; also if nobody reads what it prints any more."""
    try:
        status = work()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return EXIT_BROKEN_PIPE
    return status


def _reader_has_left() -> bool:
    """Return whether stdout is a pipe that nobody reads any more, e.g. of `| head`; nothing more is written then."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)  # errors are reported without being asked for
    if not any(event & select.POLLERR for _, event in watched.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ffcv-convnext` and return its exit status."""
    return _quiet_without_reader(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(arguments: list[str]) -> int:
    listing = "\n".join(f"  {name:8} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: ffcv-convnext COMMAND ...\n\ncommands:\n{listing}\n\noptions: ffcv-convnext COMMAND --help")
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        hint = f"{nearest(arguments[0], COMMANDS)}; commands: {', '.join(COMMANDS)}"
        return complain(f"error: unknown command '{arguments[0]}'{hint}", EXIT_USAGE)
    return run_command(arguments[0], arguments[1:])
