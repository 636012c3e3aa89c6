"""Copies of a run's .beton files on a disk of the node, or in its memory (settings stage_to and stage_evict).

    PLACE/ffcv_convnext-UID/
        KEY/           a complete copy: the .beton files, their manifests and lists of original files, and copy.json
        KEY.partial/   an incomplete one: copy.json, and for each file NAME.partial and NAME.ranges
        KEY.lock       locked by the process that writes or removes the copy, shared by processes that read it; its
                       modification time is the copy's last use

KEY is a hash of the manifests, which state the sizes and the checksums of all pages, so other data has another copy.
NAME.ranges has a byte for each range of the file, 1 once the range is written and its pages have the right checksums: a
copy that was interrupted goes on with the other ranges. The operating system releases a lock when its process ends,
however it ends; then another process goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.beton import Manifest, Split
from ffcv_convnext.data.beton.layout import read_header
from ffcv_convnext.errors import FULL_DISK, Failure
from ffcv_convnext.files import Damaged, Form, read_object, write_atomically, write_object
from ffcv_convnext.formatting import format_bytes, format_duration
from ffcv_convnext.host import available_memory, file_system, is_in_memory, is_on_network, machine_id
from ffcv_convnext.run_folder import try_lock

log = logging.getLogger(__name__)

AUTO = "auto"
RECORD = "copy.json"
PARTIAL = ".partial"
RANGE_BYTES = 32 << 20  # whole pages, at least one; what is copied again after a kill, for each of the threads
_PIECE = 4 << 20  # bytes of one read
_NUM_THREADS = 8  # a network disk needs several reads at the same time
_MEMORY_SHARE = 0.9  # of available memory, for a copy in memory; the rest is for the processes
_TAKE_OVER_S = 5.0  # local rank 0 copies; if nobody holds the lock for this long, another process does
_POLL_S = 0.2
_LINE_S = 10.0  # between lines about the progress
_COPY = Form({"files": dict, "num_bytes": int, "source": str, "machine": str})


class NoRoom(ValueError):
    """A place has too little room for a copy, or cannot hold one; the message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Where a run reads its data."""

    folder: Path  # with the .beton files
    source: Path  # the folder that data_path names
    how: Literal["copied", "found", "original"]
    num_bytes: int  # of the files
    seconds: float  # until the copy was ready, with waiting for another process

    def facts(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, for run.json."""
        return {
            "folder": str(self.folder),
            "source": str(self.source),
            "how": self.how,
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
        }


@contextmanager
def stage_data(
    config: DataConfig, splits: Sequence[Split] = ("train", "val"), *, local_rank: int = 0
) -> Iterator[tuple[DataConfig, Staged | None]]:
    """Yield the config to load from, and what was done; the copy is not removed by others while the block runs.

    With stage_to, data_path is the folder of a copy on this node. The process with local_rank 0 makes it if it is
    missing; the others of the node, also those of other runs, wait for it. Does not use the process group. Without
    stage_to the config is unchanged, and None is yielded. With stage_to auto and no place for a copy, the data stays
    where it is, with one warning.

    Raises FileNotFoundError or ValueError if there is no usable data or no place for a copy; Failure if a page of the
    original does not match its checksum, or a disk fails.
    """
    if config.stage_to is None or config.data_path is None:  # the loader reports a missing data_path
        yield config, None
        return
    original = _Original.of(config.data_path, splits)
    started = time.perf_counter()
    with ExitStack() as held:
        found: tuple[Path, bool] | None = None
        reasons: list[str] = []
        for place in _places(config.stage_to, original, reasons):
            try:
                found = _Place(place, original, config.stage_evict).use(held, may_copy=local_rank == 0)
                break
            except NoRoom as error:
                if config.stage_to != AUTO:
                    raise
                reasons.append(str(error))
        seconds = time.perf_counter() - started
        if found is None:
            log.warning("stage_to = auto: training reads the original in %s: %s", original.folder, "; ".join(reasons))
            yield config, Staged(original.folder, original.folder, "original", original.num_bytes, seconds)
            return
        folder, is_new = found
        how: Literal["copied", "found"] = "copied" if is_new else "found"
        yield replace(config, data_path=folder), Staged(folder, original.folder, how, original.num_bytes, seconds)


# --- What is copied -----------------------------------------------------------------------------------------------


class _Original(NamedTuple):
    """The files to copy, as their manifests describe them."""

    folder: Path
    manifests: Mapping[Split, Manifest]
    contents: Mapping[Split, bytes]  # of the manifests' files

    @classmethod
    def of(cls, folder: Path, splits: Sequence[Split]) -> _Original:
        """Read the manifests. Raises FileNotFoundError or ValueError if a file or its manifest cannot be used."""
        folder = folder.absolute()
        manifests = {split: Manifest.for_beton(folder / f"{split}.beton") for split in splits}
        return cls(folder, manifests, {split: (folder / f"{split}.json").read_bytes() for split in splits})

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each split's manifest."""
        return {split: hashlib.sha256(content).hexdigest() for split, content in self.contents.items()}

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(sorted(self.hashes.items())).encode()).hexdigest()[:16]

    @property
    def num_bytes(self) -> int:
        """Size of the .beton files."""
        return sum(manifest.num_bytes for manifest in self.manifests.values())

    @property
    def names(self) -> str:
        return " and ".join(f"{split}.beton" for split in self.manifests)

    def beton(self, split: Split) -> Path:
        return self.folder / f"{split}.beton"

    def list_bytes(self) -> int:
        """Return the size of the small files beside the .beton files."""
        lists = [Manifest.files_path_for(self.beton(split)) for split in self.manifests]
        return sum(map(len, self.contents.values())) + sum(path.stat().st_size for path in lists if path.is_file())

    def record(self) -> dict[str, Any]:
        """Return the content of copy.json. On another machine, or after a restart, an incomplete copy is not used."""
        stamps = {split: self.beton(split).stat() for split in self.manifests}
        files = {
            split: {"manifest": self.hashes[split], "num_bytes": stamp.st_size, "mtime_ns": stamp.st_mtime_ns}
            for split, stamp in stamps.items()
        }
        total = self.num_bytes
        return {"source": str(self.folder), "files": files, "num_bytes": total, "machine": machine_id()}


class _Range(NamedTuple):
    """A part of a file that is copied at once."""

    start: int  # address, bytes
    size: int
    first_page: int | None  # the number of its first page; None: it holds no pages, but tables


def _ranges(beton: Path, manifest: Manifest) -> list[_Range]:
    """Cut a file into the tables before its pages, groups of whole pages, and the table behind them."""
    end, page = int(read_header(beton)["alloc_table_ptr"]), manifest.page_bytes
    start = end - len(manifest.page_crc32) * page
    group = max(1, RANGE_BYTES // page) * page
    return [
        *(_Range(at, min(RANGE_BYTES, start - at), None) for at in range(0, start, RANGE_BYTES)),
        *(_Range(at, min(group, end - at), (at - start) // page) for at in range(start, end, group)),
        *(
            _Range(at, min(RANGE_BYTES, manifest.num_bytes - at), None)
            for at in range(end, manifest.num_bytes, RANGE_BYTES)
        ),
    ]


# --- Where it is copied to ----------------------------------------------------------------------------------------


def _places(stage_to: str, original: _Original, reasons: list[str]) -> Iterator[Path]:
    """Yield the folders to try; for auto those that hold a copy first. Adds why others are left out to `reasons`.

    Raises ValueError if the folder that stage_to names cannot be used.
    """
    if stage_to != AUTO:
        yield _resolve(stage_to)
        return
    usable: list[Path] = []
    for name, text in _candidates().items():
        place = Path(text)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            reasons.append(f"{name} = {text} is not a writable folder")
        elif is_on_network(place):
            reasons.append(f"{name} = {text} is on a network ({file_system(place)})")
        elif _on_one_disk(place, original.folder):
            reasons.append(f"{name} = {text} is on the disk of the original")
        else:
            usable.append(place)
    yield from sorted(usable, key=lambda place: not _holds(place, original))  # stable: the others keep their order


def _candidates() -> dict[str, str]:
    """Return the places for auto, by where they come from: the job's scratch folder, then memory."""
    named = {name: os.environ[name] for name in ("SLURM_TMPDIR", "TMPDIR") if os.environ.get(name)}
    return {**named, "memory": "/dev/shm"}


def _on_one_disk(place: Path, folder: Path) -> bool:
    return place.stat().st_dev == folder.stat().st_dev


def _resolve(stage_to: str) -> Path:
    """Return the folder that stage_to names on this node."""
    place = Path(os.path.expandvars(stage_to)).expanduser()
    if "$" in str(place):
        raise ValueError(
            f"stage_to = {stage_to}: the variable is not set on {socket.gethostname()}; set it, or use auto"
        )
    if not place.is_dir():
        raise ValueError(
            f"stage_to = {place} does not exist on {socket.gethostname()}; create it, or use another folder or auto"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"stage_to = {place} cannot be written on {socket.gethostname()}; use another folder or auto")
    return place


def staging_root(place: Path) -> Path:
    """Return the folder of this user's copies in a place."""
    return place / f"ffcv_convnext-{os.getuid()}"


def _holds(place: Path, original: _Original) -> bool:
    """Return whether a place has a copy, complete or not."""
    root = staging_root(place)
    return _find(root, original) is not None or (root / f"{original.key}{PARTIAL}").is_dir()


def _find(root: Path, original: _Original) -> Path | None:
    """Return a complete copy that has all files of the original, among others; None if there is none."""
    own = root / original.key
    for record in sorted(root.glob(f"*/{RECORD}"), key=lambda path: path.parent != own):
        if record.parent.name.endswith(PARTIAL):
            continue
        try:
            files = (read_object(record, _COPY) or {}).get("files", {})
        except Damaged:
            continue
        hashes = {split: entry.get("manifest") for split, entry in files.items() if isinstance(entry, dict)}
        if original.hashes.items() <= hashes.items():
            return record.parent
    return None


def room_in(place: Path) -> tuple[int, str]:
    """Return the bytes that can be written in a folder, and in words where they are."""
    disk = os.statvfs(place)
    free, where = disk.f_bavail * disk.f_frsize, f"on its file system ({file_system(place)})"
    if is_in_memory(place):
        memory = available_memory()
        in_memory = int(_MEMORY_SHARE * memory.num_bytes)
        if in_memory < free:
            free, where = in_memory, f"of memory ({_MEMORY_SHARE:.0%} of what is available {memory.limited_by})"
    return free, where


def planned_place(config: DataConfig) -> Path:
    """Return the folder in which `stage_data` would look for the copy, or make it. Writes nothing.

    Raises NoRoom if there is none, and FileNotFoundError or ValueError as `stage_data` does.
    """
    assert config.stage_to is not None
    assert config.data_path is not None
    splits: list[Split] = ["train", "val"]
    original = _Original.of(config.data_path, [s for s in splits if (config.data_path / f"{s}.beton").is_file()])
    reasons: list[str] = []
    for place in _places(config.stage_to, original, reasons):
        free, where = room_in(place)
        if _holds(place, original) or original.num_bytes <= free:
            return place
        need, have = format_bytes(original.num_bytes), format_bytes(free)
        reasons.append(f"{place} has no room: {original.names} need {need}, and {have} are free {where}")
    raise NoRoom(f"stage_to = {config.stage_to}: {'; '.join(reasons)}")


class _Place:
    """The copies in one place."""

    def __init__(self, place: Path, original: _Original, evict: bool) -> None:
        self.place = place
        self.original = original
        self.evict = evict
        self.root = staging_root(place)
        self.root.mkdir(mode=0o700, exist_ok=True)
        if self.root.stat().st_uid != os.getuid():
            raise NoRoom(f"stage_to = {place}: {self.root} belongs to another user; use another folder")

    def use(self, held: ExitStack, *, may_copy: bool) -> tuple[Path, bool]:
        """Return the folder of the complete copy, and whether this process made it. `held` keeps it from removal.

        may_copy: make it if it is missing; otherwise wait for the process that does, and take over if there is none.
        """
        started = last_line = time.monotonic()
        idle_since: float | None = None
        is_new = False
        while True:
            folder = _find(self.root, self.original)
            if folder is not None and (lock := self._lock(folder.name, fcntl.LOCK_SH)) is not None:
                if _find(self.root, self.original) == folder and self._is_good(folder):
                    os.utime(lock.fileno())
                    held.enter_context(lock)
                    if not is_new:
                        self._announce_found(folder, time.monotonic() - started)
                    return folder, is_new
                lock.close()
                self._remove_damaged(folder)
            now = time.monotonic()
            if may_copy or (idle_since is not None and now - idle_since > _TAKE_OVER_S):
                with self._open(self.original.key) as lock:
                    if try_lock(lock, fcntl.LOCK_EX) == "free":
                        if _find(self.root, self.original) is None:
                            self._name_holder(lock)
                            self._copy()
                            is_new = True
                        continue
            is_held = self._is_locked(self.original.key)
            idle_since = None if is_held else idle_since or now
            if is_held and now - last_line >= _LINE_S:
                last_line = now
                log.info("waiting for %s, which copies the data: %s", self._holder(), self._progress())
            time.sleep(_POLL_S)

    def _announce_found(self, folder: Path, seconds: float) -> None:
        waited = f", ready after {seconds:.1f} s" if seconds > 1 else ""
        log.info(
            "stage_to = %s: found the copy of %s in %s, %s%s",
            self.place, self.original.names, folder, format_bytes(self.original.num_bytes), waited,
        )  # fmt: skip

    # --- Locks

    def _open(self, key: str) -> IO[str]:
        return open(self.root / f"{key}.lock", "a+", errors="replace")

    def _lock(self, key: str, kind: int) -> IO[str] | None:
        """Return the open lock file of a copy, locked; None if another process holds it."""
        lock = self._open(key)
        state = try_lock(lock, kind)
        if state == "unsupported":
            lock.close()
            raise NoRoom(
                f"stage_to = {self.place}: its file system ({file_system(self.place)}) has no locks; use a local disk"
            )
        if state == "held":
            lock.close()
            return None
        return lock

    def _is_locked(self, key: str) -> bool:
        """Return whether a process copies or removes."""
        lock = self._lock(key, fcntl.LOCK_SH)
        if lock is None:
            return True
        lock.close()
        return False

    def _name_holder(self, lock: IO[str]) -> None:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()

    def _holder(self) -> str:
        with self._open(self.original.key) as lock:
            lock.seek(0)
            return lock.read().strip() or "another process"

    def _progress(self) -> str:
        """Return how much of the copy is there, in words."""
        partial, done = self.root / f"{self.original.key}{PARTIAL}", 0
        for split, manifest in self.original.manifests.items():
            try:
                flags = (partial / f"{split}.ranges").read_bytes()
            except OSError:
                continue
            done += int(manifest.num_bytes * flags.count(1) / max(1, len(flags)))
        return f"{format_bytes(done)} of {format_bytes(self.original.num_bytes)}"

    # --- Complete copies

    def _is_good(self, folder: Path) -> bool:
        """Return whether sizes and tables of a copy are right; warn if not."""
        try:
            for split in self.original.manifests:
                Manifest.check(folder / f"{split}.beton")
        except (ValueError, OSError) as error:
            log.warning("stage_to = %s: the copy is damaged and is made again: %s", self.place, error)
            return False
        return True

    def _remove_damaged(self, folder: Path) -> None:
        """Remove a copy. Raises NoRoom if others read it, which have found no damage in the parts that they use."""
        deadline = time.monotonic() + _TAKE_OVER_S
        while folder.is_dir() and not self._is_locked(folder.name):
            if (lock := self._lock(folder.name, fcntl.LOCK_EX)) is not None:
                with lock:
                    self._remove(folder.name)
            elif time.monotonic() > deadline:
                raise NoRoom(
                    f"stage_to = {self.place}: the copy in {folder} is damaged and in use by another run; wait for "
                    "it, or use another folder"
                )
            time.sleep(_POLL_S)

    def _remove(self, key: str) -> int:
        """Remove a copy, complete or not, whose lock this process holds; return the bytes that it took."""
        folder, partial = self.root / key, self.root / f"{key}{PARTIAL}"
        taken = sum(_taken(path) for each in (folder, partial) for path in each.glob("*"))
        shutil.rmtree(partial, ignore_errors=True)
        if folder.is_dir():
            folder.rename(partial)  # from here on nothing takes it for a complete copy
            shutil.rmtree(partial)
        return taken

    def _make_room(self, need: int) -> None:
        """Check that `need` bytes fit; with stage_evict, remove unused copies, the least recently used first.

        Raises NoRoom.
        """
        free, where = room_in(self.place)
        if need > free and self.evict:
            keys = {path.name.removesuffix(PARTIAL) for path in self.root.iterdir() if path.is_dir()}
            locks = {key: self.root / f"{key}.lock" for key in keys - {self.original.key}}
            for key in sorted(locks, key=lambda key: locks[key].stat().st_mtime if locks[key].exists() else 0.0):
                if (lock := self._lock(key, fcntl.LOCK_EX)) is None:
                    continue  # in use
                with lock:
                    taken = self._remove(key)
                log.info("stage_evict = true: removed an unused copy in %s, %s", self.root / key, format_bytes(taken))
                free, where = room_in(self.place)
                if need <= free:
                    break
        if need > free:
            others = any(path.is_dir() and path.name != f"{self.original.key}{PARTIAL}" for path in self.root.iterdir())
            remedy = "make room, or use another folder or --stage_to auto"
            if others and not self.evict:
                remedy = f"remove unused copies in {self.root} with --stage_evict true, or use another folder"
            raise NoRoom(
                f"stage_to = {self.place}: {self.original.names} need {format_bytes(need)}, but "
                f"{format_bytes(free)} are free {where}; {remedy}"
            )

    # --- Copying

    def _copy(self) -> None:
        """Make the copy, or go on with an incomplete one. This process holds the lock."""
        original = self.original
        for split in original.manifests:
            Manifest.check(original.beton(split))
        record, partial = original.record(), self.root / f"{original.key}{PARTIAL}"
        try:
            begun = read_object(partial / RECORD, _COPY)
        except Damaged:
            begun = None
        if begun != record:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o700)
            write_object(partial / RECORD, record)
        files = [_FileCopy(original.beton(split), each, partial) for split, each in original.manifests.items()]
        there = sum(file.num_done for file in files)
        try:
            self._make_room(original.num_bytes - there + original.list_bytes())
        except NoRoom:
            if not there:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        started = time.perf_counter()
        try:
            _copy_files(files, self.place)
            for split, content in original.contents.items():
                write_atomically(partial / f"{split}.json", content)
                listed = Manifest.files_path_for(original.beton(split))
                if listed.is_file():
                    shutil.copyfile(listed, partial / listed.name)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise Failure(f"stage_to = {self.place}: {partial} cannot be written: {error.strerror}") from None
            shutil.rmtree(partial, ignore_errors=True)
            raise NoRoom(f"stage_to = {self.place} is full; make room, or use another folder") from None
        if original.record()["files"] != record["files"]:
            shutil.rmtree(partial, ignore_errors=True)
            raise Failure(f"{original.folder}: the data changed while it was copied to {self.place}; start again")
        for file in files:
            file.finish()
        partial.rename(self.root / original.key)
        _sync_folder(self.root)
        os.utime(self.root / f"{original.key}.lock")
        seconds, copied = time.perf_counter() - started, original.num_bytes - there
        before = f"; {format_bytes(there)} were there from an interrupted copy" if there else ""
        unchecked = [f"{split}.beton" for split, each in original.manifests.items() if not each.page_crc32]
        checked = f"{' and '.join(unchecked)} without checksums" if unchecked else "all pages match their checksums"
        log.info(
            "stage_to = %s: copied %s, %s in %.1f s (%s/s), %s%s",
            self.place, original.names, format_bytes(copied), seconds, format_bytes(copied / max(seconds, 1e-9)),
            checked, before,
        )  # fmt: skip


def _taken(path: Path) -> int:
    """Return the bytes that a file takes on its disk."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _FileCopy:
    """The copy of one file, complete or not."""

    def __init__(self, beton: Path, manifest: Manifest, partial: Path) -> None:
        self.beton = beton
        self.manifest = manifest
        self.target = partial / f"{beton.name}{PARTIAL}"
        self.flags = partial / f"{beton.stem}.ranges"
        self.ranges = _ranges(beton, manifest)
        flags = self.flags.read_bytes() if self.flags.is_file() else b""
        if (partial / beton.name).is_file():  # a kill came after `finish`
            self.missing, self.num_done = [], manifest.num_bytes
            return
        if len(flags) != len(self.ranges) or not self.target.is_file():
            flags = bytes(len(self.ranges))
            self.flags.write_bytes(flags)
        with open(self.target, "ab") as file:
            file.truncate(manifest.num_bytes)  # a sparse file
        self.missing = [number for number, flag in enumerate(flags) if flag != 1]
        self.num_done = sum(each.size for number, each in enumerate(self.ranges) if flags[number] == 1)

    def copy_range(self, number: int, source: int, target: int, flags: int, buffer: memoryview) -> int:
        """Copy a range and compare its pages with their checksums; return its size.

        source, target, flags: open files.   Raises Failure for a damaged page or a source that cannot be read, OSError
        if the target cannot be written.
        """
        part, page = self.ranges[number], self.manifest.page_bytes
        crc = 0
        at = part.start
        while at < part.start + part.size:
            end = part.start + part.size
            index = None
            if part.first_page is not None:
                index = part.first_page + (at - part.start) // page
                end = part.start + ((at - part.start) // page + 1) * page
            piece = buffer[: end - at]
            self._read(source, piece, at)
            crc = zlib.crc32(piece, crc)
            _write(target, piece, at)
            at += len(piece)
            if at == end:
                if index is not None and crc != self.manifest.page_crc32[index]:
                    raise Failure(
                        f"{self.beton}: page {index} differs from its checksum in the manifest, found while it was "
                        f"copied (stage_to): damaged; repair it with: ffcv-convnext verify {self.beton} --repair"
                    )
                crc = 0
        os.posix_fadvise(source, part.start, part.size, os.POSIX_FADV_DONTNEED)  # the copy is read from now on
        os.pwrite(flags, b"\1", number)
        return part.size

    def _read(self, source: int, piece: memoryview, start: int) -> None:
        done = 0
        try:
            while done < len(piece) and (num := os.preadv(source, [piece[done:]], start + done)):
                done += num
        except OSError as error:
            raise Failure(f"{self.beton} cannot be read at byte {start + done}: {error.strerror}; copy again") from None
        if done < len(piece):
            raise Failure(
                f"{self.beton} ends at byte {start + done}: it was cut off while it was copied; copy it again"
            )

    def finish(self) -> None:
        """Give the complete file its name, once it is on the disk."""
        if self.target.is_file():
            with open(self.target, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.target, self.target.with_name(self.beton.name))
        self.flags.unlink(missing_ok=True)
        _sync_folder(self.target.parent)


def _write(target: int, piece: memoryview, start: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(target, piece[done:], start + done)


def _copy_files(files: Sequence[_FileCopy], place: Path) -> None:
    """Copy what is missing, with several threads; log the progress."""
    total = sum(file.manifest.num_bytes for file in files)
    at_start = done = sum(file.num_done for file in files)
    began = last_line = time.monotonic()
    stop, own = threading.Event(), threading.local()

    def copy(file: _FileCopy, number: int, descriptors: tuple[int, int, int]) -> int:
        if stop.is_set():
            return 0
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(bytearray(_PIECE))
        return file.copy_range(number, *descriptors, own.buffer)

    with ExitStack() as opened:
        pool = opened.enter_context(ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="stage"))
        pending = set()
        try:
            for file in files:
                if not file.missing:
                    continue
                paths = ((file.beton, os.O_RDONLY), (file.target, os.O_WRONLY), (file.flags, os.O_WRONLY))
                source, target, flags = (os.open(path, mode) for path, mode in paths)
                for descriptor in (source, target, flags):
                    opened.callback(os.close, descriptor)
                pending |= {pool.submit(copy, file, number, (source, target, flags)) for number in file.missing}
            while pending:
                ended, pending = wait(pending, timeout=1.0, return_when="FIRST_EXCEPTION")
                done += sum(future.result() for future in ended)
                if (now := time.monotonic()) - last_line >= _LINE_S:
                    last_line = now
                    rate = (done - at_start) / (now - began)
                    log.info(
                        "copying to %s: %s of %s, %s/s, %s left",
                        place, format_bytes(done), format_bytes(total), format_bytes(rate),
                        format_duration((total - done) / rate if rate else None),
                    )  # fmt: skip
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)  # before the files are closed
