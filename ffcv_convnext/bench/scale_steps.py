"""A measured step of `bench scale`: `python -m ffcv_convnext.bench.scale_steps STEP FOLDER OUT` prints JSON.

Each is a separate process, so that nothing else counts as its memory. `peak` is the most that the process has had for
itself (anonymous memory, without mapped files); `seconds` begins when Python has started;
`processor_s` is user and system time of this process, without the workers that it starts.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffcv_convnext.errors import Failure

NUM_SHARDS = 4
NUM_WORKERS = max(1, min(len(os.sched_getaffinity(0)), 32))
_WATCH_S = 0.005

Found = dict[str, Any]


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the memory that a process has for itself."""
    return _bytes(f"/proc/{pid}/status", "RssAnon:")


def proportional_bytes(pid: int | str = "self") -> int:
    """Return the memory of a process, where a page that n processes map counts as one n-th."""
    return _bytes(f"/proc/{pid}/smaps_rollup", "Pss:")


def _bytes(file: str, name: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise Failure(f"{file} has no {name} this benchmark needs Linux 4.14 or newer")


@contextmanager
def watching(look: Callable[[], object]) -> Iterator[None]:
    """Call `look` every few milliseconds, from a thread, while the block runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_S):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def _options(folder: Path, out: Path, **more: Any) -> Any:
    from ffcv_convnext.data.convert import ConversionOptions

    return ConversionOptions(data_path=folder, out_dir=out, split="train", num_workers=NUM_WORKERS, **more)


def _quiet(_: str) -> None:
    pass


def plan(folder: Path, out: Path) -> Found:
    """List the images and make the plan of their conversion, as each process that converts does first."""
    from ffcv_convnext.data.convert import expect

    return {"identity": expect(_options(folder, out), 1, _quiet)["train"].identity}


def convert_all(folder: Path, out: Path) -> Found:
    """Convert everything, or what an earlier attempt left; `begun_s`: until the first image is encoded."""
    from ffcv_convnext.data.convert import Journal, convert

    journal = Journal(out, "train")
    found: Found = {"begun_s": None, "journal": 0, "sources": 0}
    before = journal.path.stat().st_ino if journal.path.exists() else None
    started = time.perf_counter()

    def look() -> None:
        try:
            now, sources = journal.path.stat(), journal.sources.stat()
        except OSError:
            return
        if found["begun_s"] is None and now.st_ino != before:
            found["begun_s"] = time.perf_counter() - started
        found["journal"], found["sources"] = max(found["journal"], now.st_size), sources.st_size

    with watching(look):
        convert(_options(folder, out, resume=before is not None), _quiet)
    return found


def convert_shards(folder: Path, out: Path) -> Found:
    """Convert everything in NUM_SHARDS parts, one after the other."""
    from ffcv_convnext.data.convert import convert

    for index in range(NUM_SHARDS):
        convert(_options(folder, out, shard=(index, NUM_SHARDS)), _quiet)
    return {}


def join(_: Path, out: Path) -> Found:
    """Join the parts."""
    from ffcv_convnext.data.convert import join_shards

    join_shards(out, "train", overwrite=False, say=_quiet)
    return {}


def verify(_: Path, out: Path) -> Found:
    """Check the file, and decode every image."""
    from ffcv_convnext.data.check import verify_data

    result = verify_data(out / "train.beton", len(os.sched_getaffinity(0)))
    if not result.good:
        raise Failure(result.summary())
    return {}


def info(_: Path, out: Path) -> Found:
    """Describe the file."""
    from ffcv_convnext.data.check import describe_data

    describe_data(out / "train.beton").format()
    return {}


STEPS: dict[str, Callable[[Path, Path], Found]] = {
    each.__name__: each for each in (plan, convert_all, convert_shards, join, verify, info)
}


def main(argv: list[str]) -> int:
    """Do a step and print what was measured, in the last line of stdout."""
    name, folder, out = argv
    peak = 0

    def look() -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())

    started, worked = time.perf_counter(), time.process_time()
    with watching(look):
        found = STEPS[name](Path(folder), Path(out))
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
    sys.stdout.write(json.dumps({**found, "seconds": seconds, "processor_s": worked, "peak": peak}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
