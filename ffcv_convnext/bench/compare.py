"""Contestants in processes of their own, run in turn.

A shared machine's speed drifts by 20-30 % within minutes, so only ratios of runs that alternate mean anything. Every
contestant lives in a process of its own, since loaders set process-wide thread counts and numba options; the parent
lets one at a time work, round after round. Memory is watched in one more round, which is not timed.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Timed(NamedTuple):
    """A round's work that took its own time, since not all of it counts."""

    images: int
    seconds: float


Work = Callable[[], int | Timed]  # does a round's work and returns how many images that were
Contestant = tuple[Work, Callable[[], Any] | None]  # the work, and what gives a first result; None: the work itself

SAMPLE_SECONDS = 0.02  # between two looks at the memory
PATIENCE_SECONDS = 300.0  # for a start or a round, unless told


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
    first_s: float  # from process start to the first result
    peak_mb: float  # largest memory of all its processes together, shared pages and mapped files counted once
    work_mb: float | None  # of it: what is its own (no mapped files), less what it was once the imports were done
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison and the machine it ran on."""

    title: str
    reference: str
    result: str  # what a contestant makes: batch, file
    facts: dict[str, Any]
    rows: list[Row]
    columns: dict[str, dict[str, float]] = field(default_factory=dict)  # further ones: heading -> row's name -> value
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # row's name -> what it noted, see note()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def format(self) -> str:
        """A Markdown table, the facts above it."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        cores = self.facts["cores"]
        heads = [
            *(self.title, "images/s", "min-max", "a core", f"times {self.reference}", "min-max"),
            *(f"first {self.result} s", "peak MB", "work's MB", *self.columns),
        ]
        lines = [f"{self.title}: {facts}", "", _line(heads), "|---|" + "---:|" * (len(heads) - 1)]
        for row in self.rows:
            if row.error:
                lines.append(_line([row.name, f"failed: {row.error}", *[""] * (len(heads) - 2)]))
                continue
            further = [f"{values[row.name]:.1f}" if row.name in values else "-" for values in self.columns.values()]
            cells = [
                *(row.name, f"{row.median:.0f}", f"{row.least:.0f}-{row.most:.0f}", f"{row.median / cores:.0f}"),
                *(
                    ("-", "-")
                    if row.ratio is None
                    else (f"{row.ratio:.2f}", f"{row.ratio_least:.2f}-{row.ratio_most:.2f}")
                ),
                *(f"{row.first_s:.1f}", f"{row.peak_mb:.0f}", "-" if row.work_mb is None else f"{row.work_mb:.0f}"),
            ]
            lines.append(_line([*cells, *further]))
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def patience(num_images: int) -> float:
    """Seconds for a round, for compare(): whoever needs more than half a second an image hangs, as stock FFCV may."""
    return PATIENCE_SECONDS + 0.5 * num_images


def use_cores(cores: int | None) -> int:
    """Keep this process, and those it starts, to so many processor cores (None: all it may use); return how many."""
    available = sorted(os.sched_getaffinity(0))
    if cores is not None:
        if not 1 <= cores <= len(available):
            raise ValueError(f"cores = {cores}: this process may use {len(available)}")
        os.sched_setaffinity(0, available[:cores])
    return cores or len(available)


def compare(
    title: str,
    contestants: Sequence[tuple[str, str, dict[str, Any]]],
    *,
    reference: str,
    rounds: int,
    facts: dict[str, Any],
    say: Callable[[str], None],
    result: str = "batch",
    patience_s: float = PATIENCE_SECONDS,
) -> Comparison:
    """Run contestants in turn, `rounds` times each after one round of warm-up, and once more to watch the memory.

    contestants: (name, "module:function", arguments); the function takes the arguments as keywords, calls
    imports_done() once it has imported what it needs, and returns a Contestant. One that fails, or that gives no
    answer for patience_s, becomes a row with its error; the others go on.
    result: what they make, for the table's head.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: expected at least 1")
    processes: dict[str, _Process] = {}
    try:
        for name, function, arguments in contestants:
            say(f"starting {name}")
            processes[name] = _Process(name, function, arguments, patience_s)
        for number in range(rounds):
            for process in processes.values():
                process.round()
            rates = ", ".join(f"{c.name} {c.rates[-1]:.0f}" for c in processes.values() if not c.error)
            say(f"round {number + 1}/{rounds}: {rates} images/s")
        for process in processes.values():
            process.watch_memory()
    finally:
        for process in processes.values():
            process.stop()
    base = processes[reference].rates if reference in processes else []
    facts = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        **facts,
    }
    rows = [process.row(base) for process in processes.values()]
    notes = {name: process.notes for name, process in processes.items() if process.notes}
    return Comparison(title, reference, result, facts, rows, notes=notes)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class _Process:
    """The parent's side of a contestant: one line of JSON in, one out, for each round."""

    def __init__(self, name: str, function: str, arguments: dict[str, Any], patience_s: float) -> None:
        self.name = name
        self.patience_s = patience_s
        self.rates: list[float] = []
        self.notes: dict[str, Any] = {}
        self.error: str | None = None
        self.given_up = False
        self.peak_mb = 0.0
        self.work_mb: float | None = None
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # progress bars; read when the process dies
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, function, json.dumps(arguments), str(time.time())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )
        answer = self._answer()
        self.first_s = answer.get("first_s", 0.0)
        self.imports_mb = answer.get("imports_mb")

    def round(self) -> None:
        """Let it work once and note its rate."""
        answer = self._ask()
        if not self.error:
            self.rates.append(answer["images"] / answer["seconds"])

    def watch_memory(self) -> None:
        """Let it work once more while another thread looks at its memory."""
        seen: list[_Memory] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_SECONDS):
                seen.append(_memory(self.process.pid))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            self._ask()
        finally:
            over.set()
            watching.join()
        if self.error:
            return
        seen.append(_memory(self.process.pid))
        self.peak_mb = max(memory.all_mb for memory in seen)
        if self.imports_mb is not None:
            self.work_mb = max(memory.own_mb for memory in seen) - self.imports_mb

    def _ask(self) -> dict[str, Any]:
        if self.error:
            return {}
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died since; the answer tells
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        patience = threading.Timer(self.patience_s, self._give_up)
        patience.start()
        try:
            for line in self.process.stdout:
                if line.startswith("{"):  # a library may print to stdout as well
                    answer: dict[str, Any] = json.loads(line)
                    self.error = answer.get("error")
                    self.notes |= answer.get("notes", {})
                    return answer
        finally:
            patience.cancel()
        self.error = f"no answer for {self.patience_s:.0f} s" if self.given_up else self._epitaph()
        return {}

    def _give_up(self) -> None:
        self.given_up = True
        self._kill()

    def _epitaph(self) -> str:
        status = self.process.wait()
        self.stderr.seek(0)
        last = self.stderr.read().split("\n")[-2:]
        return f"its process ended with status {status}: {' '.join(' '.join(last).split())[:200]}"

    def _kill(self) -> None:
        for pid in _family(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.stderr.close()

    def row(self, base: Sequence[float]) -> Row:
        if self.error:
            return Row(self.name, 0, 0, 0, None, None, None, self.first_s, 0, None, self.error)
        ratios = [ours / theirs for ours, theirs in zip(self.rates, base, strict=False)]
        return Row(
            name=self.name,
            median=statistics.median(self.rates),
            least=min(self.rates),
            most=max(self.rates),
            ratio=statistics.median(ratios) if ratios else None,
            ratio_least=min(ratios) if ratios else None,
            ratio_most=max(ratios) if ratios else None,
            first_s=self.first_s,
            peak_mb=self.peak_mb,
            work_mb=self.work_mb,
        )


# --- Memory -----------------------------------------------------------------------------------------------


class _Memory(NamedTuple):
    """Memory of a process and its children at one moment, a page that n of them share counted once (1/n each)."""

    all_mb: float  # resident, with the pages of mapped files (libraries, a .beton)
    own_mb: float  # without those: heap, stacks, pinned and shared memory, compiled code


def _memory(pid: int) -> _Memory:
    pages = {"Pss:": 0, "Pss_Anon:": 0, "Pss_Shmem:": 0}  # KiB
    for member in _family(pid):
        with suppress(OSError):  # it has ended since
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                name, value = line.split()[:2]
                if name in pages:
                    pages[name] += int(value)
    return _Memory(pages["Pss:"] / 1024, (pages["Pss_Anon:"] + pages["Pss_Shmem:"]) / 1024)


def _family(pid: int) -> list[int]:
    """A process and its children, theirs too; whoever has ended is left out."""
    children: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(member for child in children for member in _family(child))]


# --- The contestant's side --------------------------------------------------------------------------------

_SERVE = f"import sys; from {__name__} import serve; serve(*sys.argv[1:])"
_imports_mb: float | None = None
_first_at: float | None = None
_notes: dict[str, Any] = {}


def imports_done() -> None:
    """Called by a contestant between its imports and its work: memory is counted from here on (Row.work_mb)."""
    global _imports_mb
    _imports_mb = _memory(os.getpid()).own_mb


def first_result() -> None:
    """Called by a work that must not be left early whenever it has a result; the first time counts (Row.first_s)."""
    global _first_at
    _first_at = _first_at or time.time()


def note(**facts: Any) -> None:
    """Called by a contestant with figures of its own, as JSON can hold them (Comparison.notes); the last ones count."""
    _notes.update(facts)


def serve(function: str, arguments: str, started_at: str) -> None:
    """Build, warm up, then one round for each line read. Arguments as the parent writes them."""

    def answer(**content: Any) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    try:
        module, _, name = function.partition(":")
        work, first = getattr(importlib.import_module(module), name)(**json.loads(arguments))
        (first or work)()
        first_s = (_first_at or time.time()) - float(started_at)
        if first:
            work()
        _settle()
        answer(first_s=first_s, imports_mb=_imports_mb, notes=_notes)
        for _ in sys.stdin:
            started = time.perf_counter()
            done = work()
            timed = done if isinstance(done, Timed) else Timed(done, time.perf_counter() - started)
            _settle()
            answer(**timed._asdict(), notes=_notes)
    except Exception as error:  # the parent reports it as this contestant's row
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _settle() -> None:
    """Wait, a few seconds at most, until threads that work ahead have stopped: the next one's turn is its own."""
    for _ in range(60):
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.005:
            return
