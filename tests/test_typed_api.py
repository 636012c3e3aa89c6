"""Callers of the package are checked: mypy refuses a wrong use of every public name.

A name that reaches callers as `Any` would accept everything; then mypy is silent on its line, and the test fails.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mypy")
pytest.importorskip("ffcv.reader")

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ffcv_convnext"
FOLDERS = ["config", "data.beton", "data.check", "data.convert", "data.load", "models", "augment", "training"]
FOLDERS += ["training.distributed", "training.engine", "training.kernel_choice", "training.preflight", "training.run"]
FOLDERS += ["data.beton.tables", "cluster", "ladder", "report"]

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
TAKE_ANY_OBJECT = {"config.check_ranges", "config.format_value", "config.setting", "config.to_plain"}


def public_names(folder: str) -> list[str]:
    """What an `__init__.py` exports, or the public functions and classes that a file defines."""
    module = importlib.import_module(f"{PACKAGE}.{folder}")
    if hasattr(module, "__all__"):
        return list(module.__all__)
    defined = {
        name for name, value in vars(module).items()
        if inspect.isfunction(value) or inspect.isclass(value)
        if value.__module__ == module.__name__ and not name.startswith("_")
    }  # fmt: skip
    return sorted(defined)


def wrong_uses(folder: str, name: str) -> list[tuple[str, str]]:
    """Lines of code that use a public name in a wrong way, each with the code of mypy's error."""
    value: Any = getattr(importlib.import_module(f"{PACKAGE}.{folder}"), name)
    use = f"{folder.replace('.', '_')}.{name}"
    lines = [(f"{{number}}: Stranger = {use}", "assignment")]
    if not inspect.isfunction(value) and not inspect.isclass(value):
        return lines
    lines.append((f"{use}(unknown_keyword=0)", "call-arg"))
    if inspect.isclass(value) and issubclass(value, BaseException):
        return lines  # takes any arguments
    parameters = [each for each in inspect.signature(value).parameters.values() if each.kind not in VARIADIC]
    if parameters and f"{folder}.{name}" not in TAKE_ANY_OBJECT:
        needed = [each for each in parameters if each.default is each.empty] or parameters[:1]
        arguments = [
            "Stranger()" if each.kind == each.POSITIONAL_ONLY else f"{each.name}=Stranger()" for each in needed
        ]
        lines.append((f"{use}({', '.join(arguments)})", "arg-type"))
    return lines


def test_mypy_refuses_a_wrong_use_of_every_public_name(tmp_path: Path) -> None:
    aliases = [f"import {PACKAGE}.{folder} as {folder.replace('.', '_')}" for folder in FOLDERS]
    source = [*aliases, "class Stranger: ..."]
    expected = {}
    for folder in FOLDERS:
        for name in public_names(folder):
            for line, code in wrong_uses(folder, name):
                source.append(line.format(number=f"value_{len(source)}"))
                expected[len(source)] = code
    program = tmp_path / "wrong.py"
    program.write_text("\n".join(source) + "\n")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--no-error-summary", str(program)],
        cwd=ROOT, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    refused = set(re.findall(r"wrong\.py:(\d+): error: .*\[([\w-]+)\]$", result.stdout, flags=re.MULTILINE))
    accepted = [
        f"{source[line - 1]}  # no [{code}]" for line, code in expected.items() if (str(line), code) not in refused
    ]
    assert not accepted, "mypy accepts:\n" + "\n".join(accepted)
