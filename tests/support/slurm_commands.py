"""Fake Slurm commands, and command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def answer(folder: Path, name: str, output: str, *, status: int = 0) -> None:
    """Make a fake Slurm command that records its arguments, prints and exits."""
    script = f"#!/bin/sh\necho \"$@\" >> '{folder / name}.calls'\ncat <<'END'\n{output}\nEND\nexit {status}\n"
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]
