"""The unfinished part of a conversion: a hidden, locked folder with a journal, from which --resume continues.

The journal keeps size and time of each source file that was read, with the row of the image about 45 bytes, and the
list of all source files, so that a conversion does not continue with other images than it began with.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton import ROW, Page, encode_file_list, write_file_list
from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.source import Source, names_of
from ffcv_convnext.formatting import format_count


class Identity(NamedTuple):
    """What a conversion makes. Two attempts with the same identity write the same bytes if no image has changed."""

    beton: str  # hash of everything that determines the bytes, except the content of the image files
    settings: str  # hash of the options alone


@dataclass(frozen=True, slots=True, eq=False)
class JournalEntry:
    """The state of a conversion after one page was written."""

    page: Page
    num_done: int  # images since the start that are stored or skipped
    num_originals: int  # images since the start that kept the coefficients of their files
    skipped: list[tuple[str, str]]  # since the previous page: name, reason
    stamps: NDArray[np.int64]  # (images since the previous page, 2) a `Stamp` of each source file, when it was read

    def to_json(self) -> list[Any]:
        """Return it as lists."""
        rows, stamps = self.page.rows.tolist(), self.stamps.tolist()
        return [self.page.crc32, rows, self.num_done, self.num_originals, self.skipped, stamps]

    @classmethod
    def from_json(cls, content: list[Any]) -> JournalEntry:
        """Build it from lists."""
        crc32, rows, num_done, num_originals, skipped, stamps = content
        page = Page(crc32, np.array([tuple(row) for row in rows], ROW))
        skips = [(name, reason) for name, reason in skipped]
        return cls(page, num_done, num_originals, skips, np.array(stamps, np.int64).reshape(-1, 2))


class Journal:
    """The folder `out_dir/.<stem>.unfinished` of one unfinished .beton; see `open_journal` for its lock.

    The first line of pages.jsonl is the identity of the .beton, each further line one page on disk. A line is added
    after its page is written, so the journal lists complete pages only, wherever it is cut off. Each line begins with
    its own CRC-32: a damaged line and all after it do not count. sources.txt lists all source files.
    """

    def __init__(self, out_dir: Path, stem: str) -> None:
        self.folder = out_dir / f".{stem}.unfinished"
        self.beton = self.folder / f"{stem}.beton"
        self.path = self.folder / "pages.jsonl"
        self.sources = self.folder / "sources.txt"

    def read(self, identity: Identity, source: Source, order: NDArray[np.int64]) -> list[JournalEntry] | None:
        """Return the entries of an earlier attempt, or None if there is none with these settings.

        order: (N,) indices into `source` of the images of this conversion, in its order.
        Raises ValueError if the earlier attempt had other source files or files that have changed since, or was made
        by a version of this package that did not record them.
        """
        with suppress(OSError), open(self.path, "rb") as file:
            return self._read(file, identity, source, order)
        return None

    def _read(
        self, lines: Iterator[bytes], identity: Identity, source: Source, order: NDArray[np.int64]
    ) -> list[JournalEntry] | None:
        first = next(lines, b"").rstrip(b"\n")
        if first.startswith(b'"'):
            raise ValueError(
                f"{self.folder} was written by an earlier version of this package, which did not record whether source "
                "files change; start from the beginning with --overwrite instead of --resume"
            )
        try:
            earlier = Identity(*_parse(first))
        except (ValueError, TypeError):
            return None
        if earlier.beton != identity.beton:
            if earlier.settings != identity.settings:
                return None
            raise ValueError(self._describe_other_files(source))
        entries: list[JournalEntry] = []
        for line in lines:
            try:
                entries.append(JournalEntry.from_json(_parse(line.rstrip(b"\n"))))
            except (ValueError, TypeError):  # damaged, cut off, or empty after the last line
                break
        if changed := _changed_files(entries, source, order):
            raise ValueError(
                f"{format_count(len(changed), 'source file')} changed since {self.folder} was written: "
                f"{_some(source.location, changed)}; {_WAY_OUT}"
            )
        return entries

    def _describe_other_files(self, source: Source) -> str:
        """Return which source files were added or removed since the earlier attempt."""
        with suppress(OSError):
            before = Names.of_lines(self.sources.read_bytes())
            then, now = (np.fromiter(map(hash, names), np.int64) for names in (before, names_of(source)))
            removed = [before[index] for index in np.flatnonzero(~np.isin(then, now)).tolist()]
            added = [source.name(index) for index in np.flatnonzero(~np.isin(now, then)).tolist()]
            changes = [
                f"{format_count(len(names), 'source file')} {change}: {_some(source.location, sorted(names))}"
                for change, names in (("added", added), ("removed", removed))
                if names
            ]
            if changes:
                return f"since {self.folder} was written: {', and '.join(changes)}; {_WAY_OUT}"
        return f"{self.folder} was written for other classes or another order of the source files; {_WAY_OUT}"

    def begin(self, identity: Identity, source: Source | None = None, kept: Sequence[JournalEntry] = ()) -> None:
        """Start a new journal with the entries to keep; without any, remove all files of the earlier attempt.

        source: all images; None: the conversion cannot be resumed.
        """
        if not kept:
            self.path.unlink(missing_ok=True)  # first: a journal must not outlive its pages
            for path in self.folder.iterdir():
                path.unlink()
        if source is not None:
            write_file_list(self.sources, encode_file_list(names_of(source)))
        new = self.folder / "pages.new"
        with open(new, "wb") as file:
            file.write(_format(list(identity)))
            file.writelines(_format(entry.to_json()) for entry in kept)
        new.replace(self.path)

    def append(self, entry: JournalEntry) -> None:
        """Add an entry."""
        with open(self.path, "ab") as file:
            file.write(_format(entry.to_json()))

    def num_done(self, identity: str) -> int:
        """Return the number of images that an attempt at this .beton has saved or skipped so far.

        identity: of the .beton.   Another process may be writing.
        """
        with suppress(OSError, ValueError, TypeError), open(self.path, "rb") as file:
            if Identity(*_parse(file.readline().rstrip(b"\n"))).beton == identity and (line := _last_line(file)):
                return JournalEntry.from_json(_parse(line)).num_done
        return 0

    def remove(self) -> None:
        """Remove the folder. No process may write there."""
        self.path.unlink(missing_ok=True)  # first: a journal must not outlive its pages
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def num_pages(self) -> int:
        """Pages from which another attempt can continue."""
        with suppress(OSError), open(self.path, "rb") as file:
            return max(sum(part.count(b"\n") for part in iter(lambda: file.read(_TAIL), b"")) - 1, 0)
        return 0


_WAY_OUT = (
    "what was converted so far has the former ones; restore them, or start from the beginning with --overwrite instead "
    "of --resume"
)
_TAIL = 1 << 16  # bytes that are read at once
_PART = 1000  # files for a thread
_NUM_THREADS = 16  # that read the state of files where each takes long: on a network disk about a millisecond
_SLOW_S = 1e-4


def _format(content: list[Any]) -> bytes:
    """Return a line of JSON behind its CRC-32."""
    text = json.dumps(content, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Any:
    """Return the content of a line. Raises ValueError if it is incomplete or damaged."""
    crc32, _, text = line.partition(b" ")
    if crc32 != b"%08x" % zlib.crc32(text):
        raise ValueError("damaged")
    return json.loads(text)


def _last_line(file: BinaryIO) -> bytes:
    """Return the last whole line after the current position, without its line feed; b'' if there is none."""
    start, at, tail = file.tell(), file.seek(0, os.SEEK_END), b""
    while at > start and tail.count(b"\n") < 2:
        at = max(start, at - max(_TAIL, len(tail)))
        file.seek(at)
        tail = file.read()
    whole = tail[: tail.rfind(b"\n") + 1]
    return whole[:-1].rpartition(b"\n")[2]


def _changed_files(entries: Sequence[JournalEntry], source: Source, order: NDArray[np.int64]) -> list[str]:
    """Return the names of the images of these pages whose files are not as they were."""
    stamps = np.concatenate([np.empty((0, 2), np.int64), *(entry.stamps for entry in entries)])

    def changed(start: int) -> list[str]:
        part = slice(start, min(start + _PART, len(stamps)))
        both = zip(order[part].tolist(), stamps[part].tolist(), strict=True)
        return [source.name(index) for index, stamp in both if [*source.stamp(index)] != stamp]

    found, start, slow = [], 0, False
    while start < len(stamps) and not slow:  # threads only hinder each other where the system answers at once
        began = time.monotonic()
        found += changed(start)
        start, slow = start + _PART, time.monotonic() - began > _PART * _SLOW_S
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return found + [name for names in pool.map(changed, range(start, len(stamps), _PART)) for name in names]


def _some(location: Path, names: Sequence[str]) -> str:
    return ", ".join(str(location / name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


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
