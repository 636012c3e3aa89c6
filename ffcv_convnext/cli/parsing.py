"""Parts that the commands' parsers share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all usage errors of this package."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message}; {self.prog} --help lists the options")


def parser_of(name: str, command: Callable[..., int], script: str | None = None) -> Parser:
    """Return a parser that shows the called program's name and the docstring of `command`.

    script: the file that runs only this command; default: `<name>.py`.
    """
    called = Path(sys.argv[0]).name
    prog = called if called == (script or f"{name}.py") else f"ffcv-convnext {name}"
    return Parser(prog=prog, description=command.__doc__, allow_abbrev=False)


def true_or_false(text: str) -> bool:
    """Parse true or false."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"'{text}': expected true or false") from None


def check_json(path: Path | None) -> None:
    """Raise ValueError before the work if the file of --json cannot be created."""
    if path and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(f"--json {path}: expected a file in a folder that exists")
