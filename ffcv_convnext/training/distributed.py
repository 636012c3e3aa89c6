"""The process group: one process per device, started by torchrun (or a single process)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_convnext.errors import Failure

log = logging.getLogger(__name__)

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective, and to meet the other processes
COPYING = timedelta(hours=24)  # to meet them while a node may still copy its data
_ATTEMPT = timedelta(seconds=5)  # of one connection
_LINE_S = 60.0  # between lines about processes that are missing


@dataclass(frozen=True, slots=True)
class Processes:
    """This process, the number of all processes, and its device."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    num_local: int = 1  # processes on this node

    @classmethod
    def from_environment(cls, device: Literal["auto", "cuda", "cpu"]) -> Processes:
        """Read torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them, one process.

        Raises ValueError if there are too few CUDA devices.
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
        """Whether this process has rank 0, which writes the run folder."""
        return self.rank == 0

    def join(self, patience: timedelta = TIMEOUT) -> None:
        """Join the process group. Gloo reduces CPU tensors: a flag never waits for the device.

        patience: how long to wait for the other processes, which may still copy their data.

        NCCL is told this process's device: it connects here, not in the first step, and never guesses a device by rank.
        """
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            device_id = self.device if on_gpu else None
            if patience == TIMEOUT:
                dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
                return
            store = self._meet(patience)
            dist.init_process_group(
                backend,
                store=store,
                rank=self.rank,
                world_size=self.world,
                timeout=TIMEOUT,
                device_id=device_id,
            )

    def _meet(self, patience: timedelta) -> Any:
        """Wait until all processes are here, and return the store of the process group.

        torch's own waiting can last as long, but not be ended by a signal: Python's handlers run between its calls.
        """
        deadline = time.monotonic() + patience.total_seconds()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
        while True:
            try:
                opened = dist.TCPStore(  # type: ignore[attr-defined]  # torch declares no types
                    address, port, is_master=serves, timeout=_ATTEMPT, wait_for_workers=False, multi_tenant=True
                )
                break
            except dist.DistNetworkError:
                if serves or time.monotonic() > deadline:
                    raise
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start_{start}", opened)  # type: ignore[attr-defined]
        store.set(f"here/{self.rank}", "")
        next_line = time.monotonic() + 1
        while missing := [rank for rank in range(self.world) if not store.check([f"here/{rank}"])]:
            if time.monotonic() > deadline:
                raise Failure(f"rank {missing[0]} did not come within {patience}; see its log")
            if time.monotonic() > next_line:
                next_line += _LINE_S
                ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                log.info("waiting for rank %s, which may still copy data", ranks)
            time.sleep(0.2)
        store.set_timeout(TIMEOUT)
        return store

    def leave(self) -> None:
        """Leave the process group, if this process has joined it."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place; the result is the same on each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank. They travel through the host."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process, without waiting for the device."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def from_main(self, work: Callable[[], T]) -> T:
        """Do some work on rank 0 alone; return its result, or raise its error, on every process."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]  # result, error
        if self.is_main:
            try:
                outcome[0] = work()
            except (ValueError, OSError, Failure) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def average_buffers(self, network: nn.Module) -> None:
        """Replace every process's running statistics by their mean over all processes.

        Each process updates BatchNorm's statistics from its own micro-batches. The update is linear, so averaging at
        any step does not change the average at the end.
        """
        if self.world == 1:
            return
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world


class _WithEmptyStep(nn.Module):
    """A network whose forward without images has a gradient of zero for every parameter."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor | None = None) -> Tensor:
        """Return logits (N, K), or the scalar 0."""
        if images is None:
            return torch.stack([parameter.sum() * 0.0 for parameter in self.network.parameters()]).sum()
        logits: Tensor = self.network(images)
        return logits


def data_parallel(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return `network` with gradients averaged over all processes, which have joined.

    DDP sums the gradients of its first step in one bucket, and later ones in several, in the order in which they became
    ready. From three processes on, the order of a sum's terms depends on an element's place in its bucket, so a
    run that continues in new processes would differ in the last bits from one that was not stopped. Therefore a step
    without images, whose gradients are zero and of which nothing stays, is DDP's first one.
    """
    model = DistributedDataParallel(
        _WithEmptyStep(network),
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    # Running statistics are averaged before evaluation and saving instead. As an argument, torch 2.13 warns of it.
    model.broadcast_buffers = False
    model().backward()
    model.zero_grad(set_to_none=True)
    return model
