"""The house stands as drawn: who imports whom, what the files may hold, and that the README tells the truth."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from ffcv_convnext.cli import COMMANDS
from ffcv_convnext.cluster import ClusterConfig
from ffcv_convnext.config import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ffcv_convnext"

# A module imports from floors below its own, or from its own folder.
FLOORS = [
    {"", "errors", "files", "formatting", "policy_grammar", "rng", "snapshot"},  # "" is the package itself: its version
    {"config", "signals", "host"},
    {"data", "augment", "models"},
    {"training"},
    {"bench"},
    {"doctor"},
    {"cluster", "preview"},
    {"ladder"},
    {"report"},
    {"cli"},
]
FLOOR_OF = {unit: height for height, units in enumerate(FLOORS) for unit in units}

# Doors inside a folder, beside its `__init__.py`.
DOORS = {
    *("data.beton", "data.beton.tables", "data.beton.ffcv_import"),
    *("data.codec", "data.convert", "data.load", "data.check"),
    *("bench.compare", "bench.stages", "bench.synthetic_data"),
    *("training.preflight", "training.distributed", "training.engine", "training.run"),  # its init is free of torch
}

# Third parties that some places only may import.
HOMES = {
    "ffcv": ("data", "bench.stock_ffcv"),
    "numba": ("data",),
    "cv2": ("data",),
    "submitit": ("cluster",),
    "matplotlib": ("report",),
    "triton": ("models.kernels",),
}
NOT_MINIMAL = [*HOMES, "wandb", "sklearn"]


@dataclass(frozen=True)
class Import:
    target: str  # dotted name; for `from a import b` it is a.b
    at_load: bool  # runs when the module is imported, not inside a function
    line: int


def modules() -> dict[str, Path]:
    """Dotted name below the package ("" for the package itself) -> file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str, package: str) -> list[Import]:
    """Every import statement, relative ones resolved against the dotted package that holds the file."""

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
    dotted = f"{PACKAGE}.{name}".rstrip(".")
    return dotted if path.name == "__init__.py" else dotted.rpartition(".")[0]


def module_imports() -> dict[str, list[Import]]:
    return {name: imports_of(path.read_text(), package_of(name, path)) for name, path in modules().items()}


def ours(imports: Iterable[Import], known: Iterable[str]) -> Iterator[tuple[Import, str]]:
    """The imports of our own modules, each with the module that it loads."""
    names = set(known)
    for each in imports:
        if each.target == PACKAGE or each.target.startswith(f"{PACKAGE}."):
            target = each.target[len(PACKAGE) + 1 :]
            yield each, target if target in names else target.rpartition(".")[0]


def unit(name: str) -> str:
    return name.partition(".")[0]


def place(name: str, line: int) -> str:
    return f"{modules()[name].relative_to(ROOT)}:{line}"


def test_the_import_reader_resolves_every_form() -> None:
    source = (
        "import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from g import h\n"
        "if TYPE_CHECKING:\n    import i\ntry:\n    import j\nexcept ImportError:\n    pass\n"
    )
    found = {(each.target, each.at_load) for each in imports_of(source, "x.y")}
    assert found == {
        ("a.b", True), ("x.y.c", True), ("x.d.e", True), ("g.h", False), ("i", False), ("j", True),
    }  # fmt: skip


def test_a_module_imports_only_from_floors_below_its_own() -> None:
    everything = module_imports()
    homeless = {unit(name) for name in everything} - set(FLOOR_OF)
    assert not homeless, f"{homeless}: no floor yet; draw it in DESIGN.md's picture and in FLOORS above"
    wrong = [
        f"{place(name, each.line)}: {unit(name)} may not import from {unit(target)}"
        for name, imports in everything.items()
        for each, target in ours(imports, everything)
        if unit(target) != unit(name) and FLOOR_OF[unit(target)] >= FLOOR_OF[unit(name)]
        and not target == ""
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_a_folder_is_entered_through_its_init() -> None:
    everything = module_imports()
    wrong = [
        f"{place(name, each.line)}: import from {PACKAGE}.{unit(target)}, not from {PACKAGE}.{target}"
        for name, imports in everything.items()
        for each, target in ours(imports, everything)
        if "." in target and unit(target) != unit(name) and target not in DOORS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_in_a_circle() -> None:
    everything = module_imports()
    graph = {
        name: {target for each, target in ours(imports, everything) if each.at_load and target != name}
        for name, imports in everything.items()
    }
    for name, path in modules().items():  # a folder's own files may name their folder's parents, not wait for them
        if path.name != "__init__.py":
            graph[name] -= {name.rpartition(".")[0]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(map(str, error.args[1])))


def test_third_parties_are_imported_in_their_own_place_only() -> None:
    wrong = [
        f"{place(name, each.line)}: {each.target} belongs in {HOMES[each.target.partition('.')[0]]}"
        for name, imports in module_imports().items()
        for each in imports
        if (homes := HOMES.get(each.target.partition(".")[0]))
        and not any(f"{name}.".startswith(f"{home}.") for home in homes)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_imports_with_the_minimal_dependencies() -> None:
    """Only files inside data/ (FFCV, numba, OpenCV) and models/kernels/ (Triton) need an optional package to load."""
    everything = module_imports()
    needy: set[str] = set()
    while True:
        more = {
            name
            for name, imports in everything.items()
            if any(
                each.at_load and each.target.partition(".")[0] in ("ffcv", "numba", "cv2", "triton") for each in imports
            )
            or any(each.at_load and target in needy for each, target in ours(imports, everything))
            or name.rpartition(".")[0] in needy  # a folder's `__init__.py` is imported before its files
        }
        if more <= needy:
            break
        needy |= more
    allowed = ("data.", "models.kernels.", "bench.stock_ffcv")
    assert all(name.startswith(allowed) for name in needy), (
        f"{sorted(needy)}: files in data/ and models/kernels/ alone may need FFCV, numba, OpenCV, Triton to load"
    )
    names = [f"{PACKAGE}.{name}".rstrip(".") for name in everything if name not in needy]
    program = (
        "import importlib, sys\n"
        f"for name in {NOT_MINIMAL!r}:\n"
        "    sys.modules[name] = None  # an import of it raises ModuleNotFoundError\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", ["train.py", "write_ffcv_dataset.py"])
def test_the_scripts_only_call_the_command_line(script: str) -> None:
    source = (ROOT / script).read_text()
    assert len(source.splitlines()) <= 20
    third = {each.target.partition(".")[0] for each in imports_of(source, "")} - set(sys.stdlib_module_names)
    assert third == {PACKAGE}
    assert all(target == "cli" for _, target in ours(imports_of(source, ""), modules()))


# --- Files ------------------------------------------------------------------------------------------------


def repository_files() -> list[Path]:
    """What git tracks or would add; skips the test outside a clone."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listing.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    return [path for name in set(listing.stdout.split("\0")) if name and (path := ROOT / name).is_file()]


def test_no_file_is_over_a_megabyte() -> None:
    big = [str(path.relative_to(ROOT)) for path in repository_files() if path.stat().st_size > 1_000_000]
    assert not big


def test_no_file_holds_an_index_address_or_a_path_of_somebodys_machine() -> None:
    # Put together from pieces, so that a plain search for them does not end here.
    addresses = ["index" + "-url", "find" + "-links ", "pypi.org" + "/simple", "python" + "hosted.org"]
    addresses += ["download." + "pytorch.org", "index" + "_url", "file:" + "//"]
    machines = [re.escape(f"/{name}/") for name in ("root", "work/" + "main", "work/" + "shared", "opt/" + "wheels")]
    forbidden = re.compile(
        "|".join([*map(re.escape, addresses), *(rf"(?<![\w.}}/])({m})" for m in machines), r"/(?:home|Users)/\w+/"])
    )
    found = []
    for path in repository_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            text_of_line = line.replace("--no-emit-index" + "-url", "").replace("--no-emit-find" + "-links ", "")
            if match := forbidden.search(text_of_line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


def test_requirements_pin_what_setup_installs() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = set(re.search(r"EXTRAS=(\S+)", (ROOT / "scripts/setup.sh").read_text())[1].split(","))  # type: ignore[index]
    assert installed == set(re.findall(r"--extra (\w+)", (ROOT / "scripts/pin.sh").read_text()))
    assert set(project["optional-dependencies"]) - installed == {"wandb", "bench"}, "a choice of the user's"
    extras = [each for name in installed for each in project["optional-dependencies"][name]]

    def normal(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]

    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert {normal(each) for each in [*project["dependencies"], *extras]} <= {normal(line) for line in lines}


# --- README -----------------------------------------------------------------------------------------------


def readme_commands() -> list[list[str]]:
    """The command lines of the README's code blocks, in order, split into words; prompts and comments dropped."""
    text = (ROOT / "README.md").read_text()
    commands = []
    for language, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if language not in ("", "bash", "sh", "shell", "console"):
            continue
        prompted = re.search(r"^\$ ", block, flags=re.MULTILINE)
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if prompted and not line.startswith("$ "):
                continue  # output
            for command in re.split(r"&&|;|\|", line.removeprefix("$ ")):
                try:
                    words = shlex.split(command, comments=True)
                except ValueError:
                    continue  # a line of output with an apostrophe
                while words and re.fullmatch(r"\w+=\S*", words[0]):
                    words.pop(0)  # a variable of the environment
                if words:
                    commands.append(words)
    return commands


def tool(words: list[str]) -> str:
    return words[0].rpartition("/")[2]


def test_readme_starts_with_the_two_commands() -> None:
    commands = readme_commands()
    for target in ("demo", "test"):
        assert ["make", target] in [words[:2] for words in commands]
    ours_first = [words for words in commands if tool(words) in ("make", "python", "torchrun", "ffcv-convnext")]
    assert {tuple(words[:2]) for words in ours_first[:2]} == {("make", "demo"), ("make", "test")}


def test_readme_names_only_commands_scripts_and_configs_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    checked = set()
    for words in readme_commands():
        line = " ".join(words)
        if tool(words) == "make" and len(words) > 1:
            assert words[1] in targets, line
        elif tool(words) == "ffcv-convnext" and len(words) > 1:
            assert words[1] in COMMANDS or words[1].startswith("-"), line
        elif tool(words) in ("python", "python3", "torchrun", "bash") and "-c" not in words:
            scripts = [word for word in words[1:] if word.endswith((".py", ".sh"))][:1]
            assert all((ROOT / script).is_file() for script in scripts), line
            if not scripts:
                continue
            if scripts == ["train.py"]:
                flags = [word[2:].partition("=")[0] for word in words[words.index("train.py") :] if word[:2] == "--"]
                declared = {*SETTINGS, *(field.name for field in fields(ClusterConfig)), "config", "help", "dry_run"}
                unknown = set(flags) - declared
                assert not unknown, f"{line}: {unknown}"
        else:
            continue
        configs = [
            word for word in words if word.startswith("rn_configs/") and word.endswith(".yaml") and "*" not in word
        ]
        assert all((ROOT / config).is_file() for config in configs), line
        checked.add(line)
    assert len(checked) >= 3


def test_no_page_holds_a_placeholder() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert len(pages) > 5
    for page in pages:
        assert not re.search(r"@[A-Z]+@|TODO|TBD", page.read_text()), page
