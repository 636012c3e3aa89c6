"""Machine code that is compiled once, kept in the user's cache folder, and called without importing numba.

numba takes more than a second of each process that calls a function of it, compiled or not: most of a short
conversion's time would be that of its workers' start. Here numba only compiles; llvmlite loads the result.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ctypes import CFUNCTYPE, byref, c_int32, c_int64, c_void_p
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding

from ffcv_convnext import rng
from ffcv_convnext.files import write_atomically
from ffcv_convnext.host import cache_folder

_VARIABLES = ("NUMBA_BOUNDSCHECK", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")  # of numba, that change the code


class Array(NamedTuple):
    """Type of an argument: a contiguous array."""

    dtype: type[np.generic]
    num_dimensions: int = 1


Kind = Array | type[int]  # of an argument; int: an int64


class Code(NamedTuple):
    """Machine code of one function."""

    symbol: str
    content: bytes  # an object file


@cache
def code_folder() -> Path:
    """Return the cache folder: below numba's if NUMBA_CACHE_DIR is set, otherwise below the user's.

    Named after a hash of all sources in data/ and of the compilers' versions, so that a change of any of them gives
    another folder. If neither can be written, a temporary folder that is removed when the process ends.
    """
    digest = hashlib.sha256(f"{version('numba')} {version('llvmlite')}".encode())
    for source in sorted([*Path(__file__).parents[1].rglob("*.py"), Path(rng.__file__)]):
        digest.update(source.read_bytes())
    folder = cache_folder(digest.hexdigest()[:16], os.environ.get("NUMBA_CACHE_DIR"))
    if folder is not None:
        return folder
    private = tempfile.mkdtemp(prefix="ffcv_convnext-")  # private: it contains code
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return Path(private)


_loaded: list[Any] = []  # their code stays until the process ends: callers have its addresses


def load_code(name: str, compile_functions: Callable[[], Sequence[Code]]) -> list[int]:
    """Load functions from the cache, or compile them if they are not there; return their addresses.

    name: of the file.   The processor's name and its instructions are part of its name too, because machines may share
    the folder. A damaged file is compiled again.
    """
    processor = [binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()]
    digest = hashlib.sha256(json.dumps([*processor, *map(os.environ.get, _VARIABLES)]).encode())
    path = code_folder() / f"{name}-{digest.hexdigest()[:16]}.bin"
    codes = _read(path)
    if codes is None:
        codes = list(compile_functions())
        with suppress(OSError):  # a full disk: the next process compiles them again
            write_atomically(path, _format(codes))
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target_machine())
    for code in codes:
        engine.add_object_file(binding.ObjectFileRef.from_data(code.content))
    engine.finalize_object()
    _loaded.append(engine)
    return [int(engine.get_function_address(code.symbol)) for code in codes]


def optimise(assembly: str) -> bytes:
    """Compile a module of LLVM's language for this processor; return an object file."""
    machine = _target_machine()
    module = binding.parse_assembly(assembly)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def _target_machine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, jit=True
    )


def _format(codes: Sequence[Code]) -> bytes:
    """Return a digest of the rest, a line with symbols and sizes, and the object files."""
    header = json.dumps([(code.symbol, len(code.content)) for code in codes]).encode()
    rest = b"\n".join([header, b"".join(code.content for code in codes)])
    return hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def _read(path: Path) -> list[Code] | None:
    """Return what `_format` wrote, or None if there is no such file or it is damaged."""
    try:
        digest, _, rest = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest != hashlib.sha256(rest).hexdigest().encode():
        return None
    header, _, content = rest.partition(b"\n")
    codes, at = [], 0
    for symbol, size in json.loads(header):
        codes.append(Code(symbol, content[at : at + size]))
        at += size
    return codes


class Functions:
    """Functions that numba compiles to machine code, callable without it: `functions.name(array, number, ...)`.

    module: its name; it defines them in Python and imports numba, so it is imported only to compile.
    kinds: name -> kinds of its arguments. Each function returns an int64 (or nothing, as 0), allocates nothing and
    raises nothing.
    """

    def __init__(self, module: str, kinds: Mapping[str, Sequence[Kind]]) -> None:
        addresses = load_code(module.rpartition(".")[2], lambda: _compile(module, kinds))
        for (name, arguments), address in zip(kinds.items(), addresses, strict=True):
            setattr(self, name, _callable(name, arguments, address))

    def __getattr__(self, name: str) -> Callable[..., int]:
        raise AttributeError(f"no function {name}")


def _callable(name: str, kinds: Sequence[Kind], address: int) -> Callable[..., int]:
    """Return a function that passes arguments as numba's code expects them.

    That is: where to write the result and the error; for an array the owner of its memory (none), the number of
    elements, their bytes, the address, shape and strides. Source: numba's ArrayModel and CPUCallConv.
    """
    num_words = sum(5 + 2 * kind.num_dimensions if isinstance(kind, Array) else 1 for kind in kinds)
    function = CFUNCTYPE(c_int32, c_void_p, c_void_p, *[c_int64] * num_words)(address)

    def call(*arguments: Any) -> int:
        words: list[int] = []
        for argument, kind in zip(arguments, kinds, strict=True):
            if isinstance(kind, Array):
                given = argument.dtype, argument.ndim, argument.flags.c_contiguous
                if given != (np.dtype(kind.dtype), kind.num_dimensions, True):
                    raise TypeError(f"{name}: {given}: expected a contiguous array of {kind}")
                words += (0, 0, argument.size, argument.itemsize, argument.ctypes.data)
                words += (*argument.shape, *argument.strides)
            else:
                words.append(int(argument))
        result, error = c_int64(), c_void_p()
        if function(byref(result), byref(error), *words) != 0:
            raise RuntimeError(f"{name}: its machine code raised an exception")
        return result.value

    return call


def _compile(module: str, kinds: Mapping[str, Sequence[Kind]]) -> list[Code]:
    """Compile functions with numba. Raises RuntimeError if their code needs more than memory functions."""
    import importlib

    from numba import from_dtype, types

    codes = []
    for name, arguments in kinds.items():
        dispatcher = getattr(importlib.import_module(module), name)
        signature = tuple(
            types.Array(from_dtype(np.dtype(kind.dtype)), kind.num_dimensions, "C")
            if isinstance(kind, Array)
            else types.int64
            for kind in arguments
        )
        dispatcher.compile(signature)
        compiled = dispatcher.overloads[signature]
        if compiled.signature.return_type != types.int64:
            raise RuntimeError(f"{name} returns {compiled.signature.return_type}, not int64")
        library = compiled.library
        lines = [line for line in library.get_llvm_str().splitlines() if line.startswith("declare")]
        needed = {line.partition("@")[2].partition("(")[0] for line in lines}
        if others := {each for each in needed if not each.startswith("llvm.")} - {"memset", "memcpy", "memmove"}:
            raise RuntimeError(f"numba {version('numba')} lets {name} call {', '.join(sorted(others))}")
        codes.append(Code(compiled.fndesc.llvm_func_name, library.serialize_using_object_code()[2][0]))
    return codes
