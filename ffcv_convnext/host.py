"""How much memory this process may fill with data: the machine's, and what control groups (containers, SLURM) leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ffcv_convnext.formatting import format_bytes

_SHARE = 0.9  # of what is available; the rest is for the processes themselves


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Memory that can be filled without swapping, the page cache counted as free."""

    num_bytes: int
    limited_by: str  # in words, for messages
    locked: int  # bytes that processes have locked: files among them need no second place


def available_memory(root: Path = Path("/")) -> AvailableMemory:
    """The least of /proc/meminfo's MemAvailable and of what each control group above this process leaves.

    root: where proc/ and sys/ are. Control groups of both versions are read, as far as they are visible.
    """
    meminfo = _numbers(root / "proc/meminfo")
    least, limited_by = meminfo["MemAvailable:"] * 1024, "of this machine"
    for group, limit_name, usage_name, prefix in _groups(root):
        limit = _word(group / limit_name)
        if limit is None or not limit.isdigit():  # "max"
            continue
        usage, counts = int(_word(group / usage_name) or 0), _numbers(group / "memory.stat")
        cache = sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        room = max(0, int(limit) - usage + cache)
        if room < least:
            least, limited_by = room, f"under the limit of {format_bytes(int(limit))} in {group / limit_name}"
    return AvailableMemory(least, limited_by, meminfo.get("Mlocked:", 0) * 1024)


def _groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the memory control groups that hold this process, with the names of limit and usage in them.

    Inside a container the path that the kernel states may not be visible; the container's own group is the mount then.
    """
    mount = root / "sys/fs/cgroup"
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = mount, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            base, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        below = PurePosixPath(path.lstrip("/"))
        for part in dict.fromkeys((below, *below.parents)):
            yield (base / part, *names)


def _numbers(path: Path) -> dict[str, int]:
    """The lines 'name number ...' of a file; nothing where it is missing."""
    if not path.exists():
        return {}
    words = [line.split() for line in path.read_text().splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _word(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def describe_need(data_cache: str, files: Sequence[Path], num_in_memory: int, available: AvailableMemory) -> str:
    """What files need of memory to be read from the disk once only, and what there is, in one line.

    num_in_memory: their bytes that are in memory already.
    Raises ValueError for data_cache ram when they do not fit.
    """
    need = sum(file.stat().st_size for file in files)
    room = available.num_bytes + min(num_in_memory, available.locked)
    fits = need <= _SHARE * room
    named = " and ".join(file.name for file in files)
    there_is = f"{format_bytes(room)} are available {available.limited_by}"
    if data_cache == "process":
        return f"data_cache = process: {named}, {format_bytes(need)}, are read through buffers in memory; {there_is}"
    line = f"data_cache = {data_cache}: {named} take {format_bytes(need)} of memory, {there_is}"
    if fits:
        return line
    if data_cache == "ram":
        raise ValueError(
            f"{line}, {_SHARE:.0%} of it at most for data; use --data_cache os, with --order quasi_random where the "
            "disk is slow at scattered reads"
        )
    return f"{line}: each epoch reads from the disk; --order quasi_random does so in large pieces"
