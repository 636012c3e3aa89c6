"""CUDA graphs: forward and backward of a micro-batch recorded once for each image size, then started by one call.

The optimiser's step and the averages stay outside, as do augmentation and clipping: with fused kernels they are a few
launches, and outside they take learning rates and seeds as numbers, as without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffcv_convnext.config import Config
from ffcv_convnext.training.distributed import Processes

WARMUP = 3  # passes before recording: compilation, autotuning and cuDNN's search may not happen while a stream records

Pass = Callable[[Tensor, Tensor], Tensor]  # inputs and targets to the detached loss; leaves gradients in the parameters
# Takes a function without arguments and returns one that does the same work again, in the same memory, and its result.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def uses_cuda_graphs(config: Config, processes: Processes) -> bool:
    """Return whether the passes of this run are recorded; `auto`: no, as no GPU has measured yet that it is faster.

    Raises ValueError with the first reason for which `--cuda_graphs true` is impossible.
    """
    if config.run.cuda_graphs != "true":
        return False
    for impossible, reason in (
        (processes.device.type != "cuda", "needs a CUDA device"),
        (processes.world > 1, f"needs one process, not {processes.world}: DDP's reductions are not recorded"),
        (
            config.data.update_freq != 1,
            f"needs update_freq = 1, not {config.data.update_freq}: a replay replaces gradients",
        ),
        (config.run.amp == "fp16", "does not support amp = fp16, whose loss scale changes; use --amp bf16"),
        (
            config.model.grad_checkpointing,
            "does not support grad_checkpointing, which saves the state of random numbers",
        ),
    ):
        if impossible:
            raise ValueError(f"cuda_graphs = true {reason}; or use --cuda_graphs false")
    return True


@dataclass(frozen=True, slots=True)
class _Recorded:
    replay: Callable[[], None]
    inputs: Tensor
    targets: Tensor
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]


class GraphedPasses:
    """Forward and backward passes by replay: one recording for each shape of inputs, all in one pool of memory.

    The pass must not depend on the host: what changes between its calls are its inputs, its targets, the weights in
    place, and random numbers of torch's default generator, whose seed and offset a replay reads from the device.
    """

    def __init__(self, network: nn.Module, function: Pass, record: Record | None = None) -> None:
        """Prepare; nothing is recorded yet. record: by default `CudaRecord()`, for tests another one."""
        self.network, self.function = network, function
        self.record = CudaRecord() if record is None else record
        self._recorded: dict[Any, _Recorded] = {}

    def __call__(self, inputs: Tensor, targets: Tensor, *, seed: int) -> Tensor:
        """Run the pass and return a copy of its loss; the parameters' gradients are replaced.

        inputs, targets: copied into the recording's memory.   seed: of the pass's random numbers, as in manual_seed.
        The gradients are the recording's memory too: the next call overwrites them.
        """
        key = inputs.shape, inputs.dtype, inputs.stride(), targets.shape, targets.dtype
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._make(inputs, targets)
        recorded.inputs.copy_(inputs)
        recorded.targets.copy_(targets)
        torch.manual_seed(seed)
        recorded.replay()
        for parameter, gradient in recorded.gradients:
            parameter.grad = gradient
        return recorded.loss.clone()

    def _make(self, inputs: Tensor, targets: Tensor) -> _Recorded:
        """Record the pass. Weights, running statistics and gradients are afterwards as before."""
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        own_inputs, own_targets = inputs.clone(), targets.clone()

        def run() -> Tensor:
            _drop_gradients(self.network.parameters())  # the backward pass then writes them and adds to nothing
            return self.function(own_inputs, own_targets)

        replay, loss = self.record(run)
        gradients = [(p, p.grad) for p in self.network.parameters() if p.grad is not None]
        _drop_gradients(self.network.parameters())
        for buffer, value in buffers:
            buffer.copy_(value)
        return _Recorded(replay, own_inputs, own_targets, loss, gradients)


class CudaRecord:
    """Record CUDA graphs in one pool of memory, so that several need no more than the largest, beside their results."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Run the function WARMUP times on another stream, then record it without running it."""
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = function()
        self._pool = graph.pool()
        return graph.replay, loss


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
