"""Draw docs/architecture.svg: the floors and rooms of the package, with arrows taken from its own imports.

    python scripts/draw_architecture.py          # or: make architecture

FLOORS and ROOMS below are the rules; `tests/test_repository.py` reads them here and checks every import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ffcv_convnext"
PICTURE = ROOT / "docs" / "architecture.svg"


@dataclass(frozen=True)
class Box:
    """A folder or file of the package, and its place in the picture."""

    caption: str
    left: float  # of 12 columns
    width: float


# A module imports from floors below its own, or from its own folder. From top to bottom.
FLOORS: list[dict[str, Box]] = [
    {"cli": Box("the commands", 0, 12)},
    {"report": Box("run folders to table, figure, page", 0, 3.4)},
    {"ladder": Box("steps, submission, status", 0, 3.4)},
    {"cluster": Box("jobs: Slurm or this machine", 0, 3.4), "preview": Box("inputs of a step as a picture", 8.6, 3.4)},
    {"doctor": Box("which stage limits a run", 4.3, 3.4)},
    {"bench": Box("measurements side by side", 4.3, 3.4)},
    {"training": Box("run.py builds, engine.py holds the loop", 0, 12)},
    {
        "data": Box("images from disk to device", 0, 5.2),
        "augment": Box("batches on the device", 5.5, 1.9),
        "models": Box("one network, all steps", 7.6, 1.9),
    },
    {"run_folder": Box("names, lock", 9.7, 1.2)},
    {
        "host": Box("cores, memory", 0, 2),
        "config": Box("every setting, its type and its flag", 2.2, 8.5),
        "signals": Box("stop signals", 11.1, 0.9),
    },
    {
        "errors": Box("", 0, 1.8),
        "files": Box("", 2, 1.8),
        "formatting": Box("", 4, 1.8),
        "policy_grammar": Box("", 6, 1.8),
        "rng": Box("", 8, 1.8),
        "snapshot": Box("", 10, 2),
    },
]
GROUND = FLOORS[-1]

# The rooms of data/, by the same rule; two rooms on one floor do not import each other.
ROOMS: list[dict[str, Box]] = [
    {"check": Box("verify, info, repair", 2.4, 7.2)},
    {"convert": Box("a source to .beton", 0, 5.7), "load": Box(".beton to batches", 6.3, 5.7)},
    {"beton": Box("what a .beton is", 0, 12)},
    {"codec": Box("JPEG and pixels", 0, 12)},
]


# --- Imports ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported name."""

    target: str  # dotted; for `from a import b` it is a.b
    at_load: bool  # runs when the module is imported, not inside a function
    line: int


def modules() -> dict[str, Path]:
    """Return the dotted name below the package ("" for the package itself) -> file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str, package: str) -> list[Import]:
    """List every import; relative ones are resolved against the dotted package that contains the file."""

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, at_load, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{origin}.{alias.name}", at_load, node.lineno)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, at_load)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_load and not inside)

    return list(walk(ast.parse(source), True))


def package_of(name: str, path: Path) -> str:
    """Return the dotted package that contains the module."""
    dotted = f"{PACKAGE}.{name}".rstrip(".")
    return dotted if path.name == "__init__.py" else dotted.rpartition(".")[0]


def module_imports() -> dict[str, list[Import]]:
    """Return module -> its imports, for all modules of the package."""
    return {name: imports_of(path.read_text(), package_of(name, path)) for name, path in modules().items()}


def ours(imports: Iterable[Import], known: Iterable[str]) -> Iterator[tuple[Import, str]]:
    """Yield the imports of the package's own modules, each with the module that it loads."""
    names = set(known)
    for each in imports:
        if each.target == PACKAGE or each.target.startswith(f"{PACKAGE}."):
            target = each.target[len(PACKAGE) + 1 :]
            yield each, target if target in names else target.rpartition(".")[0]


def unit(name: str) -> str:
    """Return the folder or file directly below the package."""
    return name.partition(".")[0]


def room(name: str) -> str:
    """Return the room of a module in data/, "" for other modules."""
    parts = name.split(".")
    return parts[1] if parts[0] == "data" and len(parts) > 1 else ""


def edges(part_of: Mapping[str, str]) -> dict[str, set[str]]:
    """Return part -> the parts that it imports.   part_of: module -> part, without the modules to leave out."""
    everything = module_imports()
    found: dict[str, set[str]] = {}
    for name, imports in everything.items():
        for _, target in ours(imports, everything):
            if name in part_of and target in part_of and part_of[name] != part_of[target]:
                found.setdefault(part_of[name], set()).add(part_of[target])
    return found


def height_of(rows: Sequence[Mapping[str, Box]]) -> dict[str, int]:
    """Return folder -> its floor; the lowest is 0."""
    return {name: height for height, row in enumerate(reversed(rows)) for name in row}


def shortened(graph: Mapping[str, set[str]], heights: Mapping[str, int]) -> list[tuple[str, str]]:
    """List the edges; those that go down are left out where a longer path leads to the same folder."""
    down = {name: {after for after in graph[name] if heights[after] < heights[name]} for name in graph}

    def reachable(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            for after in down.get(todo.pop(), ()):
                if after not in found:
                    found.add(after)
                    todo.append(after)
        return found

    return [
        (name, target)
        for name in sorted(graph)
        for target in sorted(graph[name])
        if target not in down[name] or not any(target in reachable(other) for other in down[name])
    ]


# --- Picture ----------------------------------------------------------------------------------------------

COLUMN, MARGIN, ROW, GAP = 86, 24, 50, 30
ROOM_ROW, ROOM_GAP = 42, 18
ACCENT, WRONG, INK, QUIET = "#1f5fa8", "#c8322b", "#1c2733", "#5b6875"


@dataclass(frozen=True)
class Place:
    """A rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float


def text(x: float, y: float, words: str, size: int, colour: str, *, bold: bool = False, anchor: str = "middle") -> str:
    """Return one line of text; y is its baseline."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def rectangle(place: Place, fill: str, line: str) -> str:
    """Return a box with round corners."""
    return (
        f'<rect x="{place.x:g}" y="{place.y:g}" width="{place.width:g}" height="{place.height:g}" rx="7" '
        f'fill="{fill}" stroke="{line}"/>'
    )


def labelled(place: Place, name: str, caption: str, fill: str) -> list[str]:
    """Return a box with its name, and below it the caption if there is one."""
    x, y = place.x + place.width / 2, place.y + place.height / 2
    drawn = [rectangle(place, fill, ACCENT), text(x, y + (-3 if caption else 5), name, 15, INK, bold=True)]
    return [*drawn, text(x, y + 14, caption, 11, QUIET)] if caption else drawn


def arrow(start: Place, end: Place) -> str:
    """Go straight down where the boxes overlap, otherwise from middle to middle; red where it goes up."""
    colour = ACCENT if start.y < end.y else WRONG
    left, right = max(start.x, end.x), min(start.x + start.width, end.x + end.width)
    x1 = x2 = (left + right) / 2
    if left >= right:
        x1, x2 = start.x + start.width / 2, end.x + end.width / 2
    return (
        f'<line x1="{x1:g}" y1="{start.y + start.height:g}" x2="{x2:g}" y2="{end.y - 2:g}" '
        f'stroke="{colour}" stroke-width="1.4" marker-end="url(#head)"/>'
    )


def arrange(
    rows: Sequence[Mapping[str, Box]], names: set[str], x: float, y: float, column: float, heights: Sequence[float],
    gap: float,
) -> dict[str, Place]:  # fmt: skip
    """Place the boxes of `names`, row below row. heights: of the rows, in pixels."""
    places = {}
    for row, height in zip(rows, heights, strict=True):
        for name, box in row.items():
            if name in names:
                places[name] = Place(x + box.left * column, y, box.width * column, height)
        y += height + gap
    return places


def draw() -> str:
    """Return the picture as SVG; the same code gives the same bytes."""
    names = list(modules())
    units, rooms = {unit(name) for name in names}, {room(name) for name in names} - {""}
    boxes = {name: box for row in FLOORS for name, box in row.items()}
    rows = [row for row in FLOORS if units & set(row)]
    heights = [
        70 + len(ROOMS) * (ROOM_ROW + ROOM_GAP) - ROOM_GAP if "data" in row else 36 if row is GROUND else ROW
        for row in rows
    ]
    places = arrange(rows, units, MARGIN, MARGIN, COLUMN, heights, GAP)
    drawn = []
    for name, place in places.items():
        if name == "data":
            drawn += [
                rectangle(place, "#eef4fb", ACCENT),
                text(place.x + place.width / 2, place.y + 22, "data", 15, INK, bold=True),
                text(place.x + place.width / 2, place.y + 39, boxes[name].caption, 11, QUIET),
            ]
        else:
            drawn += labelled(place, name, boxes[name].caption, "#f3f5f7" if name in GROUND else "#ffffff")
    above_ground = {name: unit(name) for name in names if name and unit(name) not in GROUND}
    lines = [arrow(places[start], places[end]) for start, end in shortened(edges(above_ground), height_of(FLOORS))]

    data = places["data"]
    column, room_heights = (data.width - 32) / 12, [ROOM_ROW] * len(ROOMS)
    inner = arrange(ROOMS, rooms, data.x + 16, data.y + 54, column, room_heights, ROOM_GAP)
    captions = {name: box.caption for row in ROOMS for name, box in row.items()}
    for name, place in inner.items():
        drawn += labelled(place, name, captions[name], "#ffffff")
    lines += [
        arrow(inner[start], inner[end])
        for start, end in shortened(edges({name: room(name) for name in names if room(name)}), height_of(ROOMS))
    ]

    width = 2 * MARGIN + 12 * COLUMN
    height = MARGIN + sum(heights) + GAP * (len(rows) - 1) + 52
    notes = (
        "An arrow is an import between folders; it is left out where a longer way leads to the same folder. "
        "Every floor may use the lowest one: those arrows are not drawn."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            'font-family="Helvetica, Arial, sans-serif" role="img">',
            "<title>The folders of ffcv_convnext and the imports between them</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{ACCENT}"/></marker></defs>',
            f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
            *drawn,
            *lines,
            text(MARGIN, height - 18, notes, 12, QUIET, anchor="start"),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE.relative_to(ROOT))
