"""Write and read rate of the place that stage_to names, to compare it with the original's."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ffcv_convnext.config import Config
from ffcv_convnext.doctor.cold_read import ColdFile
from ffcv_convnext.doctor.predict import Place
from ffcv_convnext.host import is_in_memory

PIECE = 16 << 20  # bytes of one write
MAX_BYTES = 4 << 30  # of the temporary file
MAX_SHARE = 0.25  # of the free room


def measure_place(config: Config, lengths: Sequence[int], seconds: float, num_readers: int) -> Place:
    """Write a temporary file to the place of stage_to for about `seconds` / 2, read it as training does, remove it.

    lengths: bytes of stored images, for the reads.   num_readers: threads that read at the same time.
    A place without room for the data is not measured; the result says why. Raises ValueError if it does not exist.
    """
    from ffcv_convnext.data.load import NoRoom, planned_place, room_in

    assert config.data.stage_to is not None
    try:
        place = planned_place(config.data)
    except NoRoom as error:
        return Place(folder=config.data.stage_to, in_memory=False, problem=str(error))
    image_bytes = sum(lengths) / max(1, len(lengths))
    room = int(min(MAX_BYTES, MAX_SHARE * room_in(place)[0]))
    with tempfile.NamedTemporaryFile(dir=place, prefix="doctor-") as file:
        piece, written, started = os.urandom(PIECE), 0, time.perf_counter()
        while written == 0 or (written + PIECE <= room and time.perf_counter() - started < seconds / 2):
            written += os.write(file.fileno(), piece)
        os.fsync(file.fileno())
        write = written / (time.perf_counter() - started)
        at_random = None
        if not is_in_memory(place):
            with ColdFile(Path(file.name)) as cold:
                found = cold.at_random(_parts(lengths, written), seconds, num_readers=num_readers)
            at_random = found.megabytes_per_s
    return Place(
        folder=str(place),
        in_memory=is_in_memory(place),
        write=write / image_bytes,
        write_megabytes_per_s=write / 1e6,
        at_random=None if at_random is None else at_random * 1e6 / image_bytes,
        at_random_megabytes_per_s=at_random,
    )


def _parts(lengths: Sequence[int], num_bytes: int) -> list[tuple[int, int]]:
    """Return parts (first byte, end) of a file, as long as the images and each far from the one before."""
    parts, at = [], 0
    for length in lengths:
        if length > num_bytes:
            continue
        at = (at + round(num_bytes * 0.618)) % num_bytes
        start = min(at, num_bytes - length)
        parts.append((start, start + length))
    return parts
