"""Pages of a .beton against the checksums in its manifest, each when one of its samples is first used.

A decoder does not notice every damage: some leaves a valid JPEG with other pixels. A checksum does, and takes 2 to 3 %
of the time to decode the images of a page once. Each process checks the pages that it uses itself, so that no sample of
a damaged page is used, for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 17  # samples at once: bounds the memory
_UNKNOWN, _GOOD, _DAMAGED = range(3)


class PageCheck:
    """Which samples lie in damaged pages; thread-safe.

    page_crc32: of each page.   start: address of the first page.   page_size: bytes.
    addresses: (n,) of the samples' data.   crc32: computes the checksum of (address, number of bytes) of the file.
    """

    def __init__(
        self,
        page_crc32: Sequence[int],
        start: int,
        page_size: int,
        addresses: NDArray[np.uint64],
        crc32: Callable[[int, int], int],
    ) -> None:
        num = len(page_crc32)
        self.page_crc32 = page_crc32
        self.start = start
        self.page_size = page_size
        self.crc32 = crc32
        self.pages = np.empty(len(addresses), np.int32)  # of each sample; `num` outside all pages
        for first in range(0, len(addresses), _BLOCK):
            part = slice(first, first + _BLOCK)
            offsets = addresses[part].astype(np.int64) - start  # addresses from 2**63 on become negative
            inside = (offsets >= 0) & (offsets < num * page_size)
            self.pages[part] = np.where(inside, offsets // page_size, num)
        self._state = np.full(num + 1, _UNKNOWN, np.uint8)
        self._state[num] = _GOOD  # the decoder reports samples that lie outside
        self._locks = [Lock() for _ in page_crc32]

    def damaged(self, samples: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return (n,) whether each sample's page is damaged; read the pages that were not checked before."""
        pages = self.pages[samples]
        for page in pages[self._state[pages] == _UNKNOWN].tolist():
            with self._locks[page]:  # another thread may be checking it
                if self._state[page] == _UNKNOWN:
                    found = self.crc32(self.start + page * self.page_size, self.page_size)
                    self._state[page] = _GOOD if found == self.page_crc32[page] else _DAMAGED
        bad: NDArray[np.bool_] = self._state[pages] == _DAMAGED
        return bad

    def describe(self, sample: int) -> str:
        """Return 'page 3 (samples 402 to 560)', the page of a sample."""
        page = self.pages[sample]
        (others,) = np.nonzero(self.pages == page)
        return f"page {page} (samples {others[0]} to {others[-1]})"
