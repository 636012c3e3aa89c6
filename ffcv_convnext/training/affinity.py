"""Bind a process's threads to processor cores near its GPU."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.host import format_cores, machine_id, near_cores, share_cores
from ffcv_convnext.training.distributed import Processes

log = logging.getLogger(__name__)


def bind_threads(processes: Processes, *, root: Path = Path("/")) -> list[str | None]:
    """Bind all threads of this process, and those they start, to its share of the cores near its GPU.

    All processes call it, once they have joined. The share is of the cores that the process may use already (Slurm, a
    container), and disjoint from those of the other processes on its machine. Without a GPU, without its cores in /sys,
    or if the process may use none of them, its threads stay where they may run now.
    Returns the cores by rank as in /sys, e.g. 0-11,64-75; None: not bound.   root: the folder with proc/ and sys/.
    """
    allowed = frozenset(os.sched_getaffinity(0))
    usable, reason = frozenset[int](), ""
    if processes.device.type == "cuda":
        address = pci_address(processes.device)
        near = near_cores(address, root)
        usable = near & allowed
        reason = f"the cores near GPU {address}, {format_cores(near)}, are not among those allowed"
        if not near:
            reason = f"/sys does not tell which cores are near GPU {address}"
    machine = machine_id(root)
    everyone = processes.gather((machine, usable))
    shares: list[frozenset[int]] = [cores for _, cores in everyone]
    for each in {name for name, _ in everyone}:
        ranks = [rank for rank, (name, _) in enumerate(everyone) if name == each]
        for rank, share in zip(ranks, share_cores([shares[rank] for rank in ranks], root), strict=True):
            shares[rank] = share
    share = shares[processes.rank]
    if share:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), share)
        log.info("threads are bound to cores %s, of %s allowed", format_cores(share), format_cores(allowed))
    elif processes.device.type == "cuda":
        log.info("threads are not bound to cores: %s", reason)
    return [format_cores(cores) or None for cores in shares]


def pci_address(device: torch.device) -> str:
    """Return a GPU's address as in /sys, e.g. 0000:17:00.0."""
    found: Any = torch.cuda.get_device_properties(device)  # torch's types lack these three
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
