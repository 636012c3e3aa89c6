"""Damage every kind of file that the project reads back, and see what each command makes of it.

    python scripts/damage.py                        # 600 mutations in two processes: a table, in about three minutes
    python scripts/damage.py --num 60 --seed 1      # others
    python scripts/damage.py --list                 # also a line for each mutation that was not detected

A mutation changes one file of a small ladder that was stopped half-way; then one command runs on it in this process.
It ends in one of five classes:

    same result   the file's damaged part does not matter, or is not read
    error         exit status 1 or 2 and one line
    warning       the output names the file, and the result is right without the damaged part
    silent        another result, or damage that stays, without a word
    traceback     any other end
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("same result", "error", "warning", "silent", "traceback")
TIMINGS = ("images_per_s", "data_wait_s", "train_s", "epoch_s")
RUN, FINISHED, FAILED = (Path("ladder") / "00_tiny" / f"seed{seed}" for seed in range(3))
LIMIT_S = 60

# --- mutations: content, random numbers -> content ---------------------------------------------------------------

Mutation = Callable[[bytes, random.Random], bytes]


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    """1 to 8 bits anywhere."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def zero_a_block(content: bytes, draw: random.Random) -> bytes:
    """Up to 512 bytes."""
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.choice((1, 16, 512)))
    return content[:start] + bytes(end - start) + content[end:]


def cut(content: bytes, draw: random.Random) -> bytes:
    """At any place, mostly within a line."""
    return content[: draw.randrange(len(content))]


def make_empty(_content: bytes, _draw: random.Random) -> bytes:
    """No byte is left."""
    return b""


def insert_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes that are not UTF-8."""
    at = draw.randrange(len(content))
    return content[:at] + b"\xff\xfe\x80" + content[at:]


def replace_by_text(_content: bytes, draw: random.Random) -> bytes:
    """Neither JSON nor YAML."""
    return draw.choice((b"<html>502 Bad Gateway</html>\n", b"{{{ [\n", b"\x00\x01\x02", b"[" * 100_000))


def replace_by_object(_content: bytes, _draw: random.Random) -> bytes:
    """Put an empty object in the place of everything."""
    return b"{}\n"


def repeat_a_line(content: bytes, draw: random.Random) -> bytes:
    """At another place."""
    lines = content.splitlines(keepends=True)
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return b"".join(lines)


def change_a_value(
    content: bytes, draw: random.Random, values: tuple[Any, ...], *, keep_checksum: bool = True
) -> bytes:
    """Set one key of one object, or one item of one list. Files of version 0.2.0 have no checksum."""
    try:
        lines = [json.dumps(json.loads(content)).encode()]
    except ValueError:
        lines = content.splitlines()
    at = draw.randrange(len(lines))
    checksum = re.match(rb"([0-9a-f]{8} )?", lines[at])[0]  # type: ignore[index]  # a journal's line begins with one
    entry = json.loads(lines[at].removeprefix(checksum))
    inner = entry
    if isinstance(entry, str):
        entry = draw.choice(values)
    elif isinstance(entry, list):
        inner[draw.randrange(len(inner))] = draw.choice(values)
    else:
        while nested := [
            key for key, value in inner.items() if value and isinstance(value, dict) and draw.random() < 0.4
        ]:
            inner = inner[draw.choice(nested)]
        inner[draw.choice([key for key in inner if key != "crc32"])] = draw.choice(values)
        if not keep_checksum:
            entry.pop("crc32", None)
    lines[at] = checksum + json.dumps(entry).encode()
    return b"\n".join(lines) + b"\n"


def change_a_setting(content: bytes, draw: random.Random, values: tuple[Any, ...]) -> bytes:
    """Set one name of a YAML file."""
    lines = [line for line in content.decode().splitlines() if ": " in line]
    line = draw.choice(lines)
    return content.replace(line.encode(), f"{line.partition(': ')[0]}: {json.dumps(draw.choice(values))}".encode())


WRONG = (None, "text", "", -1, 2.5, [], {}, [1], {"a": 1}, True, "\x00")
BYTES: dict[str, Mutation] = {
    "bit flips": flip_bits, "zeroed block": zero_a_block, "cut short": cut, "empty": make_empty,
    "not UTF-8": insert_bytes,
}  # fmt: skip
TEXT = {**BYTES, "other text": replace_by_text, "{}": replace_by_object, "repeated line": repeat_a_line}


VALUES = {
    "wrong type": WRONG,
    "NaN": (float("nan"), float("inf")),
    "huge number": (10**30, 1e308, -(10**18), 10**4000),
}
NO_CHECKSUM = ", no checksum"


def values_in(change: Callable[..., bytes], suffix: str = "", **how: bool) -> dict[str, Mutation]:
    """Return mutations of single values."""
    return {f"{name}{suffix}": partial(change, values=values, **how) for name, values in VALUES.items()}


JSON = {**TEXT, **values_in(change_a_value), **values_in(change_a_value, NO_CHECKSUM, keep_checksum=False)}
YAML = {**TEXT, **values_in(change_a_setting)}

# --- the scene: a ladder of one step, made and stopped in this process -------------------------------------------


def build_scene(scene: Path) -> None:
    """Images, .beton files, an unfinished conversion, and a job_dir with a stopped, a finished and a failed run."""
    import numpy as np
    from PIL import Image

    from ffcv_convnext.cluster.requeue_policy import decide
    from ffcv_convnext.cluster.submissions import Submission, write_submissions
    from ffcv_convnext.data.convert.journal import Journal
    from ffcv_convnext.run_folder import read_config, write_config
    from ffcv_convnext.snapshot import take_snapshot
    from ffcv_convnext.training import engine

    numbers = np.random.default_rng(0)
    for split, number, size in (("train", 16, 40), ("val", 8, 40), ("large", 14, 512)):
        root = scene / "images" / "train" if split == "large" else scene / "small" / split
        for index in range(number):
            path = root / f"class_{index % 2}" / f"{index:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path, quality=90)
    run("write", "--data_path", scene / "small", "--out_dir", scene / "beton", "--split", "all", "--num_workers", 1)

    class Stopped(BaseException): ...

    def append(journal: Journal, entry: Any) -> None:
        original_append(journal, entry)
        raise Stopped

    original_append = Journal.append
    Journal.append = append  # type: ignore[method-assign]
    with contextlib.suppress(Stopped):
        run(*convert_command(scene))
    Journal.append = original_append  # type: ignore[method-assign]

    (scene / "configs").mkdir()
    (scene / "configs" / "00_tiny.yaml").write_text("resnet_layers: 1-1-1-1\nresnet_embed_dim: 8\nrecipe_batch: 8\n")
    (scene / "profile.yaml").write_text("partition: gpu\nmem_gb: 480\ncpus_per_task: 2\ntimeout: 24\nslurm_x: night\n")

    def train_step(learner: Any, micro_batches: Any) -> None:
        original_step(learner, micro_batches)
        if learner.state.step + 1 in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    original_step, stops = engine.train_step, {3, 5}
    engine.train_step = train_step
    for _ in range(2):
        run(*train_command(scene / RUN), status=75)
    engine.train_step = original_step
    run(*train_command(scene / FINISHED, seed=1))
    shutil.copytree(scene / FINISHED, scene / FAILED, ignore=shutil.ignore_patterns("*.pth", "done", "events*"))
    with open(scene / FAILED / "rank0.log", "a") as file:
        file.write("2026-11-20 11:00:00,456 ERROR ffcv_convnext.training.runlog: the loss is not finite\n")
    write_config(scene / FAILED, read_config(scene / FAILED).replace(seed=2))
    (scene / RUN / ".lock").write_text(f"process 1 on {socket.gethostname()}\n")  # as a kill leaves it
    for status in (1, 75):
        decide(scene / RUN, "local-1", status)
    code = take_snapshot(scene / "ladder" / "code")
    write_submissions(
        scene / "ladder",
        [
            Submission(
                time="2026-11-20T10:00:00+0000", job="local-1", name="00_tiny", seed=seed, folder=str(scene / folder),
                world=1, epochs=4, code=str(code), commit="0" * 40, command=["ladder", "submit"],
            )
            for seed, folder in enumerate((RUN, FINISHED))
        ],
    )  # fmt: skip


def run(name: str, *words: object, status: int = 0) -> None:
    """Run a command of ffcv-convnext, which must end with this exit status."""
    from ffcv_convnext.cli import run_command

    found = run_command(name, [str(word) for word in words])
    assert found == status, f"{name}: exit status {found}"


def settings(scene: Path, seed: int = 0) -> list[str]:
    """Return the flags of a run of 4 epochs of 2 steps."""
    return [
        *("--data_path", str(scene / "beton"), "--device", "cpu", "--amp", "off", "--batch_size", "8"),
        *("--input_size", "32", "--num_workers", "1", "--epochs", "4", "--warmup_epochs", "0", "--lr", "1e-3"),
        *("--model_ema", "true", "--model_ema_decay", "0.9", "--log_every", "1", "--save_ckpt_steps", "1"),
        *("--recipe_batch", "8", "--resnet_layers", "1-1-1-1", "--resnet_embed_dim", "8", "--aa", "none"),
        *(["--seed", str(seed)] if seed else []),
    ]


def train_command(folder: Path, seed: int = 0) -> list[str]:
    """Train or continue a run of the scene."""
    return ["train", *settings(folder.parents[2], seed), "--output_dir", str(folder)]


def convert_command(scene: Path, *more: str) -> list[str]:
    """Convert the large images, stored raw: two pages."""
    paths = ["--data_path", str(scene / "images"), "--out_dir", str(scene / "converted"), "--split", "train"]
    return ["write", *paths, "--num_workers", "1", "--compress_probability", "0", *more]


# --- commands: each returns what must stay the same, and what may differ if the output says so ---------------------


def train_and_read(scene: Path, folder: Path = RUN) -> tuple[int, Any, Any]:
    """Continue the run. Weights and scores must stay the same; lines of the logs may go, with a warning."""
    from ffcv_convnext.cli import run_command
    from ffcv_convnext.training.checkpoint import read_checkpoint

    before = {name: (scene / folder / name).read_bytes().splitlines() for name in ("log.jsonl", "steps.jsonl")}
    status = run_command("train", train_command(scene / folder, 0 if folder == RUN else 1)[1:])
    if status:
        return status, None, None
    content = read_checkpoint(scene / folder / "checkpoint-last.pth")
    digest = hashlib.sha256()
    for part in (content["model"], content["ema"]):
        for tensor in part.values():
            digest.update(tensor.numpy().tobytes())
    logs = {}
    for name, old in before.items():
        lines = (scene / folder / name).read_bytes().splitlines()
        logs[name] = [line.decode() if line in old else without_timings(line) for line in lines]
    return status, [digest.hexdigest(), (scene / folder / "done").read_text()], logs


def without_timings(line: bytes) -> str:
    """Return the part of a log line that a repetition computes again."""
    try:
        entry = json.loads(line)
        return json.dumps({key: value for key, value in entry.items() if key not in (*TIMINGS, "crc32")})
    except (ValueError, AttributeError):
        return repr(line)


def printed(*words: str | Path, status_alone: bool = False) -> Callable[[Path], tuple[int, Any, Any]]:
    """Return a command whose stdout is its result. `SCENE` stands for the scene's folder."""

    def work(scene: Path) -> tuple[int, Any, Any]:
        from ffcv_convnext.cli import run_command

        name, *arguments = [str(word).replace("SCENE", str(scene)) for word in words]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = run_command(name, arguments)
        sys.stdout.write(out.getvalue())
        return status, None, None if status_alone else out.getvalue()

    return work


def evaluate(*words: str) -> Callable[[Path], tuple[int, Any, Any]]:
    """Return a command whose scores, on stderr, are its result."""

    def work(scene: Path) -> tuple[int, Any, Any]:
        from ffcv_convnext.cli import run_command

        arguments = [word.replace("SCENE", str(scene)) for word in words]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = run_command("train", [*arguments, "--eval", "true", "--data_path", str(scene / "beton")])
        sys.stderr.write(err.getvalue())
        return status, None, [line.partition(".pth: ")[2] for line in err.getvalue().splitlines() if ".pth: " in line]

    return work


def convert_and_read(scene: Path) -> tuple[int, Any, Any]:
    """Continue the conversion: the bytes of the .beton must stay the same."""
    from ffcv_convnext.cli import run_command

    status = run_command("write", convert_command(scene, "--resume")[1:])
    beton = scene / "converted" / "train.beton"
    return status, hashlib.sha256(beton.read_bytes()).hexdigest() if beton.exists() else None, None


def decide_requeue(scene: Path) -> tuple[int, Any, Any]:
    """Decide after a third failure."""
    from ffcv_convnext.cluster.requeue_policy import decide

    return 0, None, [decide(scene / RUN, "local-1", 1).again for _ in range(2)]


def snapshot_again(scene: Path) -> tuple[int, Any, Any]:
    """Take a snapshot of the same source: it must be whole."""
    from ffcv_convnext.snapshot import take_snapshot

    folder = take_snapshot(scene / "ladder" / "code")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return 0, hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest(), None


def continue_from_the_previous(scene: Path) -> tuple[int, Any, Any]:
    """Continue the run after its newest checkpoint was lost."""
    (scene / RUN / "checkpoint-last.pth").unlink()
    return train_and_read(scene)


Command = Callable[[Path], tuple[int, Any, Any]]
CONFIGS = ("--configs", "SCENE/configs")
COMMANDS: dict[str, Command] = {
    "train": train_and_read,
    "train (finished)": lambda scene: train_and_read(scene, FINISHED),
    "train (newest lost)": continue_from_the_previous,
    "eval": evaluate("--config", str("SCENE" / RUN / "config.yaml"), "--output_dir", str("SCENE" / RUN)),
    "eval --resume": evaluate(
        *("--config", str("SCENE" / FINISHED / "config.yaml"), "--output_dir", "SCENE/e"),
        *("--resume", str("SCENE" / FINISHED / "checkpoint-best.pth")),
    ),
    "report": printed("report", "SCENE/ladder", *CONFIGS, "--out", "SCENE/report"),
    "ladder status": printed("ladder", "status", "SCENE/ladder"),
    "ladder submit": lambda scene: printed(
        *("ladder", "submit", *CONFIGS, "--job_dir", "SCENE/ladder", "--executor", "local", "--dry_run"),
        *("--seeds", "0,1", *settings(scene)),
    )(scene),
    "train --job_dir": lambda scene: printed(
        *("train", "--job_dir", "SCENE/job", "--cluster", "SCENE/profile.yaml", "--nodes", "1", "--dry_run"),
        *("--ngpus", "1", *settings(scene)),
    )(scene),
    "requeue": decide_requeue,
    "take a snapshot": snapshot_again,
    "verify": printed("verify", "SCENE/beton", status_alone=True),
    "write --resume": convert_and_read,
}

# file, its path in the scene, its mutations, the commands that read it
KINDS: list[tuple[str, str | Path, dict[str, Mutation], tuple[str, ...]]] = [
    ("run.json", RUN / "run.json", JSON, ("train", "report", "ladder status", "ladder submit")),
    ("done", FINISHED / "done", JSON, ("train (finished)", "report", "ladder status", "ladder submit")),
    ("log.jsonl", RUN / "log.jsonl", JSON, ("train", "report", "ladder status", "ladder submit")),
    ("steps.jsonl", RUN / "steps.jsonl", JSON, ("train",)),
    ("attempts.jsonl", RUN / "attempts.jsonl", JSON, ("ladder status", "requeue")),
    ("submissions.jsonl", "ladder/submissions.jsonl", JSON, ("ladder status", "ladder submit")),
    ("config.yaml", RUN / "config.yaml", YAML, ("train", "report", "eval")),
    ("checkpoint-last.pth", RUN / "checkpoint-last.pth", BYTES, ("train", "eval")),
    ("checkpoint-previous.pth", RUN / "checkpoint-previous.pth", BYTES, ("train (newest lost)",)),
    ("checkpoint-best.pth", FINISHED / "checkpoint-best.pth", BYTES, ("eval --resume",)),
    (".lock", RUN / ".lock", TEXT, ("train", "report")),
    ("rankN.log", FAILED / "rank0.log", TEXT, ("report", "ladder status")),
    ("cluster profile", "profile.yaml", YAML, ("train --job_dir",)),
    ("snapshot", "ladder/code/*/*", BYTES, ("take a snapshot",)),
    (".beton", "beton/train.beton", BYTES, ("train", "verify")),
    ("manifest", "beton/train.json", JSON, ("train", "verify")),
    (".files.txt", "beton/train.files.txt", TEXT, ("verify",)),
    ("journal", "converted/.train.unfinished/pages.jsonl", JSON, ("write --resume",)),
    ("unfinished .beton", "converted/.train.unfinished/train.beton", BYTES, ("write --resume",)),
]
PAIRS = [(kind, command) for kind in KINDS for command in kind[3]]

# --- one case ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A mutation and its end."""

    number: int
    file: str
    command: str
    mutation: str
    end: str  # one of CLASSES
    message: str  # the error, the new lines of output, or the end of the traceback


# Damage that may stay unseen, and why: docs/reliability.md says so, too.
UNSEEN = {
    "attempts.jsonl": "lines that are missing as a whole: failures count from 0 again",
    "submissions.jsonl": "lines that are missing as a whole: those runs are not listed",
    "rankN.log": "free text: an altered last error is shown as it is; if it is gone, the run counts as stopped",
    ".lock": "free text: a run of another host may count as running for 15 minutes",
    "cluster profile": "a hand-written file: another possible value is used",
}
UNSEEN_WITHOUT_CHECKSUM = "another value of the right type, NaN, or a value that nothing reads"


def may_be_unseen(case: Case) -> bool:
    """Return whether the docs name this damage."""
    return case.file in UNSEEN or case.mutation.endswith(NO_CHECKSUM)


class TooLong(BaseException):
    """The command did not end within LIMIT_S."""


def run_command_on(scene: Path, command: Command) -> tuple[int, Any, Any, str, str]:
    """Return exit status, what must stay, what may differ, the output, and a traceback's last line or ''."""
    from ffcv_convnext.files import warn_once

    warn_once.cache_clear()
    logging.getLogger("ffcv_convnext").handlers.clear()

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    failure, found = "", (0, None, None)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            found = command(scene)
        except SystemExit as error:  # from argparse
            found = (int(error.code or 0), None, None)
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
    output = out.getvalue() + err.getvalue()
    return *found, output, failure or ("Traceback in the output" if "Traceback (most" in output else "")


def copy_scene(pristine: Path, scene: Path, command: str) -> None:
    """Put a fresh copy in the place of `scene`; files that no command changes in place are linked."""
    shutil.rmtree(scene, ignore_errors=True)
    fixed = tuple(str(pristine / name) for name in ("images", "small", "beton", "ladder/code"))
    left_out = () if command == "write --resume" else ("converted", "images")

    def copy(source: str, target: str) -> None:
        os.link(source, target) if source.startswith(fixed) else shutil.copy2(source, target)

    shutil.copytree(pristine, scene, copy_function=copy, ignore=shutil.ignore_patterns(*left_out))


def damaged(number: int, seed: int, pristine: Path, scene: Path) -> tuple[Any, str, Path]:
    """Copy the scene and damage one file of it; return the pair, the mutation's name and the file."""
    pair = PAIRS[number % len(PAIRS)]
    (_, pattern, mutations, _), command = pair
    draw = random.Random(f"{seed} {number}")
    copy_scene(pristine, scene, command)
    path = draw.choice([path for path in sorted(scene.glob(str(pattern))) if path.is_file()])
    name = list(mutations)[(number // len(PAIRS)) % len(mutations)]
    content = changed = path.read_bytes()
    while changed == content:
        changed = mutations[name](content, draw)
    path.unlink()  # it may be a link
    path.write_bytes(changed)
    return pair, name, path


def classify(command: str, before: Any, after: Any, path: Path) -> tuple[str, str]:
    """Compare the end on the damaged scene with the one on the whole scene."""
    status, fixed, shown, output, failure = after
    new = [line for line in output.splitlines() if line not in before[3].splitlines()]
    text = " | ".join(new)
    if failure:
        return "traceback", failure
    if status and status != before[0]:
        lines = [line for line in new if "error: " in line]
        return ("error", lines[-1] if lines else text) if lines or command == "verify" else ("silent", text)
    if fixed != before[1]:
        return "silent", "the result differs"
    named = path.name in text or (command == "take a snapshot" and "written again" in text)
    if shown == before[2]:
        return ("warning" if named else "same result"), text
    return ("warning" if named else "silent"), text


def run_part(work: Path, numbers: range, seed: int) -> Iterator[Case]:
    """Build a scene in `work` and yield the cases with these numbers."""
    import torch

    torch.set_num_threads(1)
    scene, pristine = work / "scene", work / "pristine"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        build_scene(scene)
    shutil.copytree(scene, pristine)
    before = {}
    for name, command in COMMANDS.items():
        copy_scene(pristine, scene, name)
        before[name] = run_command_on(scene, command)
        assert before[name][4] == "", (name, before[name])
        assert before[name][0] == 0, (name, before[name])
    for number in numbers:
        (kind, command), mutation, path = damaged(number, seed, pristine, scene)
        end, message = classify(command, before[command], run_command_on(scene, COMMANDS[command]), path)
        yield Case(number, kind[0], command, mutation, end, message.replace(str(work), "")[:500])


def run_all(num: int, seed: int, work: Path, workers: int = 2) -> list[Case]:
    """Run mutations 0 to num - 1 in some processes."""
    parts = []
    for part in range(workers):
        folder = work / str(part)
        folder.mkdir()
        words = ["--part", f"{part}/{workers}", "--work", str(folder), "--num", str(num), "--seed", str(seed)]
        with open(folder / "cases.jsonl", "wb") as out, open(folder / "stderr", "wb") as err:
            command = [sys.executable, str(Path(__file__).resolve()), *words]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            parts.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err))
    for part, process in enumerate(parts):
        if process.wait():
            raise SystemExit((work / str(part) / "stderr").read_text()[-5000:])
    lines = [line for part in range(workers) for line in (work / str(part) / "cases.jsonl").read_text().splitlines()]
    return sorted((Case(**json.loads(line)) for line in lines), key=lambda case: case.number)


def format_table(cases: list[Case]) -> str:
    """Return a Markdown table: a row for each file and command."""
    rows = [["file", "command", *CLASSES], ["---", "---", *["---:"] * len(CLASSES)]]
    for kind, command in PAIRS:
        ends = Counter(case.end for case in cases if (case.file, case.command) == (kind[0], command))
        rows.append([f"`{kind[0]}`", f"`{command}`", *(str(ends[end] or "") for end in CLASSES)])
    total = Counter(case.end for case in cases)
    rows.append([f"all {len(cases)}", "", *(str(total[end]) for end in CLASSES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="list cases that were not detected")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, parts = map(int, options.part.split("/"))
        for case in run_part(options.work, range(part, options.num, parts), options.seed):
            print(json.dumps(asdict(case)), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as work:
        cases = run_all(options.num, options.seed, Path(work), options.workers)
    print(format_table(cases))
    if options.list:
        for case in cases:
            if case.end in ("silent", "traceback"):
                print(f"{case.number}: {case.file}, {case.command}, {case.mutation}: {case.end}: {case.message}")
    return int(any(case.end == "traceback" for case in cases))


if __name__ == "__main__":
    sys.exit(main())
