"""The images that a timm model was made for: size, normalisation and evaluation crop of its configuration in timm."""

from __future__ import annotations

from typing import Any

TIMM_IMAGES = ("input_size", "mean", "std", "crop_pct", "eval_interpolation", "eval_resize")


def timm_images(model: str) -> dict[str, Any]:
    """Return the settings TIMM_IMAGES of a model by its `pretrained_cfg` in timm; {} if it has none.

    Importing timm takes seconds.
    Raises ValueError for a model of images that are not square or not RGB.
    """
    from timm.models import get_pretrained_cfg, is_model

    found = get_pretrained_cfg(model) if is_model(model) else None
    if found is None:
        return {}
    channels, height, width = found.input_size
    if channels != 3 or height != width:
        raise ValueError(f"model = {model}: it takes images of {channels} x {height} x {width}; expected square RGB")
    settings = {
        "input_size": height,
        "mean": tuple(map(float, found.mean)),
        "std": tuple(map(float, found.std)),
        "crop_pct": float(found.crop_pct),
        "eval_interpolation": found.interpolation,
    }
    resize = {"center": "crop", "squash": "warp"}.get(found.crop_mode)  # timm's third, border, has no counterpart
    return settings if resize is None else {**settings, "eval_resize": resize}


def fixed_size(model: str) -> int | None:
    """Return the side of the only images that a timm model accepts, in pixels; None if it accepts several sizes."""
    from timm.models import get_pretrained_cfg, is_model

    found = get_pretrained_cfg(model) if is_model(model) else None
    return found.input_size[-1] if found is not None and found.fixed_input_size else None
