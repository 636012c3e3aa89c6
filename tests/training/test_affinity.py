"""Threads are really bound, to a GPU's cores from a made-up /sys: a machine without a GPU is enough."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import REPOSITORY
from support.runs import train_here

from ffcv_convnext.host import format_cores
from ffcv_convnext.training.affinity import bind_threads, pci_address
from ffcv_convnext.training.distributed import Processes

GPU = Processes(0, 1, 0, torch.device("cuda", 0))
FILES = "sys/bus/pci/devices/0001:0a:00.0"
ALLOWED = sorted(os.sched_getaffinity(0))


def cores_of_all_threads() -> set[str]:
    return {format_cores(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}


@pytest.fixture(autouse=True)
def _threads_are_freed_again() -> Iterator[None]:
    yield
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), ALLOWED)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in /sys of a made-up GPU."""
    found = SimpleNamespace(pci_domain_id=1, pci_bus_id=10, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    (tmp_path / FILES).mkdir(parents=True)
    return tmp_path / FILES


@pytest.mark.usefixtures("gpu")
def test_a_gpus_address_is_written_as_in_sys() -> None:
    assert pci_address(GPU.device) == "0001:0a:00.0"


def test_all_threads_are_bound_and_those_they_start(gpu: Path, tmp_path: Path) -> None:
    last = ALLOWED[-1]
    (gpu / "local_cpulist").write_text(f"{last},{last + 1000}\n")  # the second one does not exist
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(stop.wait)
        try:
            assert bind_threads(GPU, root=tmp_path) == [str(last)]
            assert cores_of_all_threads() == {str(last)}
            assert pool.submit(os.sched_getaffinity, 0).result() == {last}
            assert cores_of_all_threads() == {str(last)}
        finally:
            stop.set()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "/sys does not tell which cores are near GPU 0001:0a:00.0"),
        ({"numa_node": "-1"}, "/sys does not tell which cores are near GPU 0001:0a:00.0"),
        ({"local_cpulist": "1000-1001"}, "the cores near GPU 0001:0a:00.0, 1000-1001, are not among those allowed"),
    ],
)
def test_threads_stay_where_they_are_if_no_core_is_known_and_allowed(
    gpu: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, files: dict[str, str], reason: str
) -> None:
    for name, text in files.items():
        (gpu / name).write_text(text)
    with caplog.at_level("INFO", "ffcv_convnext"):
        assert bind_threads(GPU, root=tmp_path) == [None]
    assert caplog.messages == [f"threads are not bound to cores: {reason}"]
    assert cores_of_all_threads() == {format_cores(ALLOWED)}


TWO_PROCESSES = """
import json, os, sys, types
from pathlib import Path
import torch
from ffcv_convnext.training.affinity import bind_threads
from ffcv_convnext.training.distributed import Processes

rank, root, machine = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
found = types.SimpleNamespace(pci_domain_id=1, pci_bus_id=10, pci_device_id=0)
torch.cuda.get_device_properties = lambda device: found
Processes(rank, 2, rank, torch.device("cpu")).join()
(root / f"{rank}/proc/sys/kernel/random").mkdir(parents=True)
(root / f"{rank}/proc/sys/kernel/random/boot_id").write_text(machine)
(root / f"{rank}/sys").symlink_to(root / "sys")
processes = Processes(rank, 2, rank, torch.device("cuda", rank))
print(json.dumps([bind_threads(processes, root=root / str(rank)), sorted(os.sched_getaffinity(0))]))
processes.leave()
"""


@pytest.mark.parametrize("machines", [("a", "a"), ("a", "b")])
def test_two_processes_of_a_machine_share_and_those_of_two_do_not(
    gpu: Path, tmp_path: Path, machines: tuple[str, str]
) -> None:
    (gpu / "local_cpulist").write_text(format_cores(ALLOWED))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path), machine],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, machine in enumerate(machines)
    ]
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in started]
    assert outputs[0][0] == outputs[1][0], "each process knows the cores of all"
    cores = [set(found) for _, found in outputs]
    assert [format_cores(found) for found in cores] == outputs[0][0]
    if machines == ("a", "a") and len(ALLOWED) > 1:
        assert cores[0].isdisjoint(cores[1])
        assert sorted(cores[0] | cores[1]) == ALLOWED
    else:
        assert cores == [set(ALLOWED)] * 2


@pytest.mark.parametrize(("affinity", "expected"), [("auto", [None]), ("none", None)])
def test_a_run_records_where_its_threads_are_bound(
    small_settings: dict[str, Any], tmp_path: Path, affinity: str, expected: Any
) -> None:
    train_here(small_settings, output_dir=tmp_path, epochs=1, warmup_epochs=0, affinity=affinity)
    start = json.loads((tmp_path / "run.json").read_text())["starts"][0]
    assert start["affinity"] == expected
    assert start["first_step_s"] > 0
    assert "bound to cores" not in (tmp_path / "rank0.log").read_text(), "nothing to say without a GPU"
