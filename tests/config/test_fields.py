"""Settings of any dataclass: types, ranges, switches, required values, defaults that depend on the machine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from ffcv_convnext.config import add_setting_flags, check_ranges, collect_settings, setting, settings_from_args


@dataclass(frozen=True, kw_only=True, slots=True)
class Baking:
    """How to bake."""

    flour: str = setting(help="kind of flour")
    heat: int | Literal["off"] = setting(180, "degrees", minimum=50, maximum=250)
    share: float | None = setting(None, "share of water", above=0, below=1)
    part: tuple[int, int] | None = setting(None, "part of the dough", example="0/8", minimum=0)
    cooks: int = setting(factory=lambda: 7, help="number of cooks", minimum=1)
    salted: bool = setting(False, "add salt", switch=True)

    def __post_init__(self) -> None:
        check_ranges(self)


SETTINGS = collect_settings({"baking": Baking})


def bake(*words: str) -> Baking:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_setting_flags(parser, {"baking": Baking})
    given, _ = settings_from_args(parser, words, SETTINGS)
    return Baking(**{name: SETTINGS[name].parse(raw) for name, raw in given.items()})


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ((), "flour", "rye"),
        ((), "cooks", 7),
        (("--heat", "off"), "heat", "off"),
        (("--heat", "200"), "heat", 200),
        (("--share", "0.5"), "share", 0.5),
        (("--share", "none"), "share", None),
        (("--part", "3/8"), "part", (3, 8)),
        (("--part", "3", "8"), "part", (3, 8)),
        (("--salted",), "salted", True),
        ((), "salted", False),
    ],
)
def test_values_are_parsed_by_type(words: tuple[str, ...], name: str, expected: Any) -> None:
    assert getattr(bake("--flour", "rye", *words), name) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--heat", "40"), "heat = 40: expected a whole number in [50, 250] or off"),
        (("--heat", "warm"), "heat = warm: expected a whole number in [50, 250] or off"),
        (("--share", "1"), "share = 1.0: expected a number in (0, 1) or none"),
        (("--part", "-1/8"), "part = -1/8: expected 2 whole numbers >= 0 or none, e.g. 0/8"),
        (("--cooks", "0"), "cooks = 0: expected a whole number >= 1"),
    ],
)
def test_an_error_names_setting_value_and_range(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        bake("--flour", "rye", *(f"{words[0]}={word}" for word in words[1:]))
    assert str(caught.value) == message


def test_a_missing_required_setting_is_named_after_unknown_options() -> None:
    with pytest.raises(ValueError, match="--flour is required; expected text"):
        bake("--cooks", "2")
    with pytest.raises(ValueError, match=r"unknown option '--flower'; did you mean --flour\?"):
        bake("--flower", "rye")


def test_help_has_ranges_and_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser, {"baking": Baking})
    shown = " ".join(parser.format_help().split())
    assert "kind of flour (text; required)" in shown
    assert "number of cooks (a whole number >= 1; default 7)" in shown
    assert "part of the dough (2 whole numbers >= 0 or none, e.g. 0/8; default none)" in shown
    assert "add salt" in shown
