"""This machine: processor, memory, page cache and folders for caches, as far as this process may use them.

Limits of control groups (containers, Slurm) count: versions 1 and 2, of the process's own group and of all groups
above it. `root` is the folder with proc/ and sys/.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.formatting import format_bytes

PAGE = mmap.PAGESIZE
_ROOT = Path("/")
_MAX_SHARE = 0.9  # of available memory, for data; the rest is for the processes themselves
_MEMORY_FILES = {  # version of control groups -> limit, usage, prefix of the names in memory.stat
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}
_libc = ctypes.CDLL(None, use_errno=True)


# --- Processor --------------------------------------------------------------------------------------------


def available_cores(root: Path = _ROOT) -> int:
    """Return the number of processor cores this process may use: its affinity, at most the quota (rounded up)."""
    cores = len(os.sched_getaffinity(0))
    for group, version in _groups(root, "cpu"):
        if version == 2:
            quota, period = [*(_read(group / "cpu.max") or "").split(), "", ""][:2]
        else:
            quota, period = (_read(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # no limit: "max" or -1
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def processor_name(root: Path = _ROOT) -> str:
    """Return the processor's name, or its architecture if the system does not name it."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def instruction_sets(root: Path = _ROOT) -> str:
    """Return the processor's name and instruction sets in one line: code compiled for it runs where this is equal."""
    first = (_read(root / "proc/cpuinfo") or "").partition("\n\n")[0].splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
    names = ("model name", "CPU implementer", "CPU part", "flags", "Features")  # as Intel, AMD and Arm are described
    return " ".join([platform.machine(), *(values[name] for name in names if name in values)])


def machine_id(root: Path = _ROOT) -> str:
    """Return what processes on the same running system have in common, also in different containers."""
    return _read(root / "proc/sys/kernel/random/boot_id") or platform.node()


def near_cores(pci_address: str, root: Path = _ROOT) -> frozenset[int]:
    """Return the cores near a PCI device, e.g. 0000:17:00.0: its own list, or its NUMA node's; empty if unknown."""
    device = root / "sys/bus/pci/devices" / pci_address
    node = _read(device / "numa_node")  # -1: unknown
    return parse_cores(_read(device / "local_cpulist") or "") or parse_cores(
        _read(root / f"sys/devices/system/node/node{node}/cpulist") or ""
    )


def parse_cores(text: str) -> frozenset[int]:
    """Return the cores of a list as in /sys: 0-3,8."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return frozenset(core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1))


def format_cores(cores: Iterable[int]) -> str:
    """Return cores as a list as in /sys."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and core == ranges[-1][-1] + 1:
            ranges[-1][1:] = [core]
        else:
            ranges.append([core])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def share_cores(usable: Sequence[frozenset[int]], root: Path = _ROOT) -> list[frozenset[int]]:
    """Divide cores among processes: each gets a part of those it can use, as equally as possible, in one piece.

    usable: for each process; may be equal, overlap or be empty. Hardware threads of one physical core stay together. A
    process for which none is left, because there are fewer cores than processes, gets all that it can use.
    """
    wanted: dict[int, list[int]] = {}  # physical core -> its hardware threads
    for core in sorted(frozenset().union(*usable)):
        siblings = parse_cores(_read(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or "")
        wanted.setdefault(min(siblings, default=core), []).append(core)
    alike: dict[tuple[int, ...], list[list[int]]] = {}  # processes -> cores that exactly these can use
    for threads in wanted.values():
        users = tuple(i for i, cores in enumerate(usable) if not cores.isdisjoint(threads))
        alike.setdefault(users, []).append(threads)
    shares: list[list[list[int]]] = [[] for _ in usable]
    for users, cores in sorted(alike.items(), key=lambda item: len(item[0])):
        sizes = {i: len(shares[i]) for i in users}
        for _ in cores:
            sizes[min(sizes, key=sizes.__getitem__)] += 1
        left = iter(cores)
        for i in users:
            shares[i] += islice(left, sizes[i] - len(shares[i]))
    return [
        frozenset(core for threads in share for core in threads) & cores or cores
        for share, cores in zip(shares, usable, strict=True)
    ]


# --- Memory -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Memory that can be filled without swapping; the page cache counts as free."""

    num_bytes: int
    limited_by: str  # in words, for messages
    locked: int  # bytes locked by processes: locked pages of a file need no additional memory


def available_memory(root: Path = _ROOT) -> AvailableMemory:
    """Return the minimum of /proc/meminfo's MemAvailable and the free memory of each control group."""
    meminfo = _numbers(root / "proc/meminfo")
    free, limited_by = meminfo["MemAvailable:"] * 1024, "on this machine"
    for group, version in _groups(root, "memory"):
        limit_name, usage_name, prefix = _MEMORY_FILES[version]
        limit = _read(group / limit_name)
        if limit is None or not limit.isdigit():  # "max"
            continue
        usage, counts = int(_read(group / usage_name) or 0), _numbers(group / "memory.stat")
        cache = sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        free_here = max(0, int(limit) - usage + cache)
        if free_here < free:
            free, limited_by = free_here, f"under the limit of {format_bytes(int(limit))} in {group / limit_name}"
    return AvailableMemory(free, limited_by, meminfo.get("Mlocked:", 0) * 1024)


def fit_in_memory(files: Sequence[Path], num_in_memory: int, available: AvailableMemory) -> bool:
    """Return whether files fit into memory, beside the processes; num_in_memory: bytes of them that are there now."""
    return sum(file.stat().st_size for file in files) <= _MAX_SHARE * _num_free(num_in_memory, available)


def _num_free(num_in_memory: int, available: AvailableMemory) -> int:
    return available.num_bytes + min(num_in_memory, available.locked)


def describe_need(data_cache: str, files: Sequence[Path], num_in_memory: int, available: AvailableMemory) -> str:
    """Describe in one line how much memory the files need to be read from disk only once, and how much there is.

    num_in_memory: bytes of the files that are in memory already.
    Raises ValueError if data_cache is ram and they do not fit.
    """
    need = sum(file.stat().st_size for file in files)
    free = _num_free(num_in_memory, available)
    named = " and ".join(file.name for file in files)
    there_is = f"{format_bytes(free)} are available {available.limited_by}"
    if data_cache == "process":
        return f"data_cache = process: {named}, {format_bytes(need)}, are read through buffers in memory; {there_is}"
    line = f"data_cache = {data_cache}: {named} take {format_bytes(need)} of memory, {there_is}"
    if fit_in_memory(files, num_in_memory, available):
        return line
    if data_cache == "ram":
        raise ValueError(
            f"{line}, {_MAX_SHARE:.0%} of it at most for data; use --data_cache os, with --order quasi_random if the "
            "disk is slow at random reads"
        )
    return f"{line}: each epoch reads from the disk; --order quasi_random does so in large pieces"


# --- Page cache -------------------------------------------------------------------------------------------


def resident_pages(address: int, num_bytes: int) -> NDArray[np.bool_]:
    """Return whether each page of a mapping is in the page cache.

    address: of the mapping, at the start of a page.   Raises OSError if the system call mincore fails.
    For files of other users mincore reports every page as resident.
    """
    pages = np.zeros(-(-num_bytes // PAGE), np.uint8)
    if _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), pages.ctypes.data_as(ctypes.c_void_p)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return (pages & 1).astype(bool)


def num_bytes_in_memory(path: Path) -> int:
    """Return the bytes of `path` in the page cache, whole pages."""
    if not path.stat().st_size:
        return 0
    mapping = np.memmap(path, dtype=np.uint8, mode="r")
    return int(np.count_nonzero(resident_pages(mapping.ctypes.data, len(mapping)))) * PAGE


def evict(path: Path) -> None:
    """Remove a file from the page cache. Raises OSError if more than 2 % of it stays, as on a tmpfs."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {path.resolve()}"):  # pages that this process has touched in a mapping would stay
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if num_bytes_in_memory(path) > path.stat().st_size // 50:
        raise OSError(f"{path} stays in memory: cannot measure cold reads on this file system")


# --- File systems -----------------------------------------------------------------------------------------

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_ON_NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "afs",
    "9p",
    "wekafs",
    "panfs",
)


def file_system(path: Path, root: Path = _ROOT) -> str:
    """Return the type of a path's file system: ext4, tmpfs, nfs4, ..., or unknown."""
    lines = (_read(root / "proc/self/mounts") or "").splitlines()
    mounts = [(mount.replace("\\040", " "), kind) for _, mount, kind, *_ in map(str.split, lines)]
    place = path.resolve()
    holding = [(len(mount), i, kind) for i, (mount, kind) in enumerate(mounts) if place.is_relative_to(mount)]
    return max(holding, default=(0, 0, "unknown"))[2]


def is_in_memory(path: Path, root: Path = _ROOT) -> bool:
    """Return whether a path's file system keeps its files in memory."""
    return file_system(path, root) in _IN_MEMORY


def is_on_network(path: Path, root: Path = _ROOT) -> bool:
    """Return whether a path's file system is known to be shared over a network."""
    kind = file_system(path, root)
    return kind in _ON_NETWORK or kind.startswith("fuse.sshfs")


# --- Caches -----------------------------------------------------------------------------------------------


def cache_folder(name: str, base: str | None = None) -> Path | None:
    """Return the folder `name` among this package's caches, created; None if it cannot be written.

    base: parent of this package's caches; none: the user's cache folder, XDG_CACHE_HOME or ~/.cache.
    """
    folder = Path(base or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffcv_convnext" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


# --- Files of the kernel ----------------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the control groups that hold this process, innermost first, each with its version.

    In a container the path in /proc may not be visible; then the mount itself is the container's group.
    """
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, version = (mount / controller, 1) if controllers else (mount, 2)
        own = PurePosixPath(path.lstrip("/"))
        for part in dict.fromkeys((own, *own.parents)):
            yield base / part, version


def _numbers(path: Path) -> dict[str, int]:
    """Return the lines 'name number ...' of a file; empty if it is missing."""
    words = [line.split() for line in (_read(path) or "").splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _read(path: Path) -> str | None:
    """Return a file's text, or None if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
