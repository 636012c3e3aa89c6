"""Numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def format_bytes(number: float) -> str:
    """Return '412 B', '48.1 kB' or '65.2 GB'; units are powers of 1000."""
    if number < 1000:
        return f"{number:.0f} B"
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 999.95:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.2f} TB"


def format_count(number: int, noun: str) -> str:
    """Return '1 image', '1,281,167 images' or '2 processes'."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def format_number(value: float | None, spec: str) -> str:
    """Format a value, or return '-' if it is None."""
    return "-" if value is None else format(value, spec)


def format_duration(seconds: float | None) -> str:
    """Return '12 min' or '3 h 05 min', or '-' if `seconds` is None."""
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Return a Markdown table whose columns are also aligned as plain text.

    align: one character per column, '<' (left) or '>' (right).   Cells are inserted as they are.
    """
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    rule = [("-" * (w + 2)) if side == "<" else ("-" * (w + 1) + ":") for w, side in zip(widths, align, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(f'{c:{side}{w}}' for c, w, side in zip(cells, widths, align, strict=True))} |"

    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])
