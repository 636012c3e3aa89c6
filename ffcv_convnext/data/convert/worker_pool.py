"""Supervised worker processes: results in the order of their tasks; a dead worker is an error, never a hang.

Why not `concurrent.futures.ProcessPoolExecutor` with a parent-death signal? Tried with Python 3.11: BrokenProcessPool
does not name the task of a killed worker, and every unfinished future has it. After Ctrl-C, leaving the pool waits for
running tasks; with a read that blocks it had not ended after 8 s. spawn and forkserver import the main script again in
each worker. Under forkserver the signal comes from the server's death: workers stayed after the parent was killed.

Here each worker has its own socket. The kernel closes it when the worker dies, which wakes the parent, and when the
parent dies, which ends the worker. Workers share nothing else. They are new interpreters, because forking a process
with threads (OpenBLAS, tqdm, numba) is unsafe.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")

TASKS_AHEAD = 4  # per worker, beyond the oldest unfinished task: bounds the results in the parent's memory
END_SECONDS = 5.0


class WorkerDied(RuntimeError):
    """A worker ended during `task`: killed when memory ran out, or crashed inside a library."""

    def __init__(self, task: Any, how: str) -> None:
        super().__init__(how)
        self.task = task
        self.how = how


class Workers(Generic[Task, Answer]):
    """Processes that apply `function` to each task. Iterate inside `with`; leaving the block ends them.

    function: picklable, so importable by name; each worker imports its module.
    Workers start with the first tasks when `with` is entered. Raises WorkerDied, or RuntimeError with the worker's
    traceback if `function` raises.
    """

    def __init__(self, function: Callable[[Task], Answer], tasks: Sequence[Task], num_workers: int) -> None:
        self.function = function
        self.tasks = tasks
        self.num_workers = min(num_workers, len(tasks))
        self.processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self.busy: dict[Connection, int] = {}  # index of the current task
        self.idle: list[Connection] = []
        self.next_task = 0

    def __enter__(self) -> Workers[Task, Answer]:
        try:
            for _ in range(self.num_workers):
                self._start_one()
            self._assign(oldest=0)
        except BaseException:
            self._end()
            raise
        return self

    def _start_one(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
                f"serve({theirs.fileno()}, {os.getpid()})"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal sends Ctrl-C to the parent only, which ends the workers
            )
        connection = Connection(ours.detach())
        self.processes[connection] = process
        self.idle.append(connection)
        connection.send(self.function)

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._end(at_once=kind is not None)

    def __iter__(self) -> Iterator[Answer]:
        finished: dict[int, Answer] = {}
        for number in range(len(self.tasks)):
            while number not in finished:
                self._assign(oldest=number)
                for connection in wait(list(self.busy)):
                    assert isinstance(connection, Connection)
                    self._collect(connection, finished)
            yield finished.pop(number)

    def _assign(self, oldest: int) -> None:
        """Give each idle worker one task, so a worker is always receiving when we send."""
        limit = min(len(self.tasks), oldest + TASKS_AHEAD * self.num_workers)
        while self.idle and self.next_task < limit:
            connection = self.idle.pop()
            self.busy[connection] = self.next_task
            self.next_task += 1
            try:
                connection.send(self.tasks[self.busy[connection]])
            except OSError:
                self._raise_died(connection)

    def _collect(self, connection: Connection, finished: dict[int, Answer]) -> None:
        try:
            answer, trace = connection.recv()
        except (EOFError, OSError):
            self._raise_died(connection)
        if trace is not None:
            raise RuntimeError(f"a worker process failed:\n{trace}")
        finished[self.busy.pop(connection)] = answer
        self.idle.append(connection)

    def _raise_died(self, connection: Connection) -> NoReturn:
        code = self.processes[connection].wait(END_SECONDS)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise WorkerDied(self.tasks[self.busy[connection]], how) from None

    def _end(self, *, at_once: bool = True) -> None:
        """End all processes. They have nothing to save, so SIGKILL is safe."""
        for connection in self.processes:
            connection.close()  # an idle worker exits by itself
        for process in self.processes.values():
            if not at_once:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_SECONDS)
            process.kill()
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):  # blocked in the kernel, e.g. on a network disk
                process.wait(END_SECONDS)
        self.processes.clear()


def serve(descriptor: int, parent: int) -> None:
    """Run in a worker: receive a function, then tasks, and send results until the parent closes its end or dies."""
    for number in (signal.SIGTERM, signal.SIGUSR2):  # Slurm sends them to all processes; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):
        function = connection.recv()
        while True:
            task = connection.recv()
            answer: tuple[Any, str | None]
            try:
                answer = function(task), None
            except Exception:
                answer = None, traceback.format_exc()
            connection.send(answer)


def _exit_with(parent: int) -> None:
    """Exit when the parent dies, even if the main thread is blocked in a read, e.g. of a network disk."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
