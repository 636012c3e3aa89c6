"""Processes wait for others that still copy data; a signal ends the waiting at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

PROGRAM = """
import logging, sys, torch
from datetime import timedelta
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.signals import stopping_at_once
from ffcv_convnext.training.distributed import COPYING, Processes
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
with stopping_at_once():
    print("ready", flush=True)
    sys.stdin.readline()
    processes = Processes.from_environment("cpu")
    try:
        processes.join(patience=timedelta(seconds=float(sys.argv[1])) if len(sys.argv) > 1 else COPYING)
    except Interrupted:
        print("interrupted", flush=True)
        sys.exit(75)
    print("sum", int(processes.sum(torch.tensor(1 + processes.rank))), flush=True)
    processes.leave()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start one of two processes, which joins when it gets a line."""
    with socket.socket() as probe, ExitStack() as started:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

        def process(rank: int, *words: str) -> subprocess.Popen[str]:
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
            it = started.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, *words],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            started.callback(it.kill)
            assert it.stdout is not None
            assert it.stdout.readline() == "ready\n"
            return it

        probe.close()
        yield process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_the_first_process_waits_for_the_others_and_says_so(start: Start) -> None:
    first, second = start(0), start(1)
    go(first)
    assert first.stdout is not None
    assert first.stdout.readline() == "waiting for rank 1, which may still copy data\n"
    go(second)
    assert [process.communicate(timeout=60)[0] for process in (first, second)] == ["sum 3\n", "sum 3\n"]


def test_another_process_waits_for_the_first(start: Start) -> None:
    second, first = start(1), start(0)
    go(second)
    time.sleep(1.0)
    assert second.poll() is None
    go(first)
    assert "sum 3\n" in second.communicate(timeout=60)[0]
    assert "sum 3\n" in first.communicate(timeout=60)[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_waiting(rank: int, start: Start) -> None:
    waiting = start(rank)
    go(waiting)
    time.sleep(1.0)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.communicate(timeout=30)[0].endswith("interrupted\n")
    assert waiting.returncode == 75


def test_a_process_that_never_comes_is_an_error(start: Start) -> None:
    waiting = start(0, "0.5")
    go(waiting)
    waiting.communicate(timeout=30)
    assert waiting.returncode == 1
