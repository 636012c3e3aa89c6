"""Damage in the tables of a .beton, in its manifest and in the other files that commands read, drawn from a seed.

Each draw changes a copy of a good folder in one place: header, field descriptors, sample table, allocation table,
manifest, list of original files, journal of an unfinished conversion. In half of the draws the manifest then states the
hash of the damaged tables, as if they had been written so: nothing but the values themselves shows the damage.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton import Manifest, tables_digest
from ffcv_convnext.data.beton.layout import ALLOCATION, FIELD, HEADER
from ffcv_convnext.data.beton.tables import read_tables

Bytes = NDArray[np.uint8]
ROW = np.dtype(
    [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8"), ("label", "<i8")], align=True
)
EXTREMES = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40)
EXTREMES += ((1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", "a\nb", "\udc80", 0, -1, 1.5, 1e308, float("nan"), 1 << 70, -(1 << 70), "9" * 50),
    *([], [[]], {}, [None], {"a": {}}, [1, "a"], "é" * 1000),
)
TABLES = ("header", "fields", "samples", "allocations")
FILES = ("manifest", "list")


@dataclass(frozen=True)
class Draw:
    """One damage."""

    part: str  # of TABLES or FILES
    kind: str
    restated: bool  # the manifest agrees with the damaged tables


def damage(beton: Path, seed: int, number: int) -> Draw:
    """Damage a .beton, or a file beside it, in place. The same seed and number give the same damage."""
    draw = random.Random(f"hostile {seed} {number}")
    part = (*TABLES, *FILES)[number % 6]
    if part == "manifest":
        return Draw(part, _damage_manifest(beton.with_suffix(".json"), draw), restated=False)
    if part == "list":
        path = beton.with_suffix(".files.txt")
        content = bytearray(path.read_bytes())
        kind = draw.choice(list(BYTES))
        BYTES[kind](content, draw)
        path.write_bytes(content)
        return Draw(part, kind, restated=False)
    kind = draw.choice(("value", "value", "value", *BYTES))
    whole = bytearray(beton.read_bytes())
    start, end = _extent(beton, part)
    if kind == "value":
        _set_value(np.frombuffer(whole, np.uint8)[start:end], part, draw)
    else:
        piece = whole[start:end]
        BYTES[kind](piece, draw)
        whole[start:end] = piece
        if kind == "truncate":
            del whole[start + len(piece) :]
    beton.write_bytes(whole)
    restated = draw.random() < 0.7
    if restated:
        restate(beton)
    return Draw(part, kind, restated)


def restate(beton: Path) -> None:
    """Make the manifest agree with the tables, as far as a hash goes."""
    path = Manifest.path_for(beton)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "sha256": tables_digest(beton), "num_bytes": beton.stat().st_size}))


def _extent(beton: Path, part: str) -> tuple[int, int]:
    tables = read_tables(beton)
    fields = HEADER.itemsize + len(tables.fields) * FIELD.itemsize
    return {
        "header": (0, HEADER.itemsize),
        "fields": (HEADER.itemsize, fields),
        "samples": (fields, tables.pages_start),
        "allocations": (tables.pages_end, tables.num_bytes),
    }[part]


def _set_value(content: Bytes, part: str, draw: random.Random) -> None:
    """Set numbers of a table to extreme values: of one row, or of all."""
    dtype = {"header": HEADER, "fields": FIELD, "samples": ROW, "allocations": ALLOCATION}[part]
    rows = content.view(dtype)
    chosen = slice(None) if draw.random() < 0.2 else slice(one := draw.randrange(len(rows)), one + 1)
    for _ in range(draw.choice((1, 1, 2))):
        names = [name for name in dtype.names or () if name not in ("name", "arguments")] or ["type_id"]
        name = draw.choice((*names, "name", "arguments") if part == "fields" else names)
        if name in ("name", "arguments"):
            target = rows[name][chosen]
            target[..., : draw.choice((1, 8, target.shape[-1]))] = draw.choice((0, 0x80, 0xC3, 0xFF, 0x0A, 0x2F))
            continue
        old = int(rows[name][chosen][0])
        bits = 8 * dtype[name].itemsize
        value = draw.choice((*EXTREMES, old + 1, old - 1, 2 * old, -1, draw.getrandbits(bits))) % (1 << bits)
        rows[name][chosen] = np.array([value], np.uint64).astype(f"<u{dtype[name].itemsize}").view(dtype[name])[0]


def _damage_manifest(path: Path, draw: random.Random) -> str:
    kind = draw.choice(("value", "value", "value", "key", *BYTES))
    if kind in BYTES:
        content = bytearray(path.read_bytes())
        BYTES[kind](content, draw)
        path.write_bytes(content)
        return kind
    found: Any = json.loads(path.read_text())
    key = draw.choice(list(found))
    inner = found[key]
    if kind == "key":
        if draw.random() < 0.5:
            del found[key]
        else:
            found[draw.choice(("surprise", key.upper(), ""))] = found.pop(key)
    elif isinstance(inner, list) and inner and draw.random() < 0.6:
        inner[draw.randrange(len(inner))] = draw.choice(JSON_VALUES)
    elif isinstance(inner, dict) and inner and draw.random() < 0.6:
        inner[draw.choice(list(inner))] = draw.choice(JSON_VALUES)
    elif isinstance(inner, int) and draw.random() < 0.6:
        found[key] = draw.choice((*EXTREMES, inner + 1, inner - 1, -inner, float(inner)))
    else:
        found[key] = draw.choice(JSON_VALUES)
    path.write_text(json.dumps(found))
    return kind


def _flip_bits(content: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 3, 20))):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def _zero(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(max(1, len(content)))
    end = min(len(content), start + draw.choice((1, 8, 64, 512, 1 << 30)))
    content[start:end] = bytes(end - start)


def _randomise(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(max(1, len(content)))
    end = min(len(content), start + draw.choice((1, 8, 64, 512)))
    content[start:end] = draw.randbytes(end - start)


def _truncate(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(max(1, len(content))) :]


BYTES: dict[str, Callable[[bytearray, random.Random], None]] = {
    "flip": _flip_bits, "zero": _zero, "random": _randomise, "truncate": _truncate,
}  # fmt: skip
