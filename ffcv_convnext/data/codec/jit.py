"""Compile numba functions, and cache the compiled code between processes.

numba's cache checks only the file that contains a function, and would miss a change in a file that the function calls.
So the cache is a folder named after a hash of all sources in data/ and of numba's version: a change of any of them
gives another folder, and a copy of the sources, such as a job's snapshot, uses the code that is already compiled.
numba writes it with renames, so processes that start together do not disturb each other. It cannot cache functions
that contain the address of a C function, which differs between processes; they take addresses as an argument, see
`call`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import caching, cgutils, event
from numba.extending import intrinsic
from numpy.typing import NDArray

from ffcv_convnext import rng
from ffcv_convnext.data.codec.machine_code import code_folder

log = logging.getLogger(__name__)


class Locator(caching.UserProvidedCacheLocator):  # type: ignore[misc]  # numba is untyped
    """Locates cached code by the file's path inside the package; numba uses the absolute path."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        """Return the name of the file's folder in the cache."""
        path, package = Path(py_file), Path(rng.__file__).parent
        if path.is_relative_to(package):
            return ".".join(path.relative_to(package).with_suffix("").parts)
        return str(super().get_suitable_cache_subpath(py_file))


numba.config.CACHE_DIR = str(code_folder())
numba.config.CACHE_LOCATOR_CLASSES = f"{__name__}.{Locator.__name__}"

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile a function at its first call: without the GIL, with numpy's errors, cached."""
    compiled: Function = njit(nogil=True, error_model="numpy", cache=True)(function)
    return compiled


class _FirstCompilation(event.Listener):  # type: ignore[misc]  # numba is untyped
    """Logs when numba starts to compile the first of our functions."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.started: float | None = None

    def on_start(self, event: event.Event) -> None:
        """Log the first compilation."""
        is_ours = event.data["dispatcher"].py_func.__module__.startswith(__name__.partition(".")[0])
        if is_ours and self.started is None:
            self.started = time.perf_counter()
            log.info(
                "compiling %s for this processor; takes 10 to 30 s, once; cached in %s",
                self.what,
                numba.config.CACHE_DIR,
            )

    def on_end(self, event: event.Event) -> None:
        """Ignore: the end of the last compilation is not known here."""


@contextmanager
def announced_compilation(what: str) -> Iterator[None]:
    """Log if the body compiles something, and how long that took; log nothing if the code is cached."""
    listener = _FirstCompilation(what)
    with event.install_listener("numba:compile", listener):
        yield
    if listener.started is not None:
        log.info("compiled %s in %.1f s", what, time.perf_counter() - listener.started)


@intrinsic
def call(_context, address, arguments):  # type: ignore[no-untyped-def]  # numba's form  # noqa: ARG001
    """Call the C function at `address` with a tuple of int64 (numbers and addresses); return its result as int64.

    If the function returns int, only the low 32 bits of the result are valid.
    """

    def codegen(_context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        num = len(signature.args[1])
        function = ir.FunctionType(word, [word] * num).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), cgutils.unpack_tuple(builder, values[1], num))

    return types.int64(types.int64, arguments), codegen
