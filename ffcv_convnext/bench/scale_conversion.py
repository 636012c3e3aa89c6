"""`bench scale --stages convert,join`: a folder of very many tiny pictures, from planning to `verify`.

The pictures of a class are hard links to one file, so a million of them take 100 MB of folders. Their size says nothing
about real ones: these rows measure what a conversion does for each image besides decoding and encoding it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ffcv_convnext.bench.many_images import write_many_images
from ffcv_convnext.bench.scale_steps import NUM_SHARDS
from ffcv_convnext.data.beton import Manifest
from ffcv_convnext.data.convert import Journal
from ffcv_convnext.errors import Failure
from ffcv_convnext.formatting import format_bytes, format_number, markdown_table

SIDE = 32  # pixels of a picture
MAX_CLASSES = 1000
TIMEOUT_S = 3600.0  # of a step
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step with one number of images."""

    num_images: int
    step: str
    seconds: float
    images_per_s: float | None
    processor_s: float | None  # of the process itself, without its workers
    peak: int | None  # bytes that the process had for itself at most; None: not measured


@dataclass(frozen=True, slots=True)
class SizeRow:
    """The files of one number of images, bytes."""

    num_images: int
    beton: int
    manifest: int
    file_list: int
    journal: int  # when the last page was written
    source_list: int  # in the journal's folder


@dataclass(frozen=True, slots=True)
class ConversionScale:
    """Both tables."""

    steps: list[StepRow]
    sizes: list[SizeRow]

    def extend(self, other: ConversionScale) -> None:
        """Add the rows of another measurement."""
        self.steps.extend(other.steps)
        self.sizes.extend(other.sizes)

    def to_rows(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return {"conversion": [asdict(row) for row in self.steps], "files": [asdict(row) for row in self.sizes]}

    def format(self) -> str:
        """Return Markdown tables. Memory an image: what the process had more than with the fewest images."""
        header = ["step", "images", "s", "images/s", "processor s", "memory at most", "bytes an image"]
        order = list(dict.fromkeys(row.step for row in self.steps))
        rows = [
            [
                row.step,
                f"{row.num_images:,}",
                f"{row.seconds:.2f}",
                format_number(row.images_per_s, ",.0f"),
                format_number(row.processor_s, ".2f"),
                "-" if row.peak is None else format_bytes(row.peak),
                self._per_image(row),
            ]
            for row in sorted(self.steps, key=lambda row: (order.index(row.step), row.num_images))
        ]
        text = markdown_table(header, rows, "<>>>>>>")
        if self.sizes:
            names = ("beton", "manifest", "file_list", "journal", "source_list")
            files = [
                [f"{row.num_images:,}", *(format_bytes(getattr(row, name)) for name in names)] for row in self.sizes
            ]
            header = ["images", ".beton", "manifest", "list of files", "journal", "its list of sources"]
            text += f"\n\n{markdown_table(header, files, '>>>>>>')}"
        return text

    def _per_image(self, row: StepRow) -> str:
        least = min((each for each in self.steps if each.step == row.step), key=lambda each: each.num_images)
        if row.peak is None or least.peak is None or row.num_images == least.num_images:
            return "-"
        return f"{(row.peak - least.peak) / (row.num_images - least.num_images):.0f}"


def measure_conversion(number: int, work: Path, progress: Callable[[str], None]) -> ConversionScale:
    """Plan, convert with a kill half-way and a resume, verify and describe `number` pictures below `work`.

    Raises Failure if a step fails. Where all images fit into one page, nothing is killed.
    """
    folder, out = _make_folder(number, work, progress), work / "out"
    planned = run_step("plan", folder, out)
    steps = [_row(number, "plan", planned)]
    done = _kill_half_way(folder, out, number, planned["identity"])
    progress(f"{number:,} images: killed after {done:,}")
    converted = run_step("convert_all", folder, out)
    if done:
        steps.append(StepRow(number, "resume, to the first image", converted["begun_s"], None, None, None))
    rest = (number - done) / (converted["seconds"] - converted["begun_s"])
    steps.append(replace(_row(number, "convert", converted), images_per_s=rest))
    beton = out / "train.beton"
    sizes = [path.stat().st_size for path in (beton, Manifest.path_for(beton), Manifest.files_path_for(beton))]
    for name, text in (("verify", "verify"), ("info", "data info")):
        progress(f"{number:,} images: {text}")
        found = run_step(name, folder, out)
        steps.append(_row(number, text, found))
    beton_bytes, manifest, file_list = sizes
    files = SizeRow(number, beton_bytes, manifest, file_list, converted["journal"], converted["sources"])
    return ConversionScale(steps, [files])


def measure_join(number: int, work: Path, progress: Callable[[str], None]) -> ConversionScale:
    """Convert `number` pictures in parts, and join these. Raises Failure if a step fails."""
    folder, out = _make_folder(number, work, progress), work / "out"
    steps = []
    for name, text in (("convert_shards", f"convert in {NUM_SHARDS} parts"), ("join", f"join of {NUM_SHARDS} parts")):
        progress(f"{number:,} images: {text}")
        found = run_step(name, folder, out)
        steps.append(_row(number, text, found))
    return ConversionScale(steps, [])


def _row(number: int, step: str, found: dict[str, Any]) -> StepRow:
    seconds = found["seconds"]
    return StepRow(number, step, seconds, number / seconds, found["processor_s"], found["peak"])


def _make_folder(number: int, work: Path, progress: Callable[[str], None]) -> Path:
    progress(f"{number:,} images: making the folder")
    folder = work / "pictures"
    write_many_images(folder / "train", number, min(MAX_CLASSES, number // 10), SIDE)
    return folder


def _kill_half_way(folder: Path, out: Path, number: int, identity: str) -> int:
    """Start the conversion, kill it once half of it is saved, and return how many images are saved."""
    journal = Journal(out, "train")
    process = subprocess.Popen(_command("convert_all", folder, out), env=_environment(), stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + TIMEOUT_S
    try:
        while journal.num_done(identity) < number / 2 and process.poll() is None and time.monotonic() < give_up:
            time.sleep(_POLL_S)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    if (out / "train.beton").exists():  # it was faster
        raise Failure(f"{number:,} images are too few to kill a conversion of them half-way; measure more")
    return journal.num_done(identity)


def run_step(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """Run a step of scale_steps.py in a separate process. Raises Failure."""
    return run_child(name, _command(name, folder, out))


def run_child(name: str, command: list[str], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run a command that measures, and return the JSON of its last line. Raises Failure, which begins with `name`."""
    try:
        result = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failure(f"{name} took more than {timeout_s:g} s") from None
    if result.returncode:
        raise Failure(f"{name} failed: {' '.join(result.stderr.strip().splitlines()[-1:])}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _command(name: str, folder: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "ffcv_convnext.bench.scale_steps", name, str(folder), str(out)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
