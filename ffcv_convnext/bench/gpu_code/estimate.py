"""Estimate times from counted bytes and operations: a roofline, not a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Parts of the data sheets' figures that a good kernel reaches. Assumptions, not measurements.
BANDWIDTH_EFFICIENCY = 0.83
PRODUCT_EFFICIENCY = 0.6


@dataclass(frozen=True, slots=True)
class Device:
    """Figures of a vendor's data sheet: bytes/s of its memory, dense bf16 operations/s of its tensor cores."""

    name: str
    bytes_per_s: float
    flops_per_s: float


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM; bf16 without sparsity.
DEVICES = (
    Device("A100", 2.039e12, 312e12),
    Device("H100", 3.35e12, 989.4e12),
    Device("H200", 4.8e12, 989.4e12),
)


def seconds(launch: Mapping[str, Any], device: Device) -> float:
    """Estimate a launch: the longer of moving its tensors once and computing its products."""
    moved = launch["bytes"] + launch["product_bytes"]
    estimated: float = max(
        moved / (device.bytes_per_s * BANDWIDTH_EFFICIENCY),
        launch["flops"] / (device.flops_per_s * PRODUCT_EFFICIENCY),
    )
    return estimated


def is_product(launch: Mapping[str, Any]) -> bool:
    """Return whether a launch is a library's matrix product, or a kernel that contains one."""
    return bool(launch["kind"] == "product" or launch["product_bytes"] > 0)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a phase's launches; ms by device: estimated time in all and of the matrix products alone."""

    launches: int
    bytes: int
    product_launches: int
    product_bytes: int
    flops: int
    ms: dict[str, float]
    product_ms: dict[str, float]


def totals(launches: Iterable[Mapping[str, Any]]) -> Totals:
    """Return the sums. launches: as in the result of `capture.py`."""
    every = list(launches)
    products = [each for each in every if is_product(each)]
    return Totals(
        launches=sum(each["num"] for each in every),
        bytes=sum(each["bytes"] for each in every),
        product_launches=sum(each["num"] for each in products),
        product_bytes=sum(each["product_bytes"] for each in products),
        flops=sum(each["flops"] for each in every),
        ms={d.name: 1e3 * sum(seconds(each, d) for each in every) for d in DEVICES},
        product_ms={d.name: 1e3 * sum(seconds({**each, "bytes": 0}, d) for each in products) for d in DEVICES},
    )
