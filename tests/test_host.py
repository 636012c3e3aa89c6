"""What this process may use of the machine, and the page cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ffcv_convnext.config import Config
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.host import (
    AvailableMemory,
    available_cores,
    available_memory,
    describe_need,
    evict,
    file_system,
    format_cores,
    instruction_sets,
    is_in_memory,
    is_on_network,
    machine_id,
    near_cores,
    num_bytes_in_memory,
    parse_cores,
    processor_name,
    share_cores,
)

MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nMlocked:      500 kB\nHugePages_Total:  0\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
NESTED_V2 = {  # the limit of the parent is the lower one; its page cache can be given up
    "proc/self/cgroup": "0::/a/b\n",
    f"{V2}/a/b/memory.max": "6000000\n",
    f"{V2}/a/memory.max": "5000000\n",
    f"{V2}/a/memory.current": "3000000\n",
    f"{V2}/a/memory.stat": "anon 7\nfile 900\nactive_file 100000\ninactive_file 200000\n",
}
NESTED_V1 = {
    "proc/self/cgroup": "9:cpu:/\n4:cpuset,memory:/slurm/job\n0::/\n",
    f"{V1}/slurm/job/memory.limit_in_bytes": "2000000\n",
    f"{V1}/slurm/job/memory.usage_in_bytes": "1500000\n",
    f"{V1}/slurm/job/memory.stat": "active_file 9\ntotal_active_file 100000\ntotal_inactive_file 50000\n",
    f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
    f"{V1}/memory.usage_in_bytes": "700\n",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/memory.max": "max\n"}, 8000 * 1024),
        (NESTED_V2, 2_300_000),
        (  # a container sees its own group as the mount
            {"proc/self/cgroup": "0::/docker/x\n", f"{V2}/memory.max": "4000000", f"{V2}/memory.current": "1000000"},
            3_000_000,
        ),
        (NESTED_V1, 650_000),
    ],
)
def test_available_memory_is_the_minimum_over_the_machine_and_all_control_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    found = available_memory(write(tmp_path, {**MEMINFO, **files}))
    assert found.num_bytes == expected
    assert found.locked == 500 * 1024
    assert ("limit of" in found.limited_by) == (expected != 8000 * 1024)


@pytest.mark.parametrize(("files", "expected"), [(NESTED_V2, 2_300_000), (NESTED_V1, 650_000)])
def test_doctor_and_train_agree_on_available_memory(
    tmp_path: Path,
    small_settings: dict[str, Any],
    files: dict[str, str],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("ffcv.reader")
    from ffcv_convnext.data.load import TrainLoader
    from ffcv_convnext.doctor.diagnosis import describe_machine

    monkeypatch.setattr(available_memory, "__defaults__", (write(tmp_path, {**MEMINFO, **files}),))
    cpu = torch.device("cpu")
    assert describe_machine(cpu, load=0.0, step_memory_gb=None).memory_room_gb == expected / 1e9
    with caplog.at_level("INFO"):
        TrainLoader(Config.from_flat(small_settings).data, cpu, seed=0)
    assert f"{format_bytes(expected)} are available under the limit" in caplog.text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/cpu.max": "20000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/slurm/job\n",
                f"{V2}/cpu/slurm/job/cpu.cfs_quota_us": "-1\n",
                f"{V2}/cpu/slurm/job/cpu.cfs_period_us": "100000\n",
                f"{V2}/cpu/slurm/cpu.cfs_quota_us": "90000\n",
                f"{V2}/cpu/slurm/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
    ],
)
def test_available_cores_are_limited_by_affinity_and_every_quota(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    assert available_cores(write(tmp_path, files)) == (expected or len(os.sched_getaffinity(0)))


def test_this_machine_has_memory_cores_and_a_name() -> None:
    assert 0 < available_memory().num_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))
    assert processor_name()


def test_a_processor_without_a_name_has_its_architecture(tmp_path: Path) -> None:
    assert processor_name(tmp_path) == os.uname().machine
    assert processor_name(write(tmp_path, {"proc/cpuinfo": "processor: 0\nmodel name\t: One 9000\n"})) == "One 9000"


def test_locked_pages_of_a_file_need_no_additional_memory(tmp_path: Path) -> None:
    files = [tmp_path / "train.beton"]
    size = 1000
    files[0].write_bytes(bytes(size))
    assert describe_need("ram", files, size, AvailableMemory(size, "", locked=size // 2))
    with pytest.raises(ValueError, match="take"):
        describe_need("ram", files, 0, AvailableMemory(size, "", locked=size // 2))


def test_processors_with_other_instruction_sets_are_told_apart(tmp_path: Path) -> None:
    block = "processor: 0\nmodel name\t: One 9000\ncpu MHz: {mhz}\nflags\t\t: fpu avx{more}\n\nprocessor: 1\nflags: x\n"
    found = [
        instruction_sets(write(tmp_path, {"proc/cpuinfo": block.format(mhz=mhz, more=more)}))
        for mhz, more in ((1000, ""), (2000, ""), (1000, " avx512f"))
    ]
    assert found[0] == found[1] == f"{os.uname().machine} One 9000 fpu avx"
    assert found[2] == f"{found[0]} avx512f"
    assert "fpu" in instruction_sets() or os.uname().machine != "x86_64"


# --- Cores near a GPU -------------------------------------------------------------------------------------


def node_of(*, sockets: int, cores: int, gpus: int) -> dict[str, str]:
    """A made-up /sys: `cores` physical cores a socket with two hardware threads each, GPUs 0000:00 to 0000:GPUS-1."""
    files = {}
    for socket in range(sockets):
        first = range(socket * cores, (socket + 1) * cores)
        second = [core + sockets * cores for core in first]
        listed = f"{first[0]}-{first[-1]},{second[0]}-{second[-1]}\n"
        files[f"sys/devices/system/node/node{socket}/cpulist"] = listed
        for core, other in zip(first, second, strict=True):
            for each in (core, other):
                files[f"sys/devices/system/cpu/cpu{each}/topology/thread_siblings_list"] = f"{core},{other}\n"
        for gpu in range(socket * gpus // sockets, (socket + 1) * gpus // sockets):
            files[f"sys/bus/pci/devices/0000:{gpu:02x}:00.0/local_cpulist"] = listed
            files[f"sys/bus/pci/devices/0000:{gpu:02x}:00.0/numa_node"] = f"{socket}\n"
    return files


def near(root: Path, num: int) -> list[frozenset[int]]:
    return [near_cores(f"0000:{gpu:02x}:00.0", root) for gpu in range(num)]


def test_the_processes_of_a_node_share_the_cores_near_their_gpus_equally(tmp_path: Path) -> None:
    root = write(tmp_path, node_of(sockets=2, cores=12, gpus=8))
    shares = share_cores(near(root, 8), root)
    assert list(map(format_cores, shares)) == [
        f"{start}-{start + 2},{start + 24}-{start + 26}" for start in range(0, 24, 3)
    ]


def test_cores_that_a_process_may_not_use_are_not_in_its_share(tmp_path: Path) -> None:
    root = write(tmp_path, node_of(sockets=1, cores=8, gpus=4))
    bound = [parse_cores(f"{2 * i}-{2 * i + 1}") for i in range(4)]  # by Slurm, each task to cores of its own
    assert share_cores([n & b for n, b in zip(near(root, 4), bound, strict=True)], root) == bound
    half = parse_cores("0-3")  # one thread of each of four cores, for all
    shares = share_cores([n & half for n in near(root, 4)], root)
    assert shares == [frozenset([i]) for i in range(4)]


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (["0-3", "0-3"], ["0-1", "2-3"]),
        (["0-4", "0-4"], ["0-2", "3-4"]),
        (["0-7", "0-3"], ["4-7", "0-3"]),
        (["0-9", "0-3"], ["4-9", "0-3"]),
        (["0-4", "0-3"], ["0-1,4", "2-3"]),
        (["0", "0", "0-3"], ["0", "0", "1-3"]),
        (["", "0-3", "0-3"], ["", "0-1", "2-3"]),
        (["", ""], ["", ""]),
        ([], []),
    ],
)
def test_cores_are_shared_equally_in_pieces(tmp_path: Path, usable: list[str], expected: list[str]) -> None:
    assert list(map(format_cores, share_cores(list(map(parse_cores, usable)), tmp_path))) == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_share_is_usable_and_no_core_is_given_twice(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    masks = generator.random((generator.integers(1, 9), generator.integers(8, 65))) < generator.random()
    usable = [frozenset(np.flatnonzero(mask).tolist()) for mask in masks]
    shares = share_cores(usable, tmp_path)
    own = [share for share, cores in zip(shares, usable, strict=True) if share != cores]
    assert all(share <= cores for share, cores in zip(shares, usable, strict=True))
    assert all(bool(share) == bool(cores) for share, cores in zip(shares, usable, strict=True))
    assert sum(map(len, own)) == len(frozenset[int]().union(*own))


def test_cores_near_a_gpu_are_its_own_list_or_its_numa_nodes_or_unknown(tmp_path: Path) -> None:
    root = write(tmp_path, node_of(sockets=2, cores=2, gpus=2))
    gpu = root / "sys/bus/pci/devices/0000:01:00.0"
    assert near_cores("0000:01:00.0", root) == {2, 3, 6, 7}
    (gpu / "local_cpulist").unlink()
    assert near_cores("0000:01:00.0", root) == {2, 3, 6, 7}
    (gpu / "numa_node").write_text("-1\n")
    assert near_cores("0000:01:00.0", root) == frozenset()
    assert near_cores("0000:99:00.0", root) == frozenset()


def test_this_machine_lists_the_cores_near_its_pci_devices_as_this_package_does() -> None:
    for path in Path("/sys/bus/pci/devices").glob("*"):
        assert format_cores(near_cores(path.name)) == (path / "local_cpulist").read_text().strip()
    assert machine_id() == machine_id() != ""


# --- Page cache -------------------------------------------------------------------------------------------


def test_an_evicted_file_is_not_in_memory_even_if_it_is_mapped_and_was_touched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 << 20))
    mapping = np.memmap(path, dtype=np.uint8, mode="r")
    total = int(mapping[::4096].sum())
    assert num_bytes_in_memory(path) == 3 << 20
    try:
        evict(path)
    except OSError as error:
        pytest.skip(str(error))
    assert num_bytes_in_memory(path) == 0
    assert int(mapping[::4096].sum()) == total
    assert num_bytes_in_memory(path) > 0


def test_a_file_that_stays_in_memory_is_an_error() -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no file system in memory")
    path = folder / f"test-cold-{os.getpid()}"
    try:
        path.write_bytes(bytes(1 << 20))
        with pytest.raises(OSError, match="stays in memory: cannot measure cold reads"):
            evict(path)
    finally:
        path.unlink()


# --- File systems -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "in_memory", "on_network"),
    [
        ("/home/data", "ext4", False, False),
        ("/shm/x", "tmpfs", True, False),
        ("/nfs/a b/c", "nfs4", False, True),
        ("/shmother", "ext4", False, False),
        ("/lustre", "lustre", False, True),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_deepest_mount(
    path: str, kind: str, in_memory: bool, on_network: bool, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    mounts = "a / ext4 rw 0 0\nb /shm tmpfs rw 0 0\nc /nfs ext4 rw 0 0\n"
    mounts += "d /nfs/a\\040b nfs4 rw 0 0\ne /lustre lustre rw 0 0\n"
    (tmp_path / "proc/self/mounts").write_text(mounts)
    assert file_system(Path(path), tmp_path) == kind
    assert is_in_memory(Path(path), tmp_path) == in_memory
    assert is_on_network(Path(path), tmp_path) == on_network
