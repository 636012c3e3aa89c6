"""Record what would run on a GPU: every launch with the bytes of its tensors and, for products, its operations.

The rule: each tensor that is an argument or a result of a kernel or library call counts once; one that is read and
written in place counts twice. A broadcast dimension (stride 0) is read once. Caches are not modelled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator or kernel as it was called.

    kind: "inductor" (a generated kernel), "own" (a Triton kernel of this package), "aten", "convolution" (of a
    library), "product" (a matrix product of a library), "copy" (between host and device).
    num: launches it stands for.   bytes: of its tensors, without those that are a matrix product's own:
    product_bytes.   flops: of products and convolutions.
    """

    name: str
    kind: str
    bytes: int
    product_bytes: int = 0
    flops: int = 0
    num: int = 1


@dataclass(frozen=True, slots=True)
class Product:
    """Which arguments of a Triton kernel are a matrix product's own, and the name of the summed dimension's size."""

    left: str
    right: str
    out: str
    depth: str


# Triton kernels of this package that contain a matrix product (tl.dot): their other tensors count as traffic.
# A kernel with tl.dot that is not listed is an error. Add a line for each new one.
PRODUCTS: dict[str, Product] = {
    "_hidden": Product("x", "weight", "linear_out", "K"),
    "_output": Product("hidden", "weight", "out", "K"),
    "_hidden_gradient": Product("g", "weight", "out", "K"),
    "_normal_gradient": Product("g", "weight", "out", "K"),
}

# Triton kernels that get their tensors as a table of addresses: bytes by kernel name, from the sum of the bytes of all
# parameters and whether there are averages. AdamW reads parameters, gradients, both moments and averages, and writes
# all but the gradients.
ADDRESSED: dict[str, Callable[[int, bool], int]] = {
    "_adamw": lambda parameters, averages: (9 if averages else 7) * parameters
}

OWN = "ffcv_convnext"  # namespace of the package's operators
MATRIX_PRODUCTS = {"mm", "matmul", "addmm", "bmm", "baddbmm", "_addmm_activation"}
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_unsafe_view", "is_pinned", "_pin_memory", "record_stream", "resize_", "set_", "_reshape_alias",
}  # fmt: skip
WRITES_ONLY = re.compile(r"(copy|fill|zero|normal|uniform|bernoulli|random|exponential)_$|out$")
# Tensors and blocks of 65,536 values that one launch of torch's multi_tensor_apply takes, by the number of its lists.
# Source: aten/src/ATen/native/cuda/MultiTensorApply.cuh.
TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS_OF_A_LAUNCH, BLOCK = 320, 65536


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's memory; a dimension of stride 0 is there once."""
    lengths = [size if stride or size == 0 else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return math.prod(lengths) * tensor.element_size()


def unique(tensors: Iterable[Any]) -> list[Tensor]:
    """Return the tensors on the device, each once."""
    return list({id(t): t for t in tensors if isinstance(t, Tensor) and t.device.type == "cuda"}.values())


def multi_tensor_launches(tensors: Iterable[Tensor], num_lists: int) -> int:
    """Return the launches in which torch's multi_tensor_apply works through lists of these tensors."""
    launches = tensors_in = blocks_in = 0
    for tensor in tensors:
        tensors_in += 1
        for _ in range(max(1, -(-tensor.numel() // BLOCK))):
            blocks_in += 1
            if blocks_in == BLOCKS_OF_A_LAUNCH:
                launches, tensors_in, blocks_in = launches + 1, 1, 0
        if tensors_in >= TENSORS_OF_A_LAUNCH[num_lists] and blocks_in:
            launches, tensors_in, blocks_in = launches + 1, 0, 0
    return launches + (blocks_in > 0)


@dataclass
class OwnKernel:
    """A Triton kernel of the package as it was launched: enough to compile it."""

    name: str
    function: Any
    args: dict[str, Any]  # tensors are replaced by their data types
    options: list[dict[str, Any]]  # one for each configuration that autotuning could choose


@dataclass
class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records what is called under it; fake tensors compute nothing.

    The package's own operators are entered: their Triton launches and torch calls count, not their arguments.
    """

    launches: list[Launch] = field(default_factory=list)
    own_kernels: dict[str, OwnKernel] = field(default_factory=dict)
    parameter_bytes: int = 0  # for kernels in ADDRESSED

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record one operator."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == OWN:
            from torch._library.custom_ops import OPDEFS

            implementation = OPDEFS[func._schema.name]._init_fn
            with self:
                return implementation(*args, **kwargs)
        if name.startswith(("_foreach_", "_fused_")):
            return self._multi_tensor(func, name, args, kwargs)
        result = func(*args, **kwargs)
        if func.namespace != "prim" and not func.is_view and name not in NO_KERNEL:
            self._operator(func, name, args, kwargs, result)
        return result

    def _operator(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        tensors = unique(given)
        if not tensors:
            return
        moved = sum(map(num_bytes, tensors))
        if any(t.device.type == "cpu" and t.ndim for t in given):
            self.launches.append(Launch(name, "copy", moved, num=0))
        elif name in MATRIX_PRODUCTS:
            left, right = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim >= 2][-2:]
            if "out" in kwargs:
                left, right = [t for t in args if isinstance(t, Tensor)][-2:]
            flops = 2 * left.numel() * right.shape[-1]
            self.launches.append(Launch(name, "product", 0, moved, flops))
        elif name == "convolution":
            x, weight = args[:2]
            transposed = args[6] if len(args) > 6 else kwargs.get("transposed", False)
            pixels = x.numel() if transposed else result.numel()
            self.launches.append(Launch(name, "convolution", moved, flops=2 * pixels * weight[0].numel()))
        elif name == "convolution_backward":
            gradient, _, weight = args[:3]
            wanted = args[-1]
            num = sum(wanted)
            flops = 2 * gradient.numel() * weight[0].numel() * sum(wanted[:2])
            self.launches.append(Launch(name, "convolution", moved, flops=flops, num=num))
        else:
            if not (WRITES_ONLY.search(name) or "out" in kwargs):
                moved += sum(map(num_bytes, unique(_written(func, args, kwargs))))
            self.launches.append(Launch(name, "aten", moved))

    def _multi_tensor(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record an operator on lists of tensors, without calling it; it changes its first list in place."""
        if not name.endswith("_"):
            result = func(*args, **kwargs)
            lists = [each for each in [*args, *kwargs.values(), result] if _is_list_of_tensors(each)]
            written: list[Tensor] = []
        else:
            result = None
            lists = [each for each in [*args, *kwargs.values()] if _is_list_of_tensors(each)]
            written = _written(func, args, kwargs)
        moved = sum(map(num_bytes, unique(tree_leaves(lists)))) + sum(map(num_bytes, unique(written)))
        if name.startswith("_fused_"):  # the gradients are only read, though the schema has them as changed
            moved -= sum(map(num_bytes, args[1]))
            full = [each for each in lists if each[0].ndim]  # its step numbers are no list of the launch
            num = multi_tensor_launches(lists[0], len(full))
        else:
            num = multi_tensor_launches(lists[0], len(lists))
        self.launches.append(Launch(name, "aten", moved, num=num))
        return result

    def generated(self, name: str, names: list[str], args: tuple[Any, ...]) -> None:
        """Record a launch of a kernel that inductor generated; names: of its arguments."""
        moved = sum(map(num_bytes, unique(args)))
        moved += sum(num_bytes(t) for n, t in zip(names, args, strict=False) if n.startswith("in_out_ptr"))
        self.launches.append(Launch(name, "inductor", moved))

    def triton(self, kernel: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record a launch of one of the package's kernels: a JITFunction, or an Autotuner around one.

        Raises NotImplementedError for a kernel with a matrix product that is not in PRODUCTS.
        """
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        configs: list[dict[str, Any]] = [{}]
        function = kernel
        while not isinstance(function, JITFunction):
            if isinstance(function, Autotuner):
                function.nargs = dict(zip(function.arg_names, args, strict=False))
                configs = [config.all_kwargs() for config in function.prune_configs(dict(kwargs))]
            function = function.fn
        name = function.__name__
        names = function.arg_names
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        rest = {k: v for k, v in kwargs.items() if k not in names and k not in ("grid", "warmup")}
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        moved, product_bytes, flops = sum(map(num_bytes, unique(tensors.values()))), 0, 0
        if name in PRODUCTS:
            product = PRODUCTS[name]
            own = [tensors[each] for each in (product.left, product.right, product.out)]
            product_bytes = sum(map(num_bytes, own))
            moved -= product_bytes
            flops = 2 * own[0].numel() * own[1].numel() // values[product.depth]
        elif has_product(function):
            raise NotImplementedError(
                f"the Triton kernel {name} contains a matrix product (tl.dot); add its tensors to PRODUCTS in "
                "ffcv_convnext/bench/gpu_code/counting.py"
            )
        elif name in ADDRESSED:
            moved += ADDRESSED[name](self.parameter_bytes, bool(values["AVERAGES"]))
        self.launches.append(Launch(name, "own", moved, product_bytes, flops))
        described = {k: v.dtype if isinstance(v, Tensor) else v for k, v in values.items()}
        compiled = OwnKernel(name, function, described, [rest | config for config in configs])
        self.own_kernels.setdefault(f"{name} {described} {compiled.options}", compiled)


def has_product(function: Any) -> bool:
    """Return whether a Triton function, or one that it calls, contains a matrix product."""
    from triton.runtime.jit import JITFunction

    seen: set[int] = set()
    waiting = [function]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if re.search(r"\btl\.dot(_scaled)?\(", current.src):
            return True
        space = current.fn.__globals__
        waiting += [space[n] for n in set(re.findall(r"\b\w+\b", current.src)) if isinstance(space.get(n), JITFunction)]
    return False


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operator changes in place."""
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return [t for t in found if isinstance(t, Tensor)]


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(t, Tensor) for t in value)
