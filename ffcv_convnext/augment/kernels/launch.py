"""Options and context for the launch of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A product is rounded before it is added, as on a CPU: values that PIL truncates then are the same to the last bit.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
    """Start `programs` programs of a Triton kernel on the device of `like`."""
    with torch.cuda.device_of(like):
        kernel[(programs,)](*args, **constants, **OPTIONS)
