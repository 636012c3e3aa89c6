"""Put the figures of `bench gpu` into docs/performance.md: one section for each device, between markers.

    python scripts/gpu_tables.py runs/gpu/gpu.json

A section replaces the device's old one; the text outside of the markers stays. Running it again changes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables of bench gpu -->", "<!-- end of the tables of bench gpu -->"
DEVICE = "<!-- device: {name} -->"  # before a section, which ends where the next one begins


def add_section(page: str, found: Mapping[str, Any]) -> str:
    """Return the page with the section of the device that was measured, in the order of the devices' names.

    page: Markdown with BEGIN and END.   found: the content of gpu.json.
    Raises ValueError for figures of a CPU, and for a page without the markers.
    """
    from ffcv_convnext.bench.gpu import to_markdown

    facts: dict[str, Any] = {}
    for each in found["stages"].get("facts", {}).get("figures", []):
        facts |= each
    if found["device"] != "cuda" or "device" not in facts:
        raise ValueError("the page has figures of GPUs only; measure with --device cuda, with the stage facts")
    before, begin, rest = page.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page lacks the markers {BEGIN} and {END}")
    head, tail = DEVICE.split("{name}")
    sections = dict(part.split(tail, 1) for part in inside.split(head)[1:])
    name = facts["device"]
    sections[name] = f"\n\n{to_markdown(found, title=name, level=3)}\n"
    body = "\n".join(f"{head}{device}{tail}{text.rstrip()}\n" for device, text in sorted(sections.items()))
    return f"{before}{begin}\n\n{body}\n{end}{after}"


def main() -> None:
    """Read the command line and rewrite the page."""
    parser = argparse.ArgumentParser(description="Put the figures of bench gpu into docs/performance.md.")
    parser.add_argument("json", type=Path, help="gpu.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file with the markers")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    try:
        text = add_section(options.page.read_text(), json.loads(options.json.read_text()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    options.page.write_text(text)


if __name__ == "__main__":
    main()
