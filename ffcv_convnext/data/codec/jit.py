"""How this package's numba functions are compiled, and kept between processes.

numba's cache looks only at the file that a function stands in, so a change in a file it calls into would go unseen.
Therefore the cache is a folder named after a hash of all the sources and of numba's version: another version of
anything is another folder, and a copy of the sources, such as a job's snapshot, finds what is compiled already. numba
writes it with renames, so processes that start together do not disturb each other.
It cannot keep functions that hold the address of a C function, which differs from process to process; those take
addresses as an argument, see `call`.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llvmlite
import numba
from llvmlite import ir
from numba import njit, types
from numba.core import caching, cgutils, event
from numba.extending import intrinsic

from ffcv_convnext import rng

log = logging.getLogger(__name__)


def _cache_folder() -> str:
    """Where compiled code is kept: below numba's cache folder if one is set, the user's cache folder otherwise.

    Where neither can be written, a folder of this process, which ends with it.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted([*Path(__file__).parents[1].rglob("*.py"), Path(rng.__file__)]):
        digest.update(source.read_bytes())
    chosen = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(chosen) / "ffcv_convnext" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if writable:
        return str(folder)
    private = tempfile.mkdtemp(prefix="ffcv_convnext-")  # nobody else's: the cache holds pickles
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return private


class Locator(caching.UserProvidedCacheLocator):  # type: ignore[misc]
    """Names a function's place in the cache by its file's place in the package; numba would take the whole path."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        path, package = Path(py_file), Path(rng.__file__).parent
        if path.is_relative_to(package):
            return ".".join(path.relative_to(package).with_suffix("").parts)
        return str(super().get_suitable_cache_subpath(py_file))


numba.config.CACHE_DIR = _cache_folder()
numba.config.CACHE_LOCATOR_CLASSES = f"{__name__}.{Locator.__name__}"

jit = njit(nogil=True, error_model="numpy", cache=True)


class _FirstCompilation(event.Listener):  # type: ignore[misc]
    """Says so when numba begins to compile one of our functions, once."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.started: float | None = None

    def on_start(self, event: event.Event) -> None:
        is_ours = event.data["dispatcher"].py_func.__module__.startswith(__name__.partition(".")[0])
        if is_ours and self.started is None:
            self.started = time.perf_counter()
            log.info(
                "compiling %s for this processor, which takes some 10 to 30 s, once; kept in %s",
                self.what,
                numba.config.CACHE_DIR,
            )

    def on_end(self, event: event.Event) -> None:
        """The last one to end is not known before everything has ended."""


@contextmanager
def announced_compilation(what: str) -> Iterator[None]:
    """Log when something has to be compiled inside, and the seconds that it took; when all is kept, nothing."""
    listener = _FirstCompilation(what)
    with event.install_listener("numba:compile", listener):
        yield
    if listener.started is not None:
        log.info("compiled %s in %.1f s", what, time.perf_counter() - listener.started)


@intrinsic
def call(_context, address, arguments):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Call the C function at `address` with a tuple of int64 (numbers and addresses); its result as int64.

    For a function that returns int, only the low 32 bits of the result count.
    """

    def codegen(_context, builder, signature, values):  # type: ignore[no-untyped-def]
        word = ir.IntType(64)
        num = len(signature.args[1])
        function = ir.FunctionType(word, [word] * num).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), cgutils.unpack_tuple(builder, values[1], num))

    return types.int64(types.int64, arguments), codegen
