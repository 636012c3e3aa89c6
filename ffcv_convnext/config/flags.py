"""One flag for each setting."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffcv_convnext.config.fields import Setting, collect_settings, format_value, nearest
from ffcv_convnext.config.papers_flags import translate_papers_flags
from ffcv_convnext.config.train import GROUPS, SETTINGS, Config
from ffcv_convnext.config.yaml_files import load_config
from ffcv_convnext.errors import complain


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and a flag for every setting of a run, grouped, with default and explanation."""
    parser.usage = "%(prog)s [--config YAML ...] [--SETTING VALUE ...]"
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="YAML",
        help="read settings from files; a later file overrides an earlier one, a flag overrides both",
    )
    add_setting_flags(parser, GROUPS)


def add_setting_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type]) -> None:
    """Add a flag for every setting of some dataclasses. The namespace holds only the flags that were given.

    groups: title of a section of the help -> dataclass with fields declared by `setting()`.
    """
    settings = collect_settings(groups)
    for group, cls in groups.items():
        section = parser.add_argument_group(group, (cls.__doc__ or "").splitlines()[0])
        for declared in (s for s in settings.values() if s.group == group):
            takes: dict[str, Any] = {"action": "store_true"}
            if not declared.switch:
                takes = {"metavar": "VALUE", "nargs": "+" if declared.holds_several else None}
            section.add_argument(f"--{declared.name}", default=argparse.SUPPRESS, help=_help_text(declared), **takes)


def _help_text(declared: Setting) -> str:
    if declared.switch:
        return declared.help.replace("%", "%%")
    required = declared.default is dataclasses.MISSING
    default = "required" if required else f"default {format_value(declared.default)}"
    return f"{declared.help} ({declared.words}; {default})".replace("%", "%%")


def settings_from_args(
    parser: argparse.ArgumentParser, argv: Sequence[str], settings: Mapping[str, Setting] = SETTINGS
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Return the settings that a command line states, unparsed, and the whole namespace.

    A run's settings may be written with the flags of the paper's code; a line on stderr explains each of them.
    Raises ValueError for an unknown option, with the most similar ones, and for a required setting that is missing.
    """
    if settings is SETTINGS:
        argv, notes = translate_papers_flags(argv)
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, only one writes
            for note in notes:
                complain(note, 0)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        if not word.startswith("-"):
            raise ValueError(f"unexpected argument '{word}'; options are written --NAME VALUE")
        known = [flag[2:] for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise ValueError(f"unknown option '{word}'{nearest(word.lstrip('-'), known, prefix='--')}")
    given = {name: getattr(namespace, name) for name in settings if hasattr(namespace, name)}
    for name, declared in settings.items():
        if declared.default is dataclasses.MISSING and name not in given:
            raise ValueError(f"--{name} is required; expected {declared.words}")
    return given, namespace


def config_from_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Return the config that a command line describes, and the whole namespace; raises as `settings_from_args`."""
    overrides, namespace = settings_from_args(parser, argv)
    return load_config(*namespace.config, overrides=overrides), namespace
