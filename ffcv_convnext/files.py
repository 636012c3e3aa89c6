"""Atomic writing of files; reading and writing of JSON objects: one in a file, or one per line (.jsonl).

Each object is written with a checksum, `crc32`, and read with a Form: the keys and types that its readers need.
Objects without a checksum (of version 0.2.0, or written by hand) are read, too.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

Warn = Callable[[str], None]
CRC = "crc32"  # in each object: of its JSON without this key
NUMBER = (int, float)


class Damaged(ValueError):
    """A file exists and cannot be used."""


@dataclass(frozen=True, slots=True)
class Form:
    """Keys of a JSON object and the types of their values; other keys may hold anything.

    A type is str, int (below 2**63), float (or such an int), NoneType, dict, a Form, a list of one type for a list, or
    a tuple of alternatives.
    """

    required: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    unique: str | None = None  # a key whose value must differ in each line of a file


ANY = Form()


@cache
def warn_once(message: str) -> None:
    """Log a warning, once in a process: a file is read several times."""
    log.warning(message)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` once it is complete and on disk.

    If the block or the disk fails, the temporary file beside `path` is removed and `path` keeps its old content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the name also survives a power failure
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that were killed while writing. No other process may write there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file; after a crash it has the old or the new content."""
    with replacing(path) as file:
        file.write(content)


def damaged_copy(path: Path) -> Path:
    """Return where the unreadable content of a file is kept."""
    return path.with_name(f"{path.name}.damaged")


# --- JSON --------------------------------------------------------------------------------------------------------


def complaint(value: Any, kind: Any, name: str = "") -> str:
    """Return what is wrong with a value that should have a Form's type; '' if nothing is."""
    if isinstance(kind, Form):
        if not isinstance(value, dict):
            return f"{name or 'it'} is not an object"
        missing = [key for key in kind.required if key not in value]
        if missing:
            return f"'{missing[0]}' is missing"
        known = {**kind.required, **kind.optional}
        return next((found for key in known if key in value and (found := complaint(value[key], known[key], key))), "")
    if isinstance(kind, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        return next((found for item in value if (found := complaint(item, kind[0], name))), "")
    if isinstance(kind, tuple):
        return "" if any(not complaint(value, each, name) for each in kind) else _unusable(name, value)
    if type(value) is int and kind in NUMBER:
        return "" if abs(value) < 1 << 63 else _unusable(name, value)
    return "" if isinstance(value, kind) and not isinstance(value, bool) else _unusable(name, value)


def _unusable(name: str, value: Any) -> str:
    with suppress(ValueError):  # an integer of thousands of digits has no text
        return f"{name} is {repr(value)[:40]}"
    return f"{name} is too large"


def encode(content: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Return an object as JSON with its checksum and a newline."""
    return (json.dumps({**content, CRC: _checksum(content)}, indent=indent) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


def _decode(text: bytes, form: Form) -> dict[str, Any]:
    """Return the object in `text` without its checksum. Raises ValueError with the reason if it cannot be used."""
    try:
        content = json.loads(text.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON" if text.strip() else "empty") from None
    if not isinstance(content, dict):
        raise ValueError("not an object")
    if CRC in content and content.pop(CRC) != _checksum(content):
        raise ValueError("its checksum does not match")
    if found := complaint(content, form):
        raise ValueError(found)
    return content


def read_object(path: Path, form: Form = ANY) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no file. Raises Damaged if it cannot be used."""
    try:
        return _decode(path.read_bytes(), form)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Damaged(f"{path} cannot be read: {error}") from None


def write_object(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write an object with its checksum; after a crash the file has the old or the new content."""
    write_atomically(path, encode(content, indent=indent))


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # from 1
    text: bytes
    entry: dict[str, Any] | None  # None: it cannot be used
    reason: str


def _scan(path: Path, form: Form) -> Iterator[_Line]:
    """Yield the lines of a .jsonl file. Raises Damaged if the file cannot be opened."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from None
    seen: dict[Any, int] = {}
    for number, text in enumerate(lines, 1):
        if not text:  # after the last line
            continue
        try:
            entry = _decode(text, form)
            if form.unique is not None and seen.setdefault(entry[form.unique], number) != number:
                raise ValueError(f"{form.unique} {entry[form.unique]} again, as in line {seen[entry[form.unique]]}")
            yield _Line(number, text, entry, "")
        except ValueError as error:
            yield _Line(number, text, None, str(error))


def _describe(path: Path, bad: list[_Line], what: str) -> str:
    numbers = ", ".join(str(line.number) for line in bad[:10]) + (", ..." if len(bad) > 10 else "")
    return f"{path}: line{'s' if len(bad) > 1 else ''} {numbers} cannot be read ({bad[0].reason}); {what}"


def read_lines(path: Path, form: Form = ANY, warn: Warn = warn_once) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file; [] if there is no file.

    Lines that cannot be used are left out, with one warning that names them.
    """
    try:
        lines = list(_scan(path, form))
    except Damaged as error:
        warn(str(error))
        return []
    if bad := [line for line in lines if line.entry is None]:
        warn(_describe(path, bad, "left out"))
    return [line.entry for line in lines if line.entry is not None]


def append_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a .jsonl file, on lines of their own also where a kill cut the last line short."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.writelines(map(encode, entries))


def keep_lines(
    path: Path, form: Form, wanted: Callable[[dict[str, Any]], bool], warn: Warn = warn_once
) -> list[dict[str, Any]]:
    """Remove the entries of a .jsonl file that are not wanted; return the others.

    Lines that cannot be used move to the end of NAME.damaged, with one warning that names them.
    """
    lines = list(_scan(path, form))
    if bad := [line for line in lines if line.entry is None]:
        with open(damaged_copy(path), "ab") as file:
            file.writelines(line.text + b"\n" for line in bad)
            file.flush()
            os.fsync(file.fileno())
        warn(_describe(path, bad, f"moved to {damaged_copy(path).name}"))
    kept = [(line.text, line.entry) for line in lines if line.entry is not None and wanted(line.entry)]
    if lines:
        write_atomically(path, b"".join(text + b"\n" for text, _ in kept))
    return [entry for _, entry in kept]
