"""AdamW that updates the averaged weights in the same pass over memory: one Triton launch for all parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with fused=True, one pass for parameters, moments and averages; the state dict is the same.

    A step equals torch's and ModelEmaV3's to rounding, and updates `ema` itself: call no `ema.update`. The averages of
    buffers, and of parameters without a gradient, are updated by the same operations as in ModelEmaV3.
    A step with GradScaler that finds a number that is not finite leaves parameters and moments as they are.

    Gradients may move between steps, as with zero_grad(set_to_none=True), which costs no pass over memory: the table of
    addresses is copied from pinned memory in each step, together with the learning rates (64 bytes a tensor), so the
    host never waits for the device.
    """

    def __init__(
        self, params: Iterable[Any], *, network: nn.Module | None = None, ema: ModelEmaV3 | None = None, **options: Any
    ) -> None:
        """Take over the groups of another AdamW, or parameters with its options. ema: the averages of `network`.

        Raises ValueError for amsgrad, maximize, capturable, differentiable and tensors as lr, for parameters that are
        not float32 or not dense in memory, and for averages without a network or of another type.
        """
        if find_spec("triton") is None:
            raise ValueError(
                "kernels = triton: the package triton is not installed; install it, or use --kernels torch"
            )
        super().__init__(params, fused=True, **options)
        if (network is None) != (ema is None):
            raise ValueError("ema and network belong together: give both or neither")
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group[name]:
                    raise ValueError(f"FusedAdamW does not support {name}; use torch.optim.AdamW")
            if isinstance(group["lr"], Tensor):
                raise ValueError("FusedAdamW takes lr as a number, not as a tensor; use torch.optim.AdamW")
            group["fused"] = True
            for parameter in group["params"]:
                _check(parameter)
        self.network, self.ema = network, ema
        self._chunks: tuple[tuple[int, ...], Tensor] | None = None  # the sizes that it was made for, and the table

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step and update the averages. Returns the closure's result."""
        from ffcv_convnext.training.kernels import adamw as kernel

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averages = self._averages()
        rows: list[list[int]] = []
        groups: list[list[float]] = []
        steps: list[Tensor] = []
        moved: list[Tensor] = []  # gradients in their parameter's memory order; alive until the launch
        for number, group in enumerate(self.param_groups):
            groups.append(_constants(group))
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state_of(p)
                gradient = p.grad
                if gradient.dtype != torch.float32 or gradient.stride() != p.stride():
                    gradient = torch.empty_like(p).copy_(gradient)
                    moved.append(gradient)
                average = averages.get(id(p))
                if average is not None and _alike(p, average[1]):
                    del averages[id(p)]
                else:
                    average = None  # ModelEmaV3's operations, below, or no averages at all
                steps.append(state["step"])
                pointers = (p, gradient, state["exp_avg"], state["exp_avg_sq"], p if average is None else average[1])
                rows.append([*(t.data_ptr() for t in pointers), state["step"].data_ptr(), p.numel(), number])
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if rows:
            torch._foreach_add_(steps, 1)
            device = steps[0].device
            table = _to_device(torch.tensor(rows, dtype=torch.int64), device)
            constants = _to_device(torch.tensor(groups, dtype=torch.float64).float(), device)
            weight = None if self.ema is None else 1.0 - self.ema.decay
            kernel.adamw(
                self._chunk_table(tuple(row[kernel.NUMEL] for row in rows), device, kernel.CHUNK),
                table,
                constants,
                scale=scale,
                found_inf=found_inf,
                average_weight=weight,
                aligned=all(pointer % 16 == 0 for row in rows for pointer in row[: kernel.STEP]),
            )
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))
        if self.ema is not None and averages:
            _average(self.ema, list(averages.values()))
        return loss

    def _averages(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Return pairs of a number of the network and its average, by the parameter's id or, for others, any other."""
        if self.ema is None or self.network is None:
            return {}
        theirs = self.ema.module.state_dict(keep_vars=True)
        return {
            id(value): (value, theirs[name].detach()) for name, value in self.network.state_dict(keep_vars=True).items()
        }

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the parameter's state with moments in its memory order; new ones are 0."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(state[name])
        return state

    def _chunk_table(self, sizes: tuple[int, ...], device: torch.device, chunk: int) -> Tensor:
        """Return (programs, 2) int32: the row of a tensor and the number of a chunk in it."""
        if self._chunks is None or self._chunks[0] != sizes:
            pairs = [(row, i) for row, size in enumerate(sizes) for i in range(-(-size // chunk))]
            self._chunks = sizes, _to_device(torch.tensor(pairs, dtype=torch.int32), device)
        return self._chunks[1]


def fuse_adamw(
    optimizer: torch.optim.Optimizer, network: nn.Module | None = None, ema: ModelEmaV3 | None = None
) -> FusedAdamW:
    """Return a FusedAdamW with the groups, options and state of `optimizer`, which is not used afterwards.

    Raises ValueError if it is not exactly torch.optim.AdamW, and as FusedAdamW does.
    """
    if type(optimizer) is not torch.optim.AdamW:
        raise ValueError(f"the kernels replace torch.optim.AdamW, not {type(optimizer).__name__}; use --kernels torch")
    fused = FusedAdamW(optimizer.param_groups, network=network, ema=ema)
    fused.load_state_dict(optimizer.state_dict())
    return fused


def _check(parameter: Tensor) -> None:
    dense = parameter.is_contiguous() or (
        parameter.ndim == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    )
    if parameter.dtype != torch.float32 or not dense or parameter.numel() >= 2**31 - 2**13:
        raise ValueError(
            f"FusedAdamW needs float32 parameters, contiguous or channels_last, of less than 2^31 numbers; found "
            f"{parameter.dtype}, {tuple(parameter.shape)} with strides {parameter.stride()}"
        )


def _alike(parameter: Tensor, average: Tensor) -> bool:
    """Return whether both have the same numbers in the same places of memory."""
    return (average.dtype, average.device, average.stride()) == (
        parameter.dtype, parameter.device, parameter.stride(),
    )  # fmt: skip


def _constants(group: dict[str, Any]) -> list[float]:
    """Return what a group's parameters have in common, computed in float64: the columns LR to EPS of the kernel."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    return [lr, lr * group["weight_decay"], 1 - beta1, 1 - beta2, *logs, group["eps"], 0.0]


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table to the device. PyTorch keeps the pinned memory from being used again before the copy has ended."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _average(ema: ModelEmaV3, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Update averages as ModelEmaV3.update does: counts of integers are copied."""
    floating = [(value.detach(), average) for value, average in pairs if average.is_floating_point()]
    for value, average in pairs:
        if not average.is_floating_point():
            average.copy_(value)
    if floating:
        values, averages = zip(*floating, strict=True)
        torch._foreach_lerp_(list(averages), list(values), weight=1.0 - ema.decay)
