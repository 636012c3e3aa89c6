"""The repository keeps its rules: who imports whom, what the files may contain, and that the README is true."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from draw_architecture import (
    FLOORS,
    PACKAGE,
    PICTURE,
    ROOMS,
    draw,
    height_of,
    imports_of,
    module_imports,
    modules,
    ours,
    room,
    unit,
)

from ffcv_convnext import __version__
from ffcv_convnext.cli import COMMANDS
from ffcv_convnext.cluster import ClusterConfig
from ffcv_convnext.config import SETTINGS

ROOT = Path(__file__).resolve().parent.parent

# Files that other folders may import, beside a folder's `__init__.py`.
DOORS = {
    *("data.beton", "data.beton.layout", "data.beton.tables", "data.beton.ffcv_import"),
    *("data.codec", "data.codec.resample", "data.convert", "data.load", "data.check"),
    *("bench.gpu", "bench.gpu_code", "bench.scale", "bench.synthetic_data", "bench.timing"),
    *(
        "ladder.statistics",
        "models.kernels",
        "training.checkpoint",
        "training.cuda_graphs",
        "training.distributed",
        "training.engine",
        "training.kernel_choice",
        "training.preflight",
    ),
    *("training.losses", "training.optim", "training.run"),
}

# Third parties, and the only places that may import them.
HOMES = {
    "ffcv": ("data.beton", "bench.stock_ffcv"),
    "numba": ("data",),
    "llvmlite": ("data",),
    "cv2": ("data",),
    "pyarrow": ("data",),
    "submitit": ("cluster",),
    "matplotlib": ("report",),
    "triton": ("models.kernels", "augment.kernels", "training.kernels", "bench.gpu_code"),
}
NOT_MINIMAL = [*HOMES, "wandb", "sklearn"]
MAX_IGNORES = 25  # `type: ignore` in data/
MAX_README = 120  # lines


def place(name: str, line: int) -> str:
    return f"{modules()[name].relative_to(ROOT)}:{line}"


# --- Imports ----------------------------------------------------------------------------------------------


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
    everything, floor = module_imports(), height_of(FLOORS)
    missing = {unit(name) for name in everything} - {"", *floor}
    assert not missing, f"{missing}: add to FLOORS in scripts/draw_architecture.py, then run: make architecture"
    wrong = [
        f"{place(name, each.line)}: {unit(name)} must not import from {unit(target)}"
        for name, imports in everything.items()
        for each, target in ours(imports, everything)
        if target and unit(target) != unit(name) and (not name or floor[unit(target)] >= floor[unit(name)])
    ]
    assert not wrong, "\n".join(wrong)


def test_a_room_of_data_imports_only_from_rooms_below_its_own() -> None:
    everything, floor = module_imports(), height_of(ROOMS)
    rooms = {room(name) for name in everything} - {""}
    assert rooms <= set(floor), f"{rooms - set(floor)}: add to ROOMS in scripts/draw_architecture.py"
    wrong = [
        f"{place(name, each.line)}: data/{room(name)} must not import from data/{room(target)}"
        for name, imports in everything.items()
        for each, target in ours(imports, everything)
        if room(name) and room(target) and room(target) != room(name) and floor[room(target)] >= floor[room(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_picture_of_the_architecture_is_the_code_s() -> None:
    name = PICTURE.relative_to(ROOT)
    assert PICTURE.read_text() == draw(), f"{name} differs from the imports of today; run: make architecture"


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


def unguarded(source: str) -> list[int]:
    """Lines that import ffcv outside a `with importing_ffcv():` block."""

    def walk(node: ast.AST, guarded: bool) -> Iterator[int]:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if not guarded and any(name.partition(".")[0] == "ffcv" for name in names):
            yield node.lineno
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items]
            guarded = guarded or any(
                isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "importing_ffcv"
                for call in calls
            )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, guarded)

    return list(walk(ast.parse(source), False))


def test_unguarded_imports_of_ffcv_are_found() -> None:
    source = "import ffcv\nwith importing_ffcv():\n    import ffcv.reader\ndef f():\n    from ffcv.types import x\n"
    assert unguarded(source + "import ffcv_convnext\n") == [1, 5]


def test_ffcv_is_imported_behind_its_guard_only() -> None:
    wrong = [place(name, line) for name, path in modules().items() for line in unguarded(path.read_text())]
    assert not wrong, "import inside `with importing_ffcv():`: " + ", ".join(wrong)


def test_every_module_imports_with_the_minimal_dependencies() -> None:
    """Only files inside data/ (FFCV, numba, llvmlite, OpenCV) and of kernels (Triton) need an optional package."""
    everything = module_imports()
    needy: set[str] = set()
    while True:
        more = {
            name
            for name, imports in everything.items()
            if any(
                each.at_load and each.target.partition(".")[0] in ("ffcv", "numba", "llvmlite", "cv2", "triton")
                for each in imports
            )
            or any(each.at_load and target in needy for each, target in ours(imports, everything))
            or name.rpartition(".")[0] in needy  # a folder's `__init__.py` is imported before its files
        }
        if more <= needy:
            break
        needy |= more
    allowed = ("data.", "models.kernels.", "augment.kernels.", "training.kernels.", "bench.stock_ffcv")
    assert all(name.startswith(allowed) for name in needy), (
        f"{sorted(needy)}: files in data/ and of kernels alone may need FFCV, numba, llvmlite, OpenCV, Triton to load"
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


def test_ignored_types_in_data_are_few_and_have_reasons() -> None:
    """A reason is a comment behind the ignore: `# type: ignore[misc]  # ffcv has no types`."""
    comments = [
        (path, token.start[0], token.string)
        for name, path in modules().items()
        if unit(name) == "data"
        for token in tokenize.generate_tokens(iter(path.read_text().splitlines(keepends=True)).__next__)
        if token.type == tokenize.COMMENT and "type: ignore" in token.string
    ]
    bare = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, line, comment in comments
        if not re.search(r"type: ignore\[[\w, -]+\].*#\s*(?!noqa)\w+", comment)
    ]
    assert not bare, "no reason given: " + ", ".join(bare)
    assert len(comments) <= MAX_IGNORES, f"{len(comments)} times `type: ignore` in data/: at most {MAX_IGNORES}"


@pytest.mark.parametrize("script", ["train.py", "write_ffcv_dataset.py"])
def test_the_scripts_only_call_the_command_line(script: str) -> None:
    source = (ROOT / script).read_text()
    assert len(source.splitlines()) <= 20
    third = {each.target.partition(".")[0] for each in imports_of(source, "")} - set(sys.stdlib_module_names)
    assert third == {PACKAGE}
    assert all(target == "cli" for _, target in ours(imports_of(source, ""), modules()))


# --- Files ------------------------------------------------------------------------------------------------


def repository_files() -> list[Path]:
    """Return the files that git tracks or would add; skip the test outside a clone."""
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


def test_no_file_contains_an_index_address_or_a_path_of_one_machine() -> None:
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
    assert set(project["optional-dependencies"]) - installed == {"wandb", "imagenet", "bench"}, "a choice of the user's"
    extras = [each for name in installed for each in project["optional-dependencies"][name]]

    def normal(requirement: str) -> str:
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]

    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert {normal(each) for each in [*project["dependencies"], *extras]} <= {normal(line) for line in lines}


def test_the_files_that_name_the_version_agree() -> None:
    places = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## (\d\S*)",
    }
    for file, pattern in places.items():
        found = re.search(pattern, (ROOT / file).read_text(), flags=re.MULTILINE)
        assert found, file
        assert found[1] == __version__, file


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_the_workflows_and_the_container_use_targets_that_exist() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    used = set(re.findall(r'(?:RUN make |"make", ")([a-z-]+)', (ROOT / "Dockerfile").read_text()))
    for path in workflows:
        content = yaml.safe_load(path.read_text())
        for job in content["jobs"].values():
            used |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
        used |= set(re.findall(r"run: make ([a-z-]+)", path.read_text()))
    assert len(workflows) == 2
    assert {"setup", "test", "demo", "slow", "test-slurm"} <= used <= make_targets()


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
    targets, checked = make_targets(), set()
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


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


def test_no_page_contains_a_placeholder() -> None:
    assert len(pages()) > 5
    for page in pages():
        assert not re.search(r"@[A-Z]+@|TODO|TBD", page.read_text()), page


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_of_the_pages_leads_to_a_file_and_a_heading() -> None:
    broken, num_links = [], 0
    for page in pages():
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
            target, _, anchor = (link[0] or link[1]).partition("#")
            if re.match(r"\w+:", target):
                continue  # another site
            num_links += 1
            file = page.parent / target if target else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}#{anchor}".rstrip("#"))
    assert num_links > 20
    assert not broken, "\n".join(broken)
