"""Memory of a process and its children."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

SAMPLE_SECONDS = 0.02  # between two samples of a watch


class Memory(NamedTuple):
    """Memory of a process and its children at one moment; a page shared by n of them counts 1/n for each."""

    all_mb: float  # resident, including pages of mapped files (libraries, a .beton)
    own_mb: float  # without them: heap, stacks, pinned and shared memory, compiled code


def memory_of(pid: int) -> Memory:
    """Return the memory of a process and its children."""
    kib = {"Pss:": 0, "Pss_Anon:": 0, "Pss_Shmem:": 0}
    for member in family(pid):
        with suppress(OSError):  # it has ended
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                name, value = line.split()[:2]
                if name in kib:
                    kib[name] += int(value)
    return Memory(kib["Pss:"] / 1024, (kib["Pss_Anon:"] + kib["Pss_Shmem:"]) / 1024)


def family(pid: int) -> list[int]:
    """Return the ids of a process and of all its descendants that are alive."""
    children: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(member for child in children for member in family(child))]


class MemoryWatch:
    """Samples a process's memory from a thread while the `with` block runs; `peak` is the maximum of each number."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak = Memory(0.0, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak = Memory(*map(max, self.peak, memory_of(self.pid)))
