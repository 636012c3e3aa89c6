"""What a setting is: its type, its words on the command line and in YAML, and its explanation."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


def setting(default: Any, help: str, *, free: bool = False, aliases: Mapping[str, str] | None = None) -> Any:
    """A dataclass field with its explanation.

    free: may differ between the parts of one interrupted run, since it does not change what is computed.
    aliases: other spellings of a word, e.g. {"true": "post"}.
    """
    return dataclasses.field(default=default, metadata={"help": help, "free": free, "aliases": aliases or {}})


def to_plain(value: Any) -> Any:
    """A setting's value as YAML and JSON can hold it; `Setting.parse` reads it back."""
    if isinstance(value, tuple):
        return ("-" if isinstance(value[0], int) else ",").join(str(x) for x in value)
    return str(value) if isinstance(value, Path) else value


def format_value(value: Any) -> str:
    """A setting's value as a user writes it."""
    plain = to_plain(value)
    if isinstance(plain, bool):
        return str(plain).lower()
    return "none" if plain is None else str(plain)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of one flat name."""

    name: str
    group: str
    type: Any
    default: Any
    help: str
    free: bool
    aliases: Mapping[str, str]

    def parse(self, raw: Any) -> Any:
        """Turn a command-line string or a YAML value into this setting's type."""
        if isinstance(raw, bool):
            word = str(raw).lower()
        elif isinstance(raw, list | tuple):
            word = ",".join(str(x) for x in raw)
        else:
            word = "none" if raw is None else str(raw).strip()
        try:
            return _parse(self.type, self.aliases.get(word.lower(), word))
        except ValueError as error:
            raise ValueError(f"{self.name} = {word}: expected {error}") from None

    @property
    def holds_several(self) -> bool:
        """Whether the value is several numbers, which a command line may separate by blanks."""
        return any(get_origin(kind) is tuple for kind in (self.type, *get_args(self.type)))

    @property
    def words(self) -> str:
        """What may be written, for help texts."""
        return _describe(self.type)


def _parse(kind: Any, word: str) -> Any:
    """Parse one word; a ValueError says only what was expected."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if word.lower() in ("none", "null", ""):
            return None
        return _parse(next(k for k in get_args(kind) if k is not type(None)), word)
    if origin is Literal:
        for choice in get_args(kind):
            if word.lower() == str(choice):
                return choice
        raise ValueError(_describe(kind))
    if origin is tuple:
        kinds = get_args(kind)
        separator = r"\s*[-,]\s*|\s+" if kinds[0] is int else r"\s*,\s*|\s+"
        words = re.split(separator, word.strip("[]() "))
        try:
            numbers = tuple(_parse(k, w) for k, w in zip(kinds, words, strict=True))
        except ValueError:
            raise ValueError(_describe(kind)) from None
        return numbers
    if kind is bool:
        if word.lower() in ("true", "false"):
            return word.lower() == "true"
        raise ValueError(_describe(kind))
    if kind is Path:
        return Path(word).expanduser()
    try:
        value = kind(word)
    except ValueError:
        raise ValueError(_describe(kind)) from None
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if k is type(None) else _describe(k) for k in get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if origin is tuple:
        kinds = get_args(kind)
        return f"{len(kinds)} {'whole ' if kinds[0] is int else ''}numbers, e.g. " + (
            "3-3-9-3" if kinds[0] is int else "0.9,0.999"
        )
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a word", Path: "a path"}[kind]


def nearest(name: str, known: Iterable[str]) -> str:
    """'; nearest: a, b' for error messages, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""
