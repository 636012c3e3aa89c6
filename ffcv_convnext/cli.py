"""The command line: `ffcv-convnext write|train|ladder|report|export`.

Exit status: 0 done, 1 failed, 2 wrong usage, 75 interrupted and ready to be resumed. What a user can mend is one
line on stderr; anything else keeps its traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ffcv_convnext import __version__
from ffcv_convnext.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, Failure, Interrupted

USAGE_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
PACKAGE = Path(__file__).resolve().parent


def write(argv: Sequence[str]) -> int:
    """Convert an ImageFolder to .beton files and manifests."""
    raise ValueError(f"not there yet: {argv}")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"write": write}


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argv defaults to the process's."""
    try:
        return COMMANDS[name](sys.argv[1:] if argv is None else argv)
    except Interrupted as error:
        return _say(str(error), EXIT_INTERRUPTED)
    except Failure as error:
        return _say(f"error: {error}", EXIT_FAILURE)
    except USAGE_ERRORS as error:
        if not _raised_by_us(error):
            raise
        return _say(f"error: {error}", EXIT_USAGE)
    except KeyboardInterrupt:
        return _say("interrupted", 130)


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it on purpose: a ValueError from inside torch keeps its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents


def _say(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:8} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: ffcv-convnext COMMAND ...\n\ncommands:\n{listing}\n\nffcv-convnext COMMAND --help tells more.")
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        return _say(f"error: no command '{arguments[0]}'; there are: {', '.join(COMMANDS)}", EXIT_USAGE)
    return run_command(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
