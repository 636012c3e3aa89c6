"""The figures of generated code as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ffcv_convnext.bench.gpu_code.estimate import (
    BANDWIDTH_EFFICIENCY,
    DEVICES,
    PRODUCT_EFFICIENCY,
    Totals,
    totals,
)
from ffcv_convnext.bench.gpu_code.run import Figures
from ffcv_convnext.formatting import markdown_table

NOTE = (
    "ESTIMATE, not a measurement: no GPU ran any of this. Bytes count every tensor of a kernel once; times are the "
    f"longer of bytes at {100 * BANDWIDTH_EFFICIENCY:.0f} % of the data sheet's bandwidth and operations at "
    f"{100 * PRODUCT_EFFICIENCY:.0f} % of its dense bf16 rate, launch by launch. The loader, the host and "
    "the time of a launch itself are not included."
)


@dataclass(frozen=True, slots=True)
class GpuCode:
    """The figures of one config's step, for each choice of kernels: "torch", "triton"."""

    config: str
    arch: str
    batch_size: int
    size: int
    versions: dict[str, str]
    paths: dict[str, Figures]

    def totals(self) -> dict[str, dict[str, Totals]]:
        """Return each path's phases with their sums, and "sum": all of them. A phase with an error is left out."""
        found: dict[str, dict[str, Totals]] = {}
        for path, phases in self.paths.items():
            good = {name: phase["launches"] for name, phase in phases.items() if not phase["error"]}
            found[path] = {name: totals(launches) for name, launches in good.items()}
            if len(good) == len(phases):
                found[path]["sum"] = totals(launch for launches in good.values() for launch in launches)
        return found

    def images_per_s(self, path: str) -> dict[str, float] | None:
        """Return the estimated rate on each device; None if a phase has an error."""
        step = self.totals()[path].get("sum")
        return None if step is None else {name: 1e3 * self.batch_size / ms for name, ms in step.ms.items()}

    def to_json(self) -> str:
        """Return all figures as JSON: sums, launches, kernels."""
        sums = {path: {name: asdict(each) for name, each in phases.items()} for path, phases in self.totals().items()}
        rates = {path: self.images_per_s(path) for path in self.paths}
        content = {"note": NOTE, **asdict(self), "totals": sums, "images_per_s": rates}
        return json.dumps(content, indent=1)

    def format(self) -> str:
        """Return Markdown."""
        facts = [f"{name} {version}" for name, version in self.versions.items()]
        lines = [
            f"Generated code of {self.config}: {self.arch}, batch {self.batch_size}, {self.size} pixels; "
            + ", ".join(facts),
            "",
            NOTE,
            "",
            self._phases(),
        ]
        for path, phases in self.paths.items():
            lines += [f"\n{path}, {name}: {p['error']}" for name, p in phases.items() if p["error"]]
        lines += ["", self._estimates()]
        for path, phases in self.paths.items():
            if bad := self._conspicuous(phases):
                lines += ["", f"Kernels of --kernels {path} with spills or float64:", "", bad]
        if (ratio := self.ratio()) is not None:
            lines += [
                "",
                f"triton / torch, all phases: {ratio[0]:.2f} of the bytes, {ratio[1]:.2f} of the launches",
            ]
        return "\n".join(lines)

    def ratio(self) -> tuple[float, float] | None:
        """Return triton's bytes (without matrix products) and launches over torch's; None without both."""
        sums = self.totals()
        both = [sums.get(path, {}).get("sum") for path in ("triton", "torch")]
        if both[0] is None or both[1] is None:
            return None
        return both[0].bytes / both[1].bytes, both[0].launches / both[1].launches

    def _phases(self) -> str:
        header = (
            "kernels", "phase", "launches", "GB", "products", "GB of products", "TFLOP", "H100 ms", "of it products",
            "code of", "max registers", "max spilled bytes", "max shared kB", "max float64",
        )  # fmt: skip
        rows = []
        for path, sums in self.totals().items():
            for name, total in sums.items():
                kernels = self.paths[path][name]["kernels"] if name != "sum" else all_kernels(self.paths[path])
                rows.append(
                    (
                        path,
                        name,
                        str(total.launches),
                        f"{total.bytes / 1e9:.3f}",
                        str(total.product_launches),
                        f"{total.product_bytes / 1e9:.3f}",
                        f"{total.flops / 1e12:.3f}",
                        f"{total.ms['H100']:.3f}",
                        f"{total.product_ms['H100']:.3f}",
                        *_worst(kernels),
                    )
                )
        return markdown_table(header, rows, "<<" + ">" * 12)

    def _estimates(self) -> str:
        header = ("ESTIMATE", "TB/s", "TFLOP/s", "kernels", *self.phase_names(), "sum ms", "images/s")
        rows = []
        for device in DEVICES:
            for path, sums in self.totals().items():
                rate = self.images_per_s(path)
                rows.append(
                    (
                        device.name,
                        f"{device.bytes_per_s * BANDWIDTH_EFFICIENCY / 1e12:.2f}",
                        f"{device.flops_per_s * PRODUCT_EFFICIENCY / 1e12:.0f}",
                        path,
                        *(f"{sums[n].ms[device.name]:.3f}" if n in sums else "-" for n in self.phase_names()),
                        f"{sums['sum'].ms[device.name]:.2f}" if "sum" in sums else "-",
                        f"{rate[device.name]:.0f}" if rate else "-",
                    )
                )
        return markdown_table(header, rows, "<>><" + ">" * (2 + len(self.phase_names())))

    def phase_names(self) -> list[str]:
        """Return the names of the phases."""
        return list(next(iter(self.paths.values())))

    def _conspicuous(self, phases: Figures) -> str:
        rows = [
            (
                name,
                k["name"][:60],
                k["config"],
                *(str(k[each]) for each in ("warps", "registers", "spilled_bytes", "shared_bytes", "float64")),
            )
            for name, phase in phases.items()
            for k in phase["kernels"]
            if k["spilled_bytes"] or k["float64"]
        ]
        header = ("phase", "kernel", "configuration", "warps", "registers", "spilled bytes", "shared bytes", "float64")
        return markdown_table(header, rows, "<<<>>>>>") if rows else ""


def all_kernels(phases: Figures) -> list[Mapping[str, Any]]:
    """Return the compiled kernels of all phases."""
    return [kernel for phase in phases.values() for kernel in phase["kernels"]]


def _worst(kernels: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the cells: number of kernels, then the largest figures; '-' if nothing was compiled."""
    if not kernels:
        return ("-",) * 5
    largest = {each: max(k[each] for k in kernels) for each in ("registers", "spilled_bytes", "float64")}
    return (
        str(len({k["name"] for k in kernels})),
        str(largest["registers"]),
        str(largest["spilled_bytes"]),
        f"{max(k['shared_bytes'] for k in kernels) / 1e3:.1f}",
        str(largest["float64"]),
    )


LADDER_HEADER = (
    "step", "kernels", "GB", "launches", "GB of products", "TFLOP", "max spilled bytes",
    *(f"{d.name} ms" for d in DEVICES), *(f"{d.name} images/s" for d in DEVICES),
)  # fmt: skip


def ladder_rows(found: GpuCode) -> list[tuple[str, ...]]:
    """Return a row for each choice of kernels, for the columns of LADDER_HEADER."""
    rows = []
    for path, sums in found.totals().items():
        step, rate = sums.get("sum"), found.images_per_s(path)
        if step is None or rate is None:
            error = next(phase["error"] for phase in found.paths[path].values() if phase["error"])
            rows.append((found.config, path, error, *("-" for _ in LADDER_HEADER[3:])))
            continue
        rows.append(
            (
                found.config,
                path,
                f"{step.bytes / 1e9:.3f}",
                str(step.launches),
                f"{step.product_bytes / 1e9:.3f}",
                f"{step.flops / 1e12:.3f}",
                _worst(all_kernels(found.paths[path]))[2],
                *(f"{step.ms[d.name]:.2f}" for d in DEVICES),
                *(f"{rate[d.name]:.0f}" for d in DEVICES),
            )
        )
    return rows
