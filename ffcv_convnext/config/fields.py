"""What a setting is: its type, range and explanation, and how its value is written on the command line and in YAML."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Bounds:
    """Range of a number: `minimum` and `maximum` belong to it, `above` and `below` do not."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def contain(self, number: float) -> bool:
        """Return whether a number is inside."""
        return (
            (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def describe(self) -> str:
        """Return ' >= 1', ' in [0, 1)' and so on; '' without bounds."""
        low = self.above if self.minimum is None else self.minimum
        high = self.below if self.maximum is None else self.maximum
        if low is not None and high is not None:
            return f" in {'(' if self.minimum is None else '['}{low}, {high}{')' if self.maximum is None else ']'}"
        if low is not None:
            return f" {'>' if self.minimum is None else '>='} {low}"
        return "" if high is None else f" {'<' if self.maximum is None else '<='} {high}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A declared setting: the dataclass it belongs to is its group."""

    name: str
    group: str
    type: Any
    default: Any  # MISSING: a value is required
    help: str
    free: bool
    aliases: Mapping[str, str]
    bounds: Bounds
    example: str
    switch: bool

    def parse(self, raw: Any) -> Any:
        """Convert a command-line string or a YAML value to this setting's type; `check_ranges` checks its range."""
        word = ",".join(map(str, raw)) if isinstance(raw, list | tuple) else format_value(raw).strip()
        try:
            return _parse(self.type, self.aliases.get(word.lower(), word))
        except ValueError:
            raise ValueError(f"{self.name} = {word}: expected {self.words}") from None

    @property
    def holds_several(self) -> bool:
        """Whether the value is several numbers, which a command line may separate by spaces."""
        return any(get_origin(kind) is tuple for kind in (self.type, *get_args(self.type)))

    @property
    def words(self) -> str:
        """The accepted values, for help texts and errors."""
        return _describe(self.type, self.bounds) + (f", e.g. {self.example}" if self.example else "")


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    factory: Any = MISSING,
    free: bool = False,
    aliases: Mapping[str, str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    example: str = "",
    switch: bool = False,
) -> Any:
    """Declare a dataclass field with its explanation and its range.

    default: left out for a required setting.   factory: computes a default that depends on the machine.
    free: may differ between the parts of one interrupted run, because it does not change what is computed.
    aliases: other spellings of a value, e.g. {"true": "post"}.
    minimum, maximum: smallest and largest value.   above, below: the same, exclusive.   `check_ranges` enforces them,
    for each number of a tuple.
    example: a value to show in help texts and errors.   switch: the flag takes no value and means true.
    """
    metadata = {
        "help": help,
        "free": free,
        "aliases": aliases or {},
        "bounds": Bounds(minimum, maximum, above, below),
        "example": example,
        "switch": switch,
    }
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def collect_settings(groups: Mapping[str, type]) -> dict[str, Setting]:
    """Return the settings that dataclasses declare with `setting()`, by name."""
    settings: dict[str, Setting] = {}
    for group, cls in groups.items():
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if "help" not in field.metadata:
                continue
            assert field.name not in settings, f"two settings are called {field.name}"
            factory = field.default_factory
            default = field.default if factory is MISSING else factory()
            settings[field.name] = Setting(
                name=field.name, group=group, type=hints[field.name], default=default, **field.metadata
            )
    return settings


def check_ranges(settings: Any) -> None:
    """Raise ValueError if a number in this dataclass is outside the range that its `setting()` declares."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, int | float)]
        bounds = field.metadata.get("bounds", Bounds())
        if not all(map(bounds.contain, numbers)):
            declared = collect_settings({"": type(settings)})[field.name]
            raise ValueError(f"{field.name} = {format_value(value)}: expected {declared.words}")


def to_plain(value: Any) -> Any:
    """Return a setting's value as YAML and JSON can hold it; `Setting.parse` reads it back."""
    if isinstance(value, tuple):
        return ("-" if isinstance(value[0], int) else ",").join(str(x) for x in value)
    return str(value) if isinstance(value, Path) else value


def format_value(value: Any) -> str:
    """Return a setting's value as a user writes it."""
    plain = to_plain(value)
    if isinstance(plain, bool):
        return str(plain).lower()
    return "none" if plain is None else str(plain)


def nearest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return '; did you mean a, b or c?' for an unknown name, or '' if no known name is similar.

    prefix: written before each name, e.g. '--'.
    """
    close = [prefix + match for match in difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)]
    if not close:
        return ""
    *others, last = close
    return f"; did you mean {', '.join(others)} or {last}?" if others else f"; did you mean {last}?"


def _parse(kind: Any, word: str) -> Any:
    """Parse one word. Raises ValueError."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        kinds = get_args(kind)
        if type(None) in kinds and word.lower() in ("none", "null", ""):
            return None
        for each in kinds:
            try:
                return _parse(each, word)
            except ValueError:
                continue
        raise ValueError
    if origin is Literal:
        for choice in get_args(kind):
            if word.lower() == str(choice):
                return choice
        raise ValueError
    if origin is tuple:
        kinds = get_args(kind)
        separator = r"\s*[-,/]\s*|\s+" if kinds[0] is int else r"\s*,\s*|\s+"
        words = re.split(separator, word.strip("[]() "))
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(words)
        return tuple(_parse(k, w) for k, w in zip(kinds, words, strict=True))
    if kind is type(None):
        raise ValueError
    if kind is bool:
        if word.lower() not in ("true", "false"):
            raise ValueError
        return word.lower() == "true"
    if kind is Path:
        return Path(word).expanduser()
    value = kind(word)
    if kind is float and not math.isfinite(value):
        raise ValueError
    return value


def _describe(kind: Any, bounds: Bounds) -> str:
    origin, kinds = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(each, bounds) for each in kinds)
    if origin is Literal:
        return ("one of " if len(kinds) > 1 else "") + ", ".join(str(choice) for choice in kinds)
    if origin is tuple:
        count = "" if kinds[-1] is Ellipsis else f"{len(kinds)} "
        return f"{count}{'whole ' if kinds[0] is int else ''}numbers{bounds.describe()}"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + bounds.describe()
    return {type(None): "none", bool: "true or false", str: "text", Path: "a path"}[kind]
