"""Generate the code of a training step for a GPU that need not be there, and run its host side on fake tensors.

Runs in a separate process, started by `run.py` with the runtime that does nothing:

    python -m ffcv_convnext.bench.gpu_code.capture REQUEST.json RESULT.json
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ffcv_convnext.bench.gpu_code.counting import Counter
from ffcv_convnext.bench.gpu_code.fake_device import pretend

DEVICE = torch.device("cuda", 0)
NUM_CLASSES = 1000


@dataclass
class Graph:
    """A graph that inductor compiled: its module's text, and shape, strides and type of its inputs."""

    text: str
    inputs: list[Any]
    backward: bool


@dataclass
class Phase:
    """A part of the training step; error: why its code could not be generated."""

    counter: Counter = field(default_factory=Counter)
    sources: dict[str, str] = field(default_factory=dict)  # generated kernels: their modules
    error: str = ""


class Stop(BaseException):
    """The code is generated; nothing can run."""


@contextmanager
def collecting_graphs() -> Iterator[list[Graph]]:
    """Collect the modules that inductor writes, instead of loading them."""
    from torch._inductor.graph import GraphLowering

    graphs: list[Graph] = []

    def keep(lowering: Any) -> ModuleType:
        code = (lowering.codegen_with_cpp_wrapper() if lowering.cpp_wrapper else lowering.codegen())[0]
        graphs.append(Graph(getattr(code, "value", code), _inputs_of(lowering), lowering.is_backward))

        def call(_: Any) -> None:
            raise Stop

        module: Any = ModuleType("generated")
        module.__file__ = __file__
        module.call, module.key = call, "key"
        lowering.cache_key, lowering.cache_path, lowering.cache_linemap = "key", __file__, []
        return module  # type: ignore[no-any-return]

    lowering_class: Any = GraphLowering
    names = [n for n in ("compile_to_module", "_compile_to_module") if hasattr(lowering_class, n)]
    before = {name: getattr(lowering_class, name) for name in names}
    for name in names:
        setattr(lowering_class, name, keep)
    try:
        yield graphs
    finally:
        for name, value in before.items():
            setattr(lowering_class, name, value)


def _inputs_of(lowering: Any) -> list[Any]:
    """Return (shape, strides, data type, device) of each input; a number for an input that is none."""
    found: list[Any] = []
    for value in lowering.graph_inputs.values():
        if hasattr(value, "get_size"):
            layout = value.get_layout() if hasattr(value, "get_layout") else value.layout
            found.append(
                ([int(n) for n in layout.size], [int(n) for n in layout.stride], layout.dtype, str(layout.device))
            )
        else:
            found.append(int(value))
    return found


@contextmanager
def recording(phase: Phase) -> Iterator[Counter]:
    """Record under this context: torch's operators, and launches of Triton kernels, which do not run."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        phase.counter.triton(kernel, args, kwargs)

    classes: list[Any] = [JITFunction, Autotuner]
    before = [each.run for each in classes]
    for each in classes:
        each.run = launch
    try:
        with phase.counter:
            yield phase.counter
    finally:
        for each, run in zip(classes, before, strict=True):
            each.run = run


class GeneratedKernel:
    """In place of a kernel that inductor generated: its launches are recorded."""

    def __init__(self, name: str, source: str, phase: Phase) -> None:
        self.name, self.phase = name, phase
        signature = re.search(rf"^def {name}\(([^)]*)\)", source, re.MULTILINE)
        assert signature is not None, name
        self.names = [each.partition(":")[0].strip() for each in signature[1].split(",")]

    def run(self, *args: Any, **_: Any) -> None:
        """Record a launch."""
        self.phase.counter.generated(self.name, self.names, args)


def replay(graph: Graph, phase: Phase) -> None:
    """Run the host code of a compiled graph on fake tensors and record it; needs a FakeTensorMode."""
    from torch._inductor.async_compile import AsyncCompile

    def kernel(_: Any, name: str, source: str, *__: Any, **___: Any) -> GeneratedKernel:
        phase.sources[name] = source
        return GeneratedKernel(name, source, phase)

    compiler: Any = AsyncCompile
    before = compiler.triton, compiler.wait
    compiler.triton, compiler.wait = kernel, lambda *_: None
    space: dict[str, Any] = {"__name__": "generated", "__file__": __file__}
    try:
        exec(compile(graph.text, "generated", "exec"), space)
    finally:
        compiler.triton, compiler.wait = before

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def empty(kind: str) -> Callable[..., Tensor]:
        return lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype, device=kind)

    def strided(x: Tensor, shape: Any, stride: Any, offset: int = 0) -> Tensor:
        return torch.as_strided(x, shape, stride, x.storage_offset() + offset)

    host: dict[str, Any] = {
        **{name: nothing for name in space if name.startswith("assert_")},
        "empty_strided_cuda": empty("cuda:0"),
        "empty_strided_cpu": empty("cpu"),
        "empty_strided_cpu_pinned": empty("cpu"),
        "reinterpret_tensor": strided,
        "copy_if_misaligned": lambda x: x,
        "get_raw_stream": lambda _: 0,
    }
    space |= host
    args = [
        each
        if isinstance(each, int)
        else torch.empty_strided(each[0], each[1], dtype=each[2], device="cuda:0" if "cuda" in each[3] else each[3])
        for each in graph.inputs
    ]
    with recording(phase), torch.no_grad():
        space["call"](args)


def fake_network(config: Any, num_classes: int) -> nn.Module:
    """Return the config's network with fake parameters on the device; needs a FakeTensorMode."""
    from ffcv_convnext.models import build_model, use_triton
    from ffcv_convnext.training.engine import memory_format

    with torch.device("meta"):
        network = build_model(config.model, num_classes)
    if config.run.kernels == "triton":
        use_triton(network)

    def fake(x: Tensor) -> Tensor:
        form = memory_format(config) if x.ndim == 4 else torch.contiguous_format
        return torch.empty(x.shape, dtype=x.dtype, device=DEVICE, memory_format=form)

    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return network.train()


def capture_network(network: nn.Module, config: Any, num_classes: int) -> tuple[Phase, Phase]:
    """Return forward and backward of one micro-batch, loss included."""
    from ffcv_convnext.training.engine import autocast, input_dtype
    from ffcv_convnext.training.losses import build_criterion
    from ffcv_convnext.training.run import compiled

    forward, backward = Phase(), Phase()
    n, size = config.data.batch_size, config.data.input_size
    images = torch.empty(n, size, size, 3, dtype=input_dtype(config), device=DEVICE).permute(0, 3, 1, 2)
    with collecting_graphs() as graphs:
        try:
            with autocast(config, DEVICE):
                compiled(network, config)(images)
        except Stop:
            pass
    for graph in graphs:
        replay(graph, backward if graph.backward else forward)
    logits = torch.empty(n, num_classes, dtype=input_dtype(config), device=DEVICE, requires_grad=True)
    targets = torch.empty(n, num_classes, device=DEVICE)
    with recording(forward), autocast(config, DEVICE):
        loss = build_criterion(config.optim)(logits, targets)
        scaled = loss / config.data.update_freq
    with recording(backward):
        scaled.backward()
    return forward, backward


def capture_augment(config: Any, num_classes: int) -> Phase:
    """Return the augmentation of one micro-batch."""
    from ffcv_convnext.augment import Normalisation, TrainAugment
    from ffcv_convnext.training.engine import input_dtype

    phase = Phase()
    kernels = config.run.kernels == "triton"
    augment = TrainAugment(
        config.augment,
        num_classes=num_classes,
        seed=0,
        device=DEVICE,
        normalisation=Normalisation.of(config.data),
        interpolation=config.data.train_interpolation,
        compile=True,
        dtype=input_dtype(config),
        kernels=kernels,
    )
    n, size = config.data.batch_size, config.data.input_size
    images = torch.empty(n, size, size, 3, dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
    labels = torch.empty(n, dtype=torch.int64, device=DEVICE)
    with collecting_graphs() as graphs, _host_tensors():
        try:
            with recording(phase) if kernels else nullcontext():
                augment(images, labels, step=0, micro_batch=0)
        except Stop:
            pass
    for graph in graphs:
        replay(graph, phase)
    return phase


@contextmanager
def _host_tensors() -> Iterator[None]:
    """Let NumPy arrays become fake tensors on the host; memory is not pinned."""
    from_numpy = torch.from_numpy
    patched: Any = torch

    def fake(array: Any) -> Tensor:
        return torch.empty(array.shape, dtype=from_numpy(array[:0] if array.ndim else array.reshape(1)).dtype)

    pin = Tensor.pin_memory
    tensor: Any = Tensor
    patched.from_numpy = fake
    tensor.pin_memory = lambda self, *_: self
    try:
        yield
    finally:
        patched.from_numpy = from_numpy
        tensor.pin_memory = pin


def capture_optimizer(network: nn.Module, config: Any) -> Phase:
    """Return the optimiser's step, the zeroing of gradients and the update of the averaged weights."""
    from timm.utils import ModelEmaV3

    from ffcv_convnext.training.optim import build_optimizer

    phase = Phase()
    ema = ModelEmaV3(network, decay=config.run.model_ema_decay) if config.run.model_ema else None
    triton = config.run.kernels == "triton"
    optimizer = build_optimizer(network, config.optim, peak_lr=config.schedule.lr, triton=triton, ema=ema)
    parameters = [p for p in network.parameters() if p.requires_grad]
    phase.counter.parameter_bytes = sum(p.numel() * p.element_size() for p in parameters)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with recording(phase):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None and not triton:  # FusedAdamW's step updates the averages
                ema.update(network)

    with _host_tensors(), _addresses():
        step()  # it creates the optimiser's state
        phase.counter.launches.clear()
        step()
    return phase


@contextmanager
def _addresses() -> Iterator[None]:
    """Let fake tensors have an address, for a kernel that gets a table of them."""
    tensor: Any = Tensor
    data_ptr = tensor.data_ptr
    tensor.data_ptr = lambda _: 0
    try:
        yield
    finally:
        tensor.data_ptr = data_ptr


def capture(request: dict[str, Any]) -> dict[str, Phase]:
    """Return every phase of a step of the request's config."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ffcv_convnext.config import Config

    config = Config.from_flat(request["config"])
    torch.set_float32_matmul_precision(config.run.matmul_precision)
    phases: dict[str, Phase] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = fake_network(config, NUM_CLASSES)
        wanted = request["phases"]
        for names, function in (
            (("augmentation",), lambda: [capture_augment(config, NUM_CLASSES)]),
            (("forward", "backward"), lambda: capture_network(network, config, NUM_CLASSES)),
            (("optimiser + EMA",), lambda: [capture_optimizer(network, config)]),
        ):
            if not set(names) & set(wanted):
                continue
            try:
                found: Any = function()
            except NotImplementedError:
                raise
            except Exception as error:
                if request.get("debug"):
                    raise
                text = str(error).strip().splitlines() or [""]
                found = [Phase(error=f"{type(error).__name__}: {text[0][:300]}") for _ in names]
            phases |= dict(zip(names, found, strict=True))
    return phases


def main() -> None:
    """Capture what the request names; write launches and compiled kernels as JSON."""
    request = json.loads(Path(sys.argv[1]).read_text())
    pretend(request["arch"])
    result: dict[str, Any] = {}
    for name, phase in capture(request).items():
        kernels: list[Any] = []
        if request["compile"] and not phase.error:
            from ffcv_convnext.bench.gpu_code.resources import compile_phase

            kernels = compile_phase(phase.sources, phase.counter.own_kernels.values(), Path(sys.argv[1]).parent)
        result[name] = {
            "error": phase.error,
            "launches": [asdict(launch) for launch in phase.counter.launches],
            "kernels": [asdict(kernel) for kernel in kernels],
        }
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0)  # torch would take leave of a GPU that is not there


if __name__ == "__main__":
    main()
