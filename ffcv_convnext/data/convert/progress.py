"""Progress of a long pass over images, on stderr."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

PLAIN_SECONDS = 10.0  # between lines if stderr is not a terminal


class ProgressBar:
    """A bar on a terminal, else a line every ten seconds; both with images/s and time left."""

    def __init__(self, total: int, name: str, done: int = 0) -> None:
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit=" images",
            smoothing=0.05,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.name, self.total, self.initial, self.done = name, total, done, done
        self.started = self.said = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, number: int) -> None:
        """Count `number` more images as done."""
        self.done += number
        self.bar.update(number)
        now = time.monotonic()
        if self.bar.disable and now - self.said >= PLAIN_SECONDS:
            self.said = now
            text = tqdm.format_meter(
                self.done,
                self.total,
                now - self.started,
                initial=self.initial,
                prefix=self.name,
                unit=" images",
                ncols=0,
            )
            sys.stderr.write(text.strip() + "\n")
            sys.stderr.flush()
