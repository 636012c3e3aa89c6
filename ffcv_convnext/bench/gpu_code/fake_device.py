"""Make this process believe in a GPU that does nothing, so that inductor and Triton generate code for it.

Only the process that `run.py` starts imports this: it replaces functions of torch and Triton for good.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

ARCHITECTURES: dict[str, dict[str, Any]] = {  # figures of the vendor's data sheets and tuning guides
    "sm_80": {
        "name": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "multi_processor_count": 108,
        "total_memory": 85_000_000_000, "L2_cache_size": 40 * 2**20, "shared_memory_per_block_optin": 166_912,
        "shared_memory_per_multiprocessor": 167_936, "memory_clock_rate": 1_593_000, "clock_rate": 1_410_000,
    },
    "sm_90": {
        "name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132,
        "total_memory": 85_000_000_000, "L2_cache_size": 50 * 2**20, "shared_memory_per_block_optin": 232_448,
        "shared_memory_per_multiprocessor": 233_472, "memory_clock_rate": 2_619_000, "clock_rate": 1_980_000,
    },
}  # fmt: skip
COMMON = {
    "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024,
    "warp_size": 32, "shared_memory_per_block": 49152, "gcnArchName": "", "is_integrated": False,
    "is_multi_gpu_board": False, "memory_bus_width": 5120,
}  # fmt: skip


def pretend(arch: str) -> None:
    """Replace what torch and Triton ask a driver for. Caches are switched off: they would skip the code generation."""
    os.environ |= {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    }
    import torch
    import torch._dynamo.device_interface as interface
    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch._inductor.runtime.triton_helpers as helpers
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    def returning(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    properties = SimpleNamespace(**ARCHITECTURES[arch], **COMMON)
    capability = (properties.major, properties.minor)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "synchronize": None,
        "set_device": None,
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    cuda: Any = torch.cuda
    for name, value in answers.items():
        setattr(cuda, name, returning(value))
    device_type: Any = interface.CudaInterface
    for name in ("is_available", "device_count", "current_device", "get_device_properties", "is_bf16_supported"):
        setattr(device_type, name, staticmethod(returning(answers[name])))
    device_type.get_compute_capability = staticmethod(returning(10 * capability[0] + capability[1]))
    device_type.get_raw_stream = staticmethod(returning(0))
    device_type.synchronize = staticmethod(returning(None))
    interface.caching_worker_device_properties["cuda"] = [properties]
    interface.caching_worker_current_devices["cuda"] = 0
    torch._C._cuda_getCurrentRawStream = returning(0)
    torch.accelerator.is_available = returning(False)
    modes: list[Any] = [FakeTensorMode, fake_tensor]
    for place in modes:  # a method, in torch 2.11 a function
        if hasattr(place, "init_gpu_context"):
            place.init_gpu_context = returning(None)
    for module in (joint_graph, post_grad):
        patched: Any = module
        patched.lazy_init = returning(None)
    helpers.set_driver_to_gpu = returning(None)
    settings: Any = torch._inductor.config
    settings.shape_padding = False  # it times both ways
    settings.joint_graph_constant_folding = False  # it computes on the device
    settings.use_static_cuda_launcher = False
    functorch: Any = torch._functorch.config
    functorch.force_non_lazy_backward_lowering = True  # the backward pass is generated with the forward one

    driver.set_active(
        SimpleNamespace(
            get_current_target=returning(GPUTarget("cuda", 10 * capability[0] + capability[1], 32)),
            get_current_device=returning(0),
            get_current_stream=returning(0),
            get_device_interface=returning(torch.cuda),
            get_active_torch_device=returning(torch.device("cuda", 0)),
        )
    )
