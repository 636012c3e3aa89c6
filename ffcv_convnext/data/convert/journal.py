"""The unfinished part of a conversion: a hidden, locked folder with a journal, from which --resume continues."""

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
class JournalEntry:
    """The state of a conversion after one page was written."""

    page: Page
    num_done: int  # images since the start that are stored or skipped
    num_originals: int  # images since the start that kept the coefficients of their files
    skipped: list[tuple[str, str]]  # since the previous page: name, reason

    def to_line(self) -> str:
        """Return a line of JSON."""
        return json.dumps([self.page.crc32, self.page.rows, self.num_done, self.num_originals, self.skipped]) + "\n"

    @classmethod
    def from_line(cls, line: bytes) -> JournalEntry:
        """Parse a line. Raises ValueError if it is incomplete."""
        crc32, rows, num_done, num_originals, skipped = json.loads(line)
        page = Page(crc32, [tuple(row) for row in rows])
        return cls(page, num_done, num_originals, [(name, reason) for name, reason in skipped])


class Journal:
    """The folder `out_dir/.<stem>.unfinished` of one unfinished .beton; see `open_journal` for its lock.

    The first line of pages.jsonl is the identity of the .beton, each further line one page on disk. A line is added
    after its page is written, so the journal lists complete pages only, wherever it is cut off.
    """

    def __init__(self, out_dir: Path, stem: str) -> None:
        self.folder = out_dir / f".{stem}.unfinished"
        self.beton = self.folder / f"{stem}.beton"
        self.path = self.folder / "pages.jsonl"

    def read(self, identity: str) -> list[JournalEntry] | None:
        """Return the entries of an earlier attempt, or None if there is none for this identity."""
        try:
            first, *lines = self.path.read_bytes().split(b"\n")
            if json.loads(first) != identity:
                return None
        except (OSError, ValueError):
            return None
        entries: list[JournalEntry] = []
        for line in lines:
            try:
                entries.append(JournalEntry.from_line(line))
            except ValueError:  # cut off, or empty after the last line
                break
        return entries

    def begin(self, identity: str, kept: Sequence[JournalEntry] = ()) -> None:
        """Start a new journal with the entries to keep; without any, remove all files of the earlier attempt."""
        if not kept:
            self.path.unlink(missing_ok=True)  # first: a journal must not outlive its pages
            for path in self.folder.iterdir():
                path.unlink()
        new = self.folder / "pages.new"
        new.write_text("".join([json.dumps(identity) + "\n", *(entry.to_line() for entry in kept)]))
        new.replace(self.path)

    def append(self, entry: JournalEntry) -> None:
        """Add an entry."""
        with open(self.path, "a") as file:
            file.write(entry.to_line())

    @property
    def num_pages(self) -> int:
        """Pages from which another attempt can continue."""
        with suppress(OSError):
            return max(self.path.read_bytes().count(b"\n") - 1, 0)
        return 0


@contextmanager
def open_journal(out_dir: Path, stem: str) -> Iterator[Journal]:
    """Create and lock the folder of a journal. It stays if the body fails after whole pages, else it is removed.

    The lock ends with the process, so a killed conversion does not block the next one.
    Raises ValueError if another conversion holds the lock, PermissionError if the folder cannot be written.
    """
    journal = Journal(out_dir, stem)
    try:
        descriptor = _open_locked(journal.folder)
    except BlockingIOError:
        raise ValueError(
            f"another conversion is writing {out_dir / stem}.beton ({journal.folder} is locked); wait for it to end"
        ) from None
    except OSError as error:
        raise PermissionError(f"out_dir = {out_dir} cannot be written: {error.strerror}; choose another") from None
    finished = False
    try:
        yield journal
        finished = True
    finally:
        if finished or not journal.num_pages:
            shutil.rmtree(journal.folder, ignore_errors=True)
        os.close(descriptor)


def _open_locked(folder: Path) -> int:
    """Create the folder if needed and lock it. Raises BlockingIOError if another process holds the lock."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # a file system without locks: continue without one
                if isinstance(error, BlockingIOError):
                    raise
            if folder.exists() and os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
            os.close(descriptor)  # its last owner removed the folder before we locked it
        except BaseException:
            os.close(descriptor)
            raise
