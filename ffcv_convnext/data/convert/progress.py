"""Progress of a long pass over images, on stderr."""

from __future__ import annotations

import io
import math
import sys
import time

PLAIN_SECONDS = 10.0  # between lines if stderr is not a terminal


class ProgressBar:
    """A bar on a terminal, else a line every ten seconds; both with images/s and time left."""

    def __init__(self, total: int, name: str, done: int = 0) -> None:
        from tqdm import tqdm  # imported late: every worker imports this file, for nothing

        self.is_terminal = sys.stderr.isatty()
        plain = {"file": io.StringIO(), "mininterval": math.inf, "ncols": 0, "smoothing": 0}
        how = {"file": sys.stderr, "dynamic_ncols": True, "smoothing": 0.05} if self.is_terminal else plain
        self.bar = tqdm(total=total, initial=done, desc=name, unit=" images", **how)
        self.last_line = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, number: int) -> None:
        """Count `number` more images as done."""
        self.bar.update(number)
        if not self.is_terminal and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            sys.stderr.write(f"{str(self.bar).strip()}\n")
            sys.stderr.flush()
