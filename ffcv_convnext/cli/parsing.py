"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other usage error here."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the options")


def parser_of(name: str, command: Callable[..., int]) -> Parser:
    """A parser that answers to the name it was called by and tells what its function's docstring tells."""
    script = Path(sys.argv[0]).name
    prog = script if script == f"{name}.py" else f"ffcv-convnext {name}"
    return Parser(prog=prog, description=command.__doc__, allow_abbrev=False)


def number_or(word: str, meaning: str | None) -> Callable[[str], int | str | None]:
    def number(text: str) -> int | str | None:  # argparse says: invalid number value
        return meaning if text == word else int(text)

    return number


def true_or_false(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"'{text}': expected true or false") from None


def check_json(path: Path | None) -> None:
    """Raises ValueError where --json names no place for a file: before the work, not after."""
    if path and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(f"--json {path}: expected a file in a folder that exists")
