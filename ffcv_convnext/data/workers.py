"""Supervised worker processes: a list of tasks in, their answers out in the same order, never a hang.

`multiprocessing.Pool` waits for ever for the task of a worker that was killed. Here each worker has a socket of
its own: the kernel closes it when the worker dies, which wakes the parent, and when the parent dies, which ends
the worker. Workers share nothing else, so there is nothing to leak.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")

CHUNKS_AHEAD = 4  # a worker: answers that may wait for an older one, which bounds the parent's memory
END_SECONDS = 5.0


class WorkerDied(RuntimeError):
    """A worker ended in the middle of `task`: killed for memory, or crashed inside a library."""

    def __init__(self, task: Any, how: str) -> None:
        super().__init__(how)
        self.task = task
        self.how = how


class Workers(Generic[Task, Answer]):
    """Processes that apply `function` to every task. Iterate inside `with`; leaving it ends them.

    function: importable by name; its module is loaded once, by the fork server. That way of starting is chosen
    since the calling process has threads (OpenBLAS, tqdm, numba), with which a plain fork is unsafe.
    A first batch of tasks is under way when `with` is entered. Raises WorkerDied, or RuntimeError with the
    worker's traceback when `function` raised.
    """

    def __init__(self, function: Callable[[Task], Answer], tasks: Sequence[Task], num_workers: int) -> None:
        self.function = function
        self.tasks = tasks
        self.num_workers = min(num_workers, len(tasks))
        self.processes: dict[Connection, BaseProcess] = {}
        self.busy: dict[Connection, int] = {}  # the number of the task in work
        self.idle: list[Connection] = []
        self.next_task = 0

    def __enter__(self) -> Workers[Task, Answer]:
        context = multiprocessing.get_context("forkserver")
        function = self.function.func if isinstance(self.function, partial) else self.function
        context.set_forkserver_preload([function.__module__, __name__])
        try:
            for _ in range(self.num_workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
                process.start()
                theirs.close()
                self.processes[ours] = process
                self.idle.append(ours)
            self._assign(oldest=0)
        except BaseException:
            self._end()
            raise
        return self

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
        """Give idle workers a task each, one only: so a worker is always listening when we send."""
        limit = min(len(self.tasks), oldest + CHUNKS_AHEAD * self.num_workers)
        while self.idle and self.next_task < limit:
            connection = self.idle.pop()
            self.busy[connection] = self.next_task
            self.next_task += 1
            try:
                connection.send(self.tasks[self.busy[connection]])
            except OSError:
                self._mourn(connection)

    def _collect(self, connection: Connection, finished: dict[int, Answer]) -> None:
        try:
            answer, trace = connection.recv()
        except (EOFError, OSError):
            self._mourn(connection)
        if trace is not None:
            raise RuntimeError(f"a worker process failed:\n{trace}")
        finished[self.busy.pop(connection)] = answer
        self.idle.append(connection)

    def _mourn(self, connection: Connection) -> None:
        process = self.processes[connection]
        process.join(END_SECONDS)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        raise WorkerDied(self.tasks[self.busy[connection]], how) from None

    def _end(self, *, at_once: bool = True) -> None:
        """End every process. They hold nothing that needs saving, so SIGKILL is safe."""
        for connection in self.processes:
            connection.close()  # an idle worker leaves by itself
        for process in self.processes.values():
            if not at_once:
                process.join(END_SECONDS)
            process.kill()
            process.join(END_SECONDS)
        self.processes.clear()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life: tasks are answered until the parent closes the connection or is gone."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        while True:
            task = connection.recv()
            answer: tuple[Any, str | None]
            try:
                answer = function(task), None
            except Exception:
                answer = None, traceback.format_exc()
            connection.send(answer)
    except (EOFError, OSError):
        return


def _leave_with_parent() -> None:
    """For a worker that hangs in a read, of a network disk say, when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
