"""Start training processes quickly, and stop them at an exact moment.

A training process imports and compiles for about fifteen seconds before its first step. The nursery is one process that
has done both; it forks a child for each command line, which runs `train.py`. A child can send itself a signal when a
function is called for the n-th time, for example while it writes a checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

Moment = tuple[str, int] | tuple[str, int, float]
"""A function's full name, which call of it, counted from 1, and maybe the seconds for which that call waits."""


@dataclass(frozen=True)
class Child:
    pid: int
    log: Path  # its stdout and stderr

    def output(self) -> str:
        return self.log.read_text()


class Nursery:
    """A context that ends every child at its end."""

    def __init__(self, beton_dir: Path, logs: Path) -> None:
        self.logs = logs
        self.numbers = itertools.count(1)
        self.running: set[int] = set()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(beton_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Nursery:
        try:
            assert self._answer(timeout=300) == "ready"
        except BaseException:
            self.process.kill()
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def start(
        self,
        settings: Mapping[str, Any],
        *,
        at: Sequence[Moment] = (),
        signals: Sequence[signal.Signals] = (signal.SIGKILL,),
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """Start training with these flat settings.

        at: moments, each looked out for once the one before has come; at the last one the child sends itself `signals`,
        or raises a RuntimeError if there are none.
        """
        argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        log = self.logs / f"child{next(self.numbers)}.log"
        strike = {"at": list(at), "signals": [int(number) for number in signals]}
        pid = self._ask({"argv": argv, "log": str(log), "env": dict(env or {}), "strike": strike}, timeout=30)
        self.running.add(pid)
        return Child(pid, log)

    def wait(self, child: Child, timeout: float = 120) -> int:
        """Return the exit status, or the negative number of the signal that killed it. Fails after a timeout."""
        status = self._ask({"wait": child.pid, "timeout": timeout}, timeout + 30)
        self.running.discard(child.pid)
        assert status is not None, f"still running after {timeout} s:\n{child.output()}"
        return int(status)

    def run(self, settings: Mapping[str, Any], **how: Any) -> tuple[int, str]:
        """Return exit status and output of a training process."""
        child = self.start(settings, **how)
        return self.wait(child), child.output()

    def run_ranks(
        self, settings: Mapping[str, Any], *, strikes: Mapping[int, dict[str, Any]], world: int = 2
    ) -> list[tuple[int, str]]:
        """Run `world` processes of one run, as torchrun does. strikes: `at` and `signals` by rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [
            self.start(
                settings,
                env={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                **strikes.get(rank, {}),
            )
            for rank in range(world)
        ]
        return [(self.wait(child), child.output()) for child in children]

    def _ask(self, question: dict[str, Any], timeout: float) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer(timeout)

    def _answer(self, timeout: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        assert ready, f"the nursery did not answer within {timeout} s"
        return json.loads(self.process.stdout.readline())


def strike_at(moments: list[Moment], numbers: list[int]) -> None:
    """Wrap the first moment's function: its n-th call waits for the next moment, sends the signals, or raises."""
    (target, call, *delay), *later = moments
    owner_name, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)
    calls = itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            setattr(owner, name, original)
            if later:
                strike_at(later, numbers)
                time.sleep(*delay or [0])
            else:
                for number in numbers:
                    os.kill(os.getpid(), number)
                if not numbers:
                    raise RuntimeError("struck")
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def wait_for(pid: int, timeout: float) -> int | None:
    """Return the child's exit status as subprocess does; kill it and return None after a timeout."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def answer(content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def main(beton_dir: Path) -> int:
    import torch

    import ffcv_convnext.training.run  # noqa: F401  the children have it then
    from ffcv_convnext.cli import run_command
    from ffcv_convnext.config import DataConfig
    from ffcv_convnext.data.load.loader import EvalLoader, TrainLoader

    torch.set_num_threads(1)
    data, cpu = DataConfig(data_path=beton_dir, batch_size=8, input_size=32, num_workers=1), torch.device("cpu")
    train, val = TrainLoader(data, cpu, seed=0), EvalLoader(data, cpu)
    batches = [*(batch for step in train.steps(0) for batch in step), *val]  # the first ones wait for the compiler
    assert len(batches) == train.steps_per_epoch + len(val.samples)
    train.close()
    val.close()
    answer("ready")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer(wait_for(question["wait"], question["timeout"]))
            continue
        pid = os.fork()
        if pid:
            answer(pid)
            continue
        log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(file, number)
        os.environ.update(question["env"])
        if question["strike"]["at"]:
            strike_at(question["strike"]["at"], question["strike"]["signals"])
        return run_command("train", question["argv"])
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
