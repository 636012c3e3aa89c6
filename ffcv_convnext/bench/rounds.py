"""Contestants in processes of their own, run in turn.

A shared machine's speed drifts by 20-30 % within minutes, so only ratios of runs that alternate mean anything. Every
contestant lives in a process of its own, since loaders set process-wide thread counts and numba options; the parent
lets one at a time work, round after round.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Work = Callable[[], int]  # does a round's work and returns how many images that were


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant's result. Rates are images/s over all cores used."""

    name: str
    median: float
    least: float
    most: float
    ratio: float | None  # median of the ratios to the reference, round by round
    ratio_least: float | None
    ratio_most: float | None
    first_batch_s: float  # from process start
    peak_mb: float  # largest resident memory, all its processes together
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison and the machine it ran on."""

    title: str
    reference: str
    facts: dict[str, Any]
    rows: list[Row]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def format(self) -> str:
        """A Markdown table, the facts above it."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        cores = self.facts["cores"]
        lines = [
            f"{self.title}: {facts}",
            "",
            f"| loader | images/s | min-max | a core | times {self.reference} | min-max | first batch s | peak MB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in self.rows:
            if row.error:
                lines.append(f"| {row.name} | failed: {row.error} | | | | | | |")
                continue
            ratios = (
                ("-", "-") if row.ratio is None else (f"{row.ratio:.2f}", f"{row.ratio_least:.2f}-{row.ratio_most:.2f}")
            )
            lines.append(
                f"| {row.name} | {row.median:.0f} | {row.least:.0f}-{row.most:.0f} | {row.median / cores:.0f} "
                f"| {ratios[0]} | {ratios[1]} | {row.first_batch_s:.1f} | {row.peak_mb:.0f} |"
            )
        return "\n".join(lines)


def compare(
    title: str,
    contestants: Sequence[tuple[str, str, dict[str, Any]]],
    *,
    reference: str,
    rounds: int,
    facts: dict[str, Any],
    say: Callable[[str], None],
) -> Comparison:
    """Run contestants in turn, `rounds` times each after one round of warm-up.

    contestants: (name, "module:function", arguments); the function takes the arguments as keywords and returns the
    Work of a round. One that fails becomes a row with its error; the others go on.
    """
    processes: dict[str, _Contestant] = {}
    try:
        for name, function, arguments in contestants:
            say(f"starting {name}")
            processes[name] = _Contestant(name, function, arguments)
        for number in range(rounds):
            for contestant in processes.values():
                contestant.round()
            rates = ", ".join(f"{c.name} {c.rates[-1]:.0f}" for c in processes.values() if not c.error)
            say(f"round {number + 1}/{rounds}: {rates} images/s")
    finally:
        for contestant in processes.values():
            contestant.stop()
    base = processes[reference].rates
    facts = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        **facts,
    }
    return Comparison(title, reference, facts, [contestant.row(base) for contestant in processes.values()])


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class _Contestant:
    """The parent's side: one line of JSON in, one out, for each round."""

    def __init__(self, name: str, function: str, arguments: dict[str, Any]) -> None:
        self.name = name
        self.rates: list[float] = []
        self.error: str | None = None
        self.first_batch_s = self.peak_mb = 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, function, json.dumps(arguments), str(time.time())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = self._answer()
        self.first_batch_s = answer.get("first_batch_s", 0.0)

    def round(self) -> None:
        if self.error:
            return
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        if not self.error:
            self.rates.append(answer["images"] / answer["seconds"])
            self.peak_mb = answer["peak_mb"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # a library may print to stdout as well
                answer: dict[str, Any] = json.loads(line)
                self.error = answer.get("error")
                return answer
        self.error = f"its process ended with status {self.process.wait()}"
        return {}

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def row(self, base: Sequence[float]) -> Row:
        if self.error or not self.rates:
            return Row(self.name, 0, 0, 0, None, None, None, self.first_batch_s, 0, self.error or "no round was run")
        ratios = [ours / theirs for ours, theirs in zip(self.rates, base, strict=False)]
        return Row(
            name=self.name,
            median=statistics.median(self.rates),
            least=min(self.rates),
            most=max(self.rates),
            ratio=statistics.median(ratios) if ratios else None,
            ratio_least=min(ratios) if ratios else None,
            ratio_most=max(ratios) if ratios else None,
            first_batch_s=self.first_batch_s,
            peak_mb=self.peak_mb,
        )


def _family(pid: int) -> list[int]:
    """A process and its children, theirs too."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(member for child in children for member in _family(child))]


def _peak_mb() -> float:
    """Largest resident memory of this process and its children so far, summed, MB."""
    total = 0.0
    for pid in _family(os.getpid()):
        status = Path(f"/proc/{pid}/status").read_text()
        total += next((float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0.0)
    return total / 1024


_SERVE = f"import sys; from {__name__} import serve; serve(*sys.argv[1:])"


def serve(function: str, arguments: str, started_at: str) -> None:
    """The contestant's side: build, warm up, then one round for each line read. Arguments as the parent writes them."""

    def answer(**content: Any) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    try:
        module, _, name = function.partition(":")
        work, first = getattr(importlib.import_module(module), name)(**json.loads(arguments))
        first()
        first_batch_s = time.time() - float(started_at)
        work()
        answer(first_batch_s=first_batch_s)
        for _ in sys.stdin:
            started = time.perf_counter()
            images = work()
            answer(images=images, seconds=time.perf_counter() - started, peak_mb=_peak_mb())
    except Exception as error:  # the parent reports it as this contestant's row
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
