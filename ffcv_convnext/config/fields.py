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


def setting(
    default: Any,
    help: str,
    *,
    free: bool = False,
    aliases: Mapping[str, str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a dataclass field with its explanation and its range.

    free: may differ between the parts of one interrupted run, because it does not change what is computed.
    aliases: other spellings of a value, e.g. {"true": "post"}.
    minimum, maximum: smallest and largest value.   above, below: the same, exclusive.   `check_ranges` enforces them,
    for each number of a tuple.
    """
    bounds = (minimum, maximum, above, below)
    return dataclasses.field(
        default=default, metadata={"help": help, "free": free, "aliases": aliases or {}, "bounds": bounds}
    )


def check_ranges(settings: Any) -> None:
    """Raise ValueError if a value of this dataclass is outside the range that its `setting()` declares.

    None and words are not checked.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        bounds = field.metadata.get("bounds", (None,) * 4)
        if any(not _is_inside(number, *bounds) for number in numbers if isinstance(number, int | float)):
            raise ValueError(f"{field.name} = {format_value(value)}: expected {_describe_bounds(field.type, *bounds)}")


def _is_inside(
    number: float, minimum: float | None, maximum: float | None, above: float | None, below: float | None
) -> bool:
    return (
        (minimum is None or number >= minimum)
        and (maximum is None or number <= maximum)
        and (above is None or number > above)
        and (below is None or number < below)
    )


def _describe_bounds(
    kind: Any, minimum: float | None, maximum: float | None, above: float | None, below: float | None
) -> str:
    """Return 'at least 1', '1 to 100', 'a number in (0, 1]' and so on."""
    low, high = (above if minimum is None else minimum), (below if maximum is None else maximum)
    if low is not None and high is not None:
        if "int" in str(kind) and minimum is not None and maximum is not None:
            return f"{low} to {high}"
        return f"a number in {'(' if minimum is None else '['}{low:g}, {high:g}{')' if maximum is None else ']'}"
    if low is not None:
        return f"at least {low:g}" if minimum is not None else f"more than {low:g}"
    return f"at most {high:g}" if maximum is not None else f"less than {high:g}"


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
