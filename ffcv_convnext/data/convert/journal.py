"""Where a conversion keeps what is not finished: a hidden, locked folder with a journal, from which it can go on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ffcv_convnext.data.beton import Page


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a conversion was when a page was written."""

    page: Page
    num_files: int  # settled since the start: stored, or skipped
    num_originals: int  # of the page: pictures with the coefficients of their files
    skipped: list[tuple[str, str]]  # since the page before: path, reason

    def to_line(self) -> str:
        """A line of JSON."""
        return json.dumps([self.page.crc32, self.page.rows, self.num_files, self.num_originals, self.skipped]) + "\n"

    @classmethod
    def from_line(cls, line: bytes) -> Progress:
        """Raises ValueError for a line that was cut off."""
        crc32, rows, num_files, num_originals, skipped = json.loads(line)
        page = Page(crc32, [tuple(row) for row in rows])
        return cls(page, num_files, num_originals, [(path, reason) for path, reason in skipped])


class Workplace:
    """The folder of one unfinished .beton, held under a lock (see `workplace`).

    The journal is a line that says what is being written, then a line for each page that is on the disk. A line is
    appended after its page is written, so one that was cut off anywhere tells of whole pages only.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.beton = folder / f"{name}.beton"
        self.journal = folder / "pages.jsonl"

    def read(self, identity: str) -> list[Progress] | None:
        """What an earlier attempt at the same left here, page by page; None when that was something else."""
        try:
            first, *lines = self.journal.read_bytes().split(b"\n")
            if json.loads(first) != identity:
                return None
        except (OSError, ValueError):
            return None
        found: list[Progress] = []
        for line in lines:
            try:
                found.append(Progress.from_line(line))
            except ValueError:  # cut off, or the nothing behind the last line
                break
        return found

    def begin(self, identity: str, kept: Sequence[Progress] = ()) -> None:
        """Start the journal anew, with what is kept of an earlier attempt; when that is nothing, its files go."""
        if not kept:
            for path in self.folder.iterdir():
                path.unlink()
        fresh = self.folder / "pages.new"
        fresh.write_text("".join([json.dumps(identity) + "\n", *(entry.to_line() for entry in kept)]))
        fresh.replace(self.journal)

    def append(self, entry: Progress) -> None:
        with open(self.journal, "a") as file:
            file.write(entry.to_line())

    @property
    def num_pages(self) -> int:
        """Pages that another attempt can keep."""
        with suppress(OSError):
            return max(self.journal.read_bytes().count(b"\n") - 1, 0)
        return 0


@contextmanager
def workplace(out_dir: Path, name: str) -> Iterator[Workplace]:
    """Enter `out_dir/.<name>.unfinished`; it stays after a failure that left whole pages, and is removed otherwise.

    A lock on it, which the kernel drops with the process, tells a conversion that runs from one that was killed.
    Raises ValueError when another conversion runs there, PermissionError when the folder cannot be written.
    """
    folder = out_dir / f".{name}.unfinished"
    try:
        descriptor = _open_locked(folder)
    except BlockingIOError:
        raise ValueError(f"another conversion is writing {out_dir / name}.beton ({folder} is locked)") from None
    except OSError as error:
        raise PermissionError(f"out_dir = {out_dir} cannot be written: {error.strerror}; choose another") from None
    place = Workplace(folder, name)
    finished = False
    try:
        yield place
        finished = True
    finally:
        if finished or not place.num_pages:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _open_locked(folder: Path) -> int:
    """Make the folder, if need be, and hold its lock. Raises BlockingIOError when another process does."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(FileNotFoundError):
                _lock(descriptor)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    return descriptor
            os.close(descriptor)  # its last owner removed it between our two steps
        except BaseException:
            os.close(descriptor)
            raise


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks: what runs and what was killed look alike
        pass
