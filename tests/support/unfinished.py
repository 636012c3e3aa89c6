"""Conversions that end before their end."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ffcv_convnext.data.beton import Page
from ffcv_convnext.data.convert.conversion import _Conversion


def interrupt_at(number: int) -> Callable[[_Conversion, Page], None]:
    """A journal that is interrupted after this number of pages."""
    add, count = _Conversion._add_to_journal, itertools.count(1)

    def interrupted(self: _Conversion, page: Page) -> None:
        add(self, page)
        if next(count) == number:
            raise KeyboardInterrupt

    return interrupted
