"""Names of images, packed: ImageNet-22k's take 30 bytes each instead of the 90 of a str."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 15  # names
_FILE_NAMES = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()  # as os.fsdecode, without its overhead


@dataclass(frozen=True, slots=True, eq=False)
class Names(Sequence[str]):
    """Strings that do not change, one after the other in UTF-8; bytes of file names that are not UTF-8 are kept."""

    packed: bytes
    ends: NDArray[np.int64]  # (N,) where each name ends in `packed`

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Pack names."""
        packed, ends = bytearray(), array("q")
        for name in names:
            packed += os.fsencode(name)
            ends.append(len(packed))
        return cls(bytes(packed), np.array(ends, np.int64))

    @classmethod
    def of_lines(cls, content: bytes) -> Names:
        """Pack the lines of a text; each ends with a line feed."""
        ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
        ends -= np.arange(len(ends))
        return cls(content.replace(b"\n", b""), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices: see `select`
        index += len(self.ends) if index < 0 else 0
        if index < 0:
            raise IndexError("index out of range")
        end = self.ends.item(index)  # IndexError, too
        return self.packed[self.ends.item(index - 1) if index else 0 : end].decode(*_FILE_NAMES)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for block in range(0, len(self), _BLOCK):  # a list of all ends would take 36 bytes a name
            for end in self.ends[block : block + _BLOCK].tolist():
                yield self.packed[start:end].decode(*_FILE_NAMES)
                start = end

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Names:
        """Return the names at `indices`, in this order."""
        chosen = np.asarray(indices, np.int64)
        lengths = np.diff(self.ends, prepend=0)[chosen]
        ends = np.cumsum(lengths)
        content = np.frombuffer(self.packed, np.uint8)
        packed = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        for block in range(0, len(chosen), _BLOCK):  # positions of single bytes take 8 bytes each
            part = slice(block, block + _BLOCK)
            first = int(ends[block] - lengths[block])
            moves = np.repeat(self.ends[chosen[part]] - ends[part], lengths[part])
            last = first + len(moves)
            packed[first:last] = content[moves + np.arange(first, last)]
        return Names(packed.tobytes(), ends)
