"""Contestants in separate processes that take turns.

The speed of a shared machine drifts by 20-30 % within minutes, so only ratios of runs that alternate are meaningful.
Every contestant has its own process, since loaders set process-wide thread counts and numba options; the parent lets
one at a time work, round after round. Memory is watched in one more round, which is not timed.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ffcv_convnext.bench.memory import MemoryWatch, family, memory_of
from ffcv_convnext.bench.options import Options
from ffcv_convnext.formatting import format_number, markdown_table
from ffcv_convnext.host import available_cores, processor_name


class Timed(NamedTuple):
    """Result of a round that measures its own time, because not all of it counts."""

    images: int
    seconds: float


Work = Callable[[], int | Timed]  # does the work of a round and returns the number of images
Contestant = tuple[Work, Callable[[], Any] | None]  # work, and a function that gives the first result; None: the work
Entry = tuple[str, str, dict[str, Any]]  # name of the row, "module:function", keyword arguments

TIMEOUT_S = 300.0  # default for a start or a round


@dataclass(frozen=True, slots=True)
class Row:
    """Result of one contestant. Rates are images/s over all cores used."""

    name: str
    median: float
    min: float
    max: float
    ratio: float | None  # median of the ratios to the reference, round by round
    ratio_min: float | None
    ratio_max: float | None
    first_s: float  # from process start to the first result
    peak_mb: float  # maximum memory of all its processes, shared pages and mapped files counted once
    work_mb: float | None  # maximum memory without mapped files, minus the same right after the imports
    error: str | None = None

    def format_ratio(self) -> tuple[str, str]:
        """Return the cells of the ratio and its range."""
        if self.ratio is None:
            return "-", "-"
        return f"{self.ratio:.2f}", f"{self.ratio_min:.2f}-{self.ratio_max:.2f}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison and the machine it ran on."""

    title: str
    reference: str
    result: str  # what a contestant makes: batch, file
    facts: dict[str, Any]
    rows: list[Row]
    columns: dict[str, dict[str, float]] = field(default_factory=dict)  # more columns: heading -> row's name -> value
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # row's name -> figures it noted, see note()

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps(asdict(self), indent=2)

    def format(self) -> str:
        """Return a Markdown table with the facts above it."""
        cores = self.facts["cores"]
        header = ["images/s", "min-max", "per core", f"ratio to {self.reference}", "min-max"]
        header += [f"first {self.result} s", "peak MB", "work MB", *self.columns]

        def cells(row: Row) -> list[str]:
            return [
                *(f"{row.median:.0f}", f"{row.min:.0f}-{row.max:.0f}", f"{row.median / cores:.0f}"),
                *row.format_ratio(),
                *(f"{row.first_s:.1f}", f"{row.peak_mb:.0f}", format_number(row.work_mb, ".0f")),
                *(format_number(values.get(row.name), ".1f") for values in self.columns.values()),
            ]

        return format_rows(self, self.title, header, cells)


def format_rows(
    compared: Comparison, first_column: str, header: Sequence[str], cells: Callable[[Row], Sequence[str]]
) -> str:
    """Return a comparison's facts, its table and the errors of the rows that failed.

    header, cells: all columns but the first one, which is the row's name.
    """
    rows = [[row.name, *(["failed", *["-"] * (len(header) - 1)] if row.error else cells(row))] for row in compared.rows]
    table = markdown_table([first_column, *header], rows, "<" + ">" * len(header))
    errors = [f"\n{row.name} failed: {row.error}" for row in compared.rows if row.error]
    return "\n".join([format_facts(compared.title, compared.facts), "", table, *errors])


def format_facts(title: str, facts: Mapping[str, Any]) -> str:
    """Return one line with all facts."""
    return f"{title}: {', '.join(f'{key} {value}' for key, value in facts.items())}"


def timeout_for(num_images: int) -> float:
    """Return the timeout of a round in seconds; half a second per image means that a loader hangs, as FFCV's can."""
    return TIMEOUT_S + 0.5 * num_images


def use_cores(cores: int | None) -> int:
    """Limit this process and its children to a number of cores (None: all available) and return the number."""
    available = available_cores()
    if cores is None:
        return available
    if not 1 <= cores <= available:
        raise ValueError(f"cores = {cores}: expected 1 to {available}, the cores this process may use")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return cores


def compare(
    title: str,
    contestants: Sequence[Entry],
    options: Options,
    *,
    reference: str,
    facts: dict[str, Any],
    result: str = "batch",
    timeout_s: float = TIMEOUT_S,
) -> Comparison:
    """Run contestants in turn: one round of warm-up, `options.rounds` measured rounds, one more to watch the memory.

    contestants: the functions take their arguments as keywords, call imports_done() after their imports, and return a
    Contestant. One that fails, or gives no answer for timeout_s, becomes a row with its error; the others continue.
    result: what they make, for the table's header.
    """
    processes: dict[str, _Process] = {}
    try:
        for name, function, arguments in contestants:
            options.progress(f"starting {name}")
            processes[name] = _Process(name, function, arguments, timeout_s)
        for number in range(options.rounds):
            for process in processes.values():
                process.round()
            rates = ", ".join(f"{c.name} {c.rates[-1]:.0f}" for c in processes.values() if not c.error)
            options.progress(f"round {number + 1}/{options.rounds}: {rates} images/s")
        for process in processes.values():
            process.watch_memory()
    finally:
        for process in processes.values():
            process.stop()
    base = processes[reference].rates if reference in processes else []
    facts = {
        "cores": available_cores(),
        "processor": processor_name(),
        "python": platform.python_version(),
        **facts,
    }
    rows = [process.row(base) for process in processes.values()]
    notes = {name: process.notes for name, process in processes.items() if process.notes}
    return Comparison(title, reference, result, facts, rows, notes=notes)


class _Process:
    """The parent's side of a contestant: one line of JSON in, one out, for each round."""

    def __init__(self, name: str, function: str, arguments: dict[str, Any], timeout_s: float) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.rates: list[float] = []
        self.notes: dict[str, Any] = {}
        self.error: str | None = None
        self.timed_out = False
        self.peak_mb = 0.0
        self.work_mb: float | None = None
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  stop() closes it
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
        """Let it work once more while a thread samples its memory."""
        with MemoryWatch(self.process.pid) as watch:
            self._ask()
        if not self.error:
            self.peak_mb = watch.peak.all_mb
            if self.imports_mb is not None:
                self.work_mb = watch.peak.own_mb - self.imports_mb

    def _ask(self) -> dict[str, Any]:
        if self.error:
            return {}
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; _answer() finds out why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        timer = threading.Timer(self.timeout_s, self._time_out)
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith("{"):  # a library may print to stdout as well
                    answer: dict[str, Any] = json.loads(line)
                    self.error = answer.get("error")
                    self.notes |= answer.get("notes", {})
                    return answer
        finally:
            timer.cancel()
        self.error = f"timeout: no answer for {self.timeout_s:.0f} s" if self.timed_out else self._exit_message()
        return {}

    def _time_out(self) -> None:
        self.timed_out = True
        self._kill()

    def _exit_message(self) -> str:
        status = self.process.wait()
        self.stderr.seek(0)
        last = self.stderr.read().split("\n")[-2:]
        return f"its process ended with status {status}: {' '.join(' '.join(last).split())[:200]}"

    def _kill(self) -> None:
        for pid in family(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process and close its files."""
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
        """Return the result; base: the reference's rates, round by round."""
        if self.error:
            return Row(self.name, 0, 0, 0, None, None, None, self.first_s, 0, None, self.error)
        ratios = [ours / theirs for ours, theirs in zip(self.rates, base, strict=False)]
        return Row(
            name=self.name,
            median=statistics.median(self.rates),
            min=min(self.rates),
            max=max(self.rates),
            ratio=statistics.median(ratios) if ratios else None,
            ratio_min=min(ratios, default=None),
            ratio_max=max(ratios, default=None),
            first_s=self.first_s,
            peak_mb=self.peak_mb,
            work_mb=self.work_mb,
        )


# --- The contestant's side --------------------------------------------------------------------------------

_SERVE = f"import sys; from {__name__} import serve; serve(*sys.argv[1:])"
_imports_mb: float | None = None
_first_at: float | None = None
_notes: dict[str, Any] = {}


def imports_done() -> None:
    """Mark the end of a contestant's imports: Row.work_mb counts memory from here on."""
    global _imports_mb
    _imports_mb = memory_of(os.getpid()).own_mb


def first_result() -> None:
    """Mark a result, in work that must run to its end; the first call counts (Row.first_s)."""
    global _first_at
    _first_at = _first_at or time.time()


def note(**facts: Any) -> None:
    """Add figures of a contestant to Comparison.notes; JSON values. A later call replaces earlier figures."""
    _notes.update(facts)


def serve(function: str, arguments: str, started_at: str) -> None:
    """Build the contestant, warm up, then do one round for each line read. The parent writes the arguments."""

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
            if not timed.images:
                raise ValueError("no images in a round: there are fewer than one batch")
            _settle()
            answer(**timed._asdict(), notes=_notes)
    except Exception as error:  # the parent reports it in this contestant's row
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _settle() -> None:
    """Wait up to 3 s until threads that work ahead have stopped, so that they don't use the next one's turn."""
    for _ in range(60):
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.005:
            return
