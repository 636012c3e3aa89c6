"""The process group: one process a device, started by torchrun (or alone)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among its peers, and its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    num_local: int = 1  # processes on this node

    @classmethod
    def from_environment(cls, device: Literal["auto", "cuda", "cpu"]) -> Processes:
        """What torchrun says in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without it, one process.

        Raises ValueError when cuda is asked for and there are too few devices.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_devices = torch.cuda.device_count()
        if device == "cpu" or (device == "auto" and num_devices == 0):
            return cls(rank, world, local_rank, torch.device("cpu"), num_local)
        if local_rank >= num_devices:
            raise ValueError(
                f"device = {device}: this machine has {num_devices} CUDA devices, process {local_rank} needs one more; "
                "start fewer processes with torchrun --nproc_per_node, or use --device cpu"
            )
        return cls(rank, world, local_rank, torch.device("cuda", local_rank), num_local)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def join(self) -> None:
        """Meet the other processes. CPU tensors are reduced by gloo, so a flag never waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))

    def leave(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place; the same on each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says yes. All of them get the same answer; the device is not waited for."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def barrier(self) -> None:
        self.any(False)

    def average_buffers(self, network: nn.Module) -> None:
        """Give every process the mean of all processes' running statistics.

        Each process updates BatchNorm's statistics from its own micro-batches. The update is linear, so averaging
        at any step does not change what the average at the end is.
        """
        if self.world == 1:
            return
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world
