"""Settings from YAML files: lines `name: value`, and `base:` for the file to start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ffcv_convnext.config.train import Config, find_setting


class _StrictLoader(yaml.SafeLoader):
    """Refuse a name that occurs twice in a mapping: YAML drops the first one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"'{name}' occurs twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of lines `name: value`. Raises ValueError if it is not one."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise ValueError(f"{path} is not readable YAML: {' '.join(str(error).split())[:500]}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines of the form 'name: value'")
    return {str(name): value for name, value in content.items()}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings in a YAML file and in its `base:` (a path relative to the file), which it overrides.

    Raises FileNotFoundError, or ValueError for an unreadable file, an unknown name, a bad value or a cycle of bases.
    """
    chain: list[Path] = []
    merged: dict[str, Any] = {}
    current: Path | None = Path(path)
    while current is not None:
        if not current.is_file():
            named_by = f" (the base of {chain[-1]})" if chain else ""
            raise FileNotFoundError(f"config {current} does not exist{named_by}")
        if current.resolve() in [p.resolve() for p in chain]:
            raise ValueError(f"{current}: cycle of bases: {' -> '.join(map(str, [*chain, current]))}")
        chain.append(current)
        content = read_mapping(current)
        base = content.pop("base", None)
        try:
            for name, raw in content.items():
                find_setting(name).parse(raw)
        except ValueError as error:
            raise ValueError(f"{current}: {error}") from None
        merged = content | merged
        current = None if base is None else current.parent / str(base)
    return merged


def load_config(*paths: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the config: defaults < each YAML file in turn (its bases first) < `overrides`."""
    values: dict[str, Any] = {}
    for path in paths:
        values |= read_yaml(path)
    return Config.from_flat({**values, **(overrides or {})})
