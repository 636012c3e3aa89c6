"""Grammar of the `aa` policy strings: the operations, their probabilities and magnitudes. Plain data.

The grammar and the operations' names are those of timm's auto_augment.py, so a timm recipe has the same meaning
here. Sources: RandAugment (Cubuk et al. 2019, arXiv:1909.13719), AutoAugment (Cubuk et al. 2018, arXiv:1805.09501),
3-Augment (Touvron et al. 2022, arXiv:2204.07118), TrivialAugment (Mueller and Hutter 2021, arXiv:2103.10158).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

GRAMMAR = (
    "expected none, or rand (RandAugment) with any of -m<magnitude, integer, 10> -n<operations an image, 2> "
    "-p<probability of each, 0.5> -mstd<standard deviation of the magnitude, 0; above 100: uniform from 0 to m> "
    "-mmax<largest magnitude, 10> -inc<0 or 1: strength rises with magnitude, 0> -t<weights, 3a or 3aw> or -w0 "
    "(weighted choice); or v0, v0r, original, originalr, 3a with or without -mstd<..>; or ta_wide. "
    "The recipe's is rand-m9-mstd0.5-inc1"
)
FULL_MAGNITUDE = 10.0  # the magnitude at which an operation has its nominal strength
NUM_WIDE_LEVELS = 31  # TrivialAugment's strengths of an operation, 0 to 30


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a policy: its name, the probability to apply it, its magnitude."""

    name: str
    prob: float
    magnitude: float


@dataclass(frozen=True, slots=True)
class Policy:
    """Each image gets `num_draws` of the sequences, in the order drawn, and all steps of each sequence in order.

    sequences: of equal length, drawn with equal probability and with replacement.   weights: if set, probabilities of
    the sequences, which sum to 1; they are then drawn without replacement.
    magnitude_std: of a normal distribution around a step's magnitude; inf: uniform from 0 to it.
    magnitude_max: larger magnitudes are clipped to it.   wide: magnitudes are TrivialAugment's levels instead.
    """

    sequences: tuple[tuple[Step, ...], ...]
    num_draws: int = 1
    weights: tuple[float, ...] | None = None
    magnitude_std: float = 0.0
    magnitude_max: float = FULL_MAGNITUDE
    wide: bool = False


_RAND = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
_INCREASING = {
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
}  # those with an increasing version
_RAND_INCREASING = tuple(f"{name}Increasing" if name in _INCREASING else name for name in _RAND)

# -w0 of timm up to 0.6, by position in the list; later versions have -tweights only.
_W0 = {
    "Rotate": 0.3, "ShearX": 0.2, "ShearY": 0.2, "TranslateXRel": 0.1, "TranslateYRel": 0.1, "Color": 0.025,
    "Sharpness": 0.025, "AutoContrast": 0.025, "Solarize": 0.005, "SolarizeAdd": 0.005, "Contrast": 0.005,
    "Brightness": 0.005, "Equalize": 0.005,
}  # fmt: skip
_SETS: dict[str, dict[str, float]] = {
    "weights": {
        "Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
    "3aw": {
        "SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2,
        "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1,
        "ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1,
    },
}  # fmt: skip
_SET_3A = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")

# ImageNet's policies: name, probability, magnitude of each step. v0 is from the EfficientNet code for TPUs.
_V0 = """
    Equalize .8 1, ShearY .8 4;    Color .4 9, Equalize .6 3;     Color .4 1, Rotate .6 8
    Solarize .8 3, Equalize .4 7;  Solarize .4 2, Solarize .6 2;  Color .2 0, Equalize .8 8
    Equalize .4 8, SolarizeAdd .8 3;  ShearX .2 9, Rotate .6 8;   Color .6 1, Equalize 1 2
    Invert .4 9, Rotate .6 0;      Equalize 1 9, ShearY .6 3;     Color .4 7, Equalize .6 0
    Posterize .4 6, AutoContrast .4 7;  Solarize .6 8, Color .6 9;  Solarize .2 4, Rotate .8 9
    Rotate 1 7, TranslateYRel .8 9;  ShearX 0 0, Solarize .8 4;   ShearY .8 0, Color .6 4
    Color 1 0, Rotate .6 2;        Equalize .8 4, Equalize 0 8;   Equalize 1 4, AutoContrast .6 2
    ShearY .4 7, SolarizeAdd .6 7; Posterize .8 2, Solarize .6 10;  Solarize .6 8, Equalize .6 1
    Color .8 6, Rotate .4 5
"""
_ORIGINAL = """
    PosterizeOriginal .4 8, Rotate .6 9;    Solarize .6 5, AutoContrast .6 5;  Equalize .8 8, Equalize .6 3
    PosterizeOriginal .6 7, PosterizeOriginal .6 6;  Equalize .4 7, Solarize .2 4;  Equalize .4 4, Rotate .8 8
    Solarize .6 3, Equalize .6 7;           PosterizeOriginal .8 5, Equalize 1 2;   Rotate .2 3, Solarize .6 8
    Equalize .6 8, PosterizeOriginal .4 6;  Rotate .8 8, Color .4 0;           Rotate .4 9, Equalize .6 2
    Equalize 0 7, Equalize .8 8;            Invert .6 4, Equalize 1 8;         Color .6 4, Contrast 1 8
    Rotate .8 8, Color 1 2;                 Color .8 8, Solarize .8 7;         Sharpness .4 7, Invert .6 8
    ShearX .6 5, Equalize 1 9;              Color .4 0, Equalize .6 3;         Equalize .4 7, Solarize .2 4
    Solarize .6 5, AutoContrast .6 5;       Invert .6 4, Equalize 1 8;         Color .6 4, Contrast 1 8
    Equalize .8 8, Equalize .6 3
"""
_SEQUENCES = {
    "v0": _V0,
    "v0r": _V0.replace("Posterize", "PosterizeIncreasing"),
    "original": _ORIGINAL,
    "originalr": _ORIGINAL.replace("PosterizeOriginal", "PosterizeIncreasing"),
    "3a": "Solarize 1 5; Desaturate 1 10; GaussianBlurRand 1 10",
}
_WIDE = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


def parse_policy(text: str) -> Policy:
    """Parse a policy string. Raises ValueError with the problem and the grammar."""
    try:
        return _parse(text)
    except ValueError as error:
        raise ValueError(f"aa = {text}: {error}; {GRAMMAR}") from None


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _parse(text: str) -> Policy:
    name, *sections = text.split("-")
    _require(name != "augmix", "AugMix is not available on the device")
    settings = _settings(sections)
    _require(name in ("rand", "ta_wide", *_SEQUENCES), f"unknown policy {name or 'without a name'}")
    allowed = {"rand": ("m", "n", "p", "mstd", "mmax", "inc", "t", "w"), "ta_wide": ()}.get(name, ("mstd",))
    for key in settings:
        _require(key in allowed, f"unknown section {key} of {name}")
    if name == "rand":
        return _rand(settings)
    if name == "ta_wide":
        return Policy(tuple((Step(each, 1.0, 0.0),) for each in _WIDE), wide=True)
    sequences = tuple(
        tuple(Step(each, float(prob), float(magnitude)) for each, prob, magnitude in map(str.split, steps.split(",")))
        for steps in re.split(r"[;\n]", _SEQUENCES[name].strip())
    )
    return Policy(sequences, magnitude_std=_number(settings, "mstd", 0.0))


def _settings(sections: list[str]) -> dict[str, str]:
    """Split sections into key -> value: letters and a number, or t and a name."""
    found: dict[str, str] = {}
    for section in sections:
        match = re.fullmatch(r"(t)(.+)|([a-z]+)(\d.*)", section)
        if match is None:
            raise ValueError(f"unknown section {section!r}")
        key, value = (each for each in match.groups() if each is not None)
        _require(key not in found, f"section {key} occurs twice")
        found[key] = value
    return found


def _number(settings: dict[str, str], key: str, default: float) -> float:
    value = settings.get(key)
    if value is None:
        return default
    _require(bool(re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", value)), f"{key}{value} is not a number")
    return float(value)


def _integer(settings: dict[str, str], key: str, default: float) -> float:
    value = settings.get(key, "0")
    _require(bool(re.fullmatch(r"\d+", value)), f"{key}{value} is not an integer")
    return float(settings.get(key, default))


def _rand(settings: dict[str, str]) -> Policy:
    names: tuple[str, ...] = _RAND_INCREASING if _integer(settings, "inc", 0) else _RAND
    shares: tuple[float, ...] | None = None
    if "w" in settings:
        _require("t" not in settings, "w and t cannot be combined")
        _require(settings["w"] == "0", f"unknown weights w{settings['w']}")
        weighted = {each: _W0[plain] for each, plain in zip(names, _RAND, strict=True) if plain in _W0}
        names, shares = tuple(weighted), tuple(weighted.values())
    elif settings.get("t") == "3a":
        names = _SET_3A
    elif "t" in settings:
        _require(settings["t"] in _SETS, f"unknown set of operations t{settings['t']}")
        names, shares = tuple(_SETS[settings["t"]]), tuple(_SETS[settings["t"]].values())
    num_draws, prob = int(_integer(settings, "n", 2)), _number(settings, "p", 0.5)
    largest, std = _integer(settings, "mmax", FULL_MAGNITUDE), _number(settings, "mstd", 0.0)
    _require(num_draws >= 1, f"n{num_draws} is not a number of operations")
    _require(shares is None or num_draws <= len(names), f"n{num_draws} of {len(names)} weighted operations")
    _require(prob <= 1, f"p{settings.get('p')} is not a probability")
    _require(largest >= 1, "mmax0 leaves no magnitude")
    magnitude = _integer(settings, "m", FULL_MAGNITUDE)
    return Policy(
        tuple((Step(each, prob, magnitude),) for each in names),
        num_draws=num_draws,
        weights=None if shares is None else tuple(share / math.fsum(shares) for share in shares),
        magnitude_std=math.inf if std > 100 else std,
        magnitude_max=largest,
    )
