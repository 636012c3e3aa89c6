"""Signals that stop a run: immediately before training starts, after the current optimiser step during training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ffcv_convnext.errors import Interrupted


class StopRequest:
    """A request to stop, by SIGTERM, SIGUSR2 or Ctrl-C; the training loop checks it after each optimiser step."""

    def __init__(self) -> None:
        self.name: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self.name is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Store the signal's name."""
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.name = signal.Signals(number).name

    def message(self, step: int) -> str:
        """Return the message of the Interrupted error after an optimiser step."""
        reason = self.name or "a signal to another process"
        return f"stopped by {reason} after optimiser step {step}, state saved; the same command continues"


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can install handlers
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) == handler:  # else `ignore_sigterm` was called in the block
                signal.signal(number, previous)


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on: a process that ends with an error reports it, though its launcher ends all others."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Convert the signals to a request while the block runs."""
    request = StopRequest()
    with _handling(request.handle, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        yield request


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise Interrupted on SIGTERM and SIGUSR2 while the block runs: before the first step there is nothing to save."""

    def stop(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Interrupted(
            f"stopped by {name} outside the training steps, nothing new to save; the same command continues"
        )

    with _handling(stop, signal.SIGTERM, signal.SIGUSR2):
        yield


@contextmanager
def sigterm_as_keyboard_interrupt(*more: signal.Signals) -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM, a closed terminal and `more` while the block runs, so that it can clean up.

    The error's text is the signal's name.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    with _handling(interrupt, signal.SIGTERM, signal.SIGHUP, *more):
        yield


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Deliver stop signals after the block: some libraries swallow exceptions while they are imported."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
    with _handling(lambda number, _frame: caught.append(number), *numbers):
        yield
    if caught:
        signal.raise_signal(caught[0])
