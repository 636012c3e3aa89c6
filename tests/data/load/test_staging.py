"""Data is copied to a node once, whatever happens meanwhile, and training reads the same from the copy."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ffcv.reader")

from support.nursery import strike_at
from support.runs import assert_equal, send_at_step, train_here

from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config, DataConfig
from ffcv_convnext.data.beton.tables import read_tables
from ffcv_convnext.data.load import NoRoom, Staged, TrainLoader, stage_data, staging_root
from ffcv_convnext.data.load import staging as module
from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.training.checkpoint import read_checkpoint
from ffcv_convnext.training.evaluation import evaluate_only

TESTS = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PAGE_BYTES = 2 << 20
NUM_PAGES = 6
TRAIN = ("train",)

pytestmark = pytest.mark.usefixtures("_small_ranges")


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range is a page, so that the file of six pages has eight ranges."""
    monkeypatch.setattr(module, "RANGE_BYTES", PAGE_BYTES)


@pytest.fixture
def data(paged: dict[str, Path], tmp_path: Path) -> Path:
    """300 samples in six pages of 2 MiB, for one test."""
    return Path(shutil.copytree(paged["shuffled"], tmp_path / "data"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def config_of(data: Path, place: Path | str, **changes: Any) -> DataConfig:
    values = {"batch_size": 20, "input_size": 32, "num_workers": 2, **changes}
    return DataConfig(data_path=data, stage_to=str(place), **values)


def stage(data: Path, place: Path | str, **changes: Any) -> Staged:
    with stage_data(config_of(data, place, **changes), TRAIN) as (_, found):
        assert found is not None
        return found


def copies(place: Path) -> set[str]:
    """Names of the folders in a place."""
    return {path.name for path in staging_root(place).iterdir() if path.is_dir()}


def limit(patch: pytest.MonkeyPatch, place: Path, room: int) -> None:
    """Let `place` have room for so many bytes in all."""

    def room_in(_: Path) -> tuple[int, str]:
        used = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
        return room - used, "there"

    patch.setattr(module, "room_in", room_in)


def other_data(data: Path, name: str) -> Path:
    """The same images with another manifest, which is other data."""
    folder = Path(shutil.copytree(data, data.with_name(name)))
    content = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**content, "source": name}))
    return folder


# --- The copy -----------------------------------------------------------------------------------------------------


def test_the_copy_is_the_original_and_the_next_run_finds_it(
    data: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ffcv_convnext")
    first = stage(data, place)
    assert first.how == "copied"
    assert first.num_bytes == (data / "train.beton").stat().st_size
    assert first.source == data
    assert place in first.folder.parents
    for name in ("train.beton", "train.json"):
        assert (first.folder / name).read_bytes() == (data / name).read_bytes()
    assert not list(first.folder.glob("*partial*"))
    again = stage(data, place)
    assert (again.how, again.folder) == ("found", first.folder)
    copied, found = (record.getMessage() for record in caplog.records)
    assert "copied train.beton, " in copied
    assert "/s), all pages match their checksums" in copied
    assert f"found the copy of train.beton in {first.folder}" in found
    assert json.loads(json.dumps(first.facts()))["how"] == "copied"


@pytest.mark.parametrize("data_cache", ["os", "process", "ram"])
def test_batches_of_the_copy_are_those_of_the_original(data: Path, place: Path, data_cache: str) -> None:
    own = DataConfig(data_path=data, batch_size=20, input_size=32, num_workers=2)
    with stage_data(config_of(data, place, data_cache=data_cache), TRAIN) as (there, _):
        assert there.data_path != data
        loaders = [TrainLoader(each, CPU, seed=0) for each in (own, there)]
        ours, theirs = ([batch for step in each.steps(1) for batch in step] for each in loaders)
        assert_equal([list(batch) for batch in ours], [list(batch) for batch in theirs])
        for loader in loaders:
            loader.close()


def test_without_the_setting_nothing_happens(data: Path) -> None:
    config = DataConfig(data_path=data)
    with stage_data(config, TRAIN) as (unchanged, found):
        assert unchanged is config
        assert found is None


# --- A kill, and the next process ---------------------------------------------------------------------------------

MOMENTS = [  # a function, which call of it ends the process, and how many of the eight ranges are complete then
    ("_FileCopy.__init__", 1, 0),
    ("_FileCopy.copy_range", 1, 0),
    ("_write", 4, 3),  # the fourth range is on its way
    ("_FileCopy.copy_range", 6, 5),
    ("write_atomically", 1, 8),
    ("_FileCopy.finish", 1, 8),
    ("_sync_folder", 1, 8),  # the file has its name, the folder has not
    ("_sync_folder", 2, 8),  # the folder has its name
]
KILLED = f"""
import os, sys
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from support.nursery import strike_at
from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.load import stage_data, staging
staging.RANGE_BYTES, staging._NUM_THREADS = {PAGE_BYTES}, 1
data, places = Path(sys.argv[1]), Path(sys.argv[2])
for number, (function, call, _) in enumerate({MOMENTS!r}):
    child = os.fork()
    if child == 0:
        strike_at([("ffcv_convnext.data.load.staging." + function, call)], [9])
        with stage_data(DataConfig(data_path=data, stage_to=str(places / str(number))), ("train",)):
            os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(paged: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a place for each of MOMENTS, in which a copy of `paged` was ended by SIGKILL."""
    places = tmp_path_factory.mktemp("places")
    for number in range(len(MOMENTS)):
        (places / str(number)).mkdir()
    words = [sys.executable, "-c", KILLED, str(paged["shuffled"]), str(places)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.split() == [str(-signal.SIGKILL.value)] * len(MOMENTS), result.stderr
    return places


@pytest.mark.parametrize("number", range(len(MOMENTS)))
def test_a_copy_goes_on_where_a_kill_ended_it(
    number: int, killed: Path, paged: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    function, call, num_done = MOMENTS[number]
    data, place = paged["shuffled"], killed / str(number)
    complete = (function, call) == ("_sync_folder", 2)
    assert all(name.endswith(".partial") for name in copies(place)) != complete
    read: list[int] = []
    original = module._FileCopy.copy_range

    def copy_range(self: Any, number: int, *rest: Any) -> int:
        read.append(number)
        return original(self, number, *rest)

    monkeypatch.setattr(module._FileCopy, "copy_range", copy_range)
    found = stage(data, place)
    assert found.how == ("found" if complete else "copied")
    assert sorted(read) == list(range(num_done, 8)), "no range that was complete is copied again"
    assert (found.folder / "train.beton").read_bytes() == (data / "train.beton").read_bytes()
    assert copies(place) == {found.folder.name}


def test_an_incomplete_copy_of_an_earlier_start_of_the_machine_is_not_used(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not on the disk when the power failed is zeros."""
    strike_at([("ffcv_convnext.data.load.staging._FileCopy.finish", 1)], [])
    with pytest.raises(RuntimeError, match="struck"):
        stage(data, place)
    monkeypatch.setattr(module, "machine_id", lambda: "another start")
    numbers: list[int] = []
    original = module._FileCopy.copy_range
    monkeypatch.setattr(module._FileCopy, "copy_range", lambda *a: numbers.append(a[1]) or original(*a))
    stage(data, place)
    assert len(numbers) == NUM_PAGES + 2


# --- Several processes --------------------------------------------------------------------------------------------

TOGETHER = f"""
import json, sys
from pathlib import Path
from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.load import stage_data
from ffcv_convnext.data.load import staging as module
module.RANGE_BYTES = {PAGE_BYTES}
print("ready", flush=True)
sys.stdin.readline()
config = DataConfig(data_path=Path(sys.argv[1]), stage_to=sys.argv[2])
with stage_data(config, ("train",), local_rank=int(sys.argv[3])) as (_, found):
    print(json.dumps(found.facts()), flush=True)
"""


@pytest.mark.parametrize("ranks", [(0, 0), (0, 1)], ids=["two runs", "two processes of a run"])
def test_processes_that_start_at_once_make_one_copy(data: Path, place: Path, ranks: tuple[int, int]) -> None:
    with ExitStack() as opened:
        started = [
            opened.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", TOGETHER, str(data), str(place), str(rank)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in ranks
        ]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        facts = [json.loads(process.communicate(timeout=60)[0]) for process in started]
    assert sorted(each["how"] for each in facts) == ["copied", "found"]
    if ranks == (0, 1):
        assert facts[0]["how"] == "copied"
    assert facts[0]["folder"] == facts[1]["folder"]


def test_a_process_takes_over_if_local_rank_0_is_gone(data: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TAKE_OVER_S", 0.3)
    with stage_data(config_of(data, place), TRAIN, local_rank=1) as (_, found):
        assert found is not None
        assert found.how == "copied"


def test_a_waiting_process_says_for_whom_and_how_much_is_copied(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ffcv_convnext")
    monkeypatch.setattr(module, "_LINE_S", 0.0)
    go_on = threading.Event()
    original = module._FileCopy.copy_range

    def slow(self: Any, number: int, *rest: Any) -> int:
        if number == 4:
            assert go_on.wait(30)
        return original(self, number, *rest)

    monkeypatch.setattr(module._FileCopy, "copy_range", slow)
    copier = threading.Thread(target=stage, args=(data, place))
    copier.start()
    waiter = threading.Thread(target=lambda: _stage_as(1, data, place))
    waiter.start()
    expected = f"waiting for process {os.getpid()} on "
    for _ in range(300):
        if any(record.getMessage().startswith(expected) for record in caplog.records):
            break
        waiter.join(0.1)
    go_on.set()
    copier.join(30)
    waiter.join(30)
    lines = [record.getMessage() for record in caplog.records]
    (line, *_) = (line for line in lines if line.startswith(expected))
    assert re.search(r"which copies the data: \S+ \w+ of 14\.7 MB$", line)
    assert sum("copied train.beton" in line for line in lines) == 1


def _stage_as(local_rank: int, data: Path, place: Path) -> None:
    with stage_data(config_of(data, place), TRAIN, local_rank=local_rank):
        pass


# --- Data that is wrong -------------------------------------------------------------------------------------------


def test_a_damaged_page_of_the_original_is_found_while_it_is_copied(data: Path, place: Path) -> None:
    beton = data / "train.beton"
    tables = read_tables(beton)
    at = tables.page_start(3, NUM_PAGES) + tables.page_size - 1
    content = np.memmap(beton, np.uint8, "r+")
    content[at] ^= 1
    content.flush()
    with pytest.raises(Failure) as caught:
        stage(data, place)
    assert str(caught.value).startswith(f"{beton}: page 3 differs from its checksum in the manifest")
    assert str(caught.value).endswith(f"ffcv-convnext verify {beton} --repair")
    assert all(name.endswith(".partial") for name in copies(place))
    content[at] ^= 1
    content.flush()
    os.utime(beton, ns=(0, 0))
    assert (stage(data, place).folder / "train.beton").read_bytes() == beton.read_bytes()


def test_a_truncated_original_is_refused_before_the_copy(data: Path, place: Path) -> None:
    os.truncate(data / "train.beton", 1_000_000)
    with pytest.raises(ValueError, match=r"train\.beton has 1000000 bytes, its manifest states "):
        stage(data, place)
    assert copies(place) == set()


def test_an_original_that_changes_meanwhile_is_an_error(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module._copy_files

    def copy_files(*args: Any) -> None:
        original(*args)
        os.utime(data / "train.beton", ns=(1, 1))

    monkeypatch.setattr(module, "_copy_files", copy_files)
    with pytest.raises(Failure, match="the data changed while it was copied"):
        stage(data, place)
    assert copies(place) == set()


def test_a_damaged_copy_is_made_again(data: Path, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = stage(data, place)
    os.truncate(first.folder / "train.beton", 5_000_000)
    again = stage(data, place)
    assert again.how == "copied"
    assert "the copy is damaged and is made again: " in caplog.text
    assert (again.folder / "train.beton").read_bytes() == (data / "train.beton").read_bytes()


def test_a_damaged_copy_that_another_run_reads_is_an_error(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TAKE_OVER_S", 0.3)
    with stage_data(config_of(data, place), TRAIN) as (there, _):
        assert there.data_path is not None
        os.truncate(there.data_path / "train.beton", 5_000_000)
        with pytest.raises(NoRoom, match="is damaged and in use by another run"):
            stage(data, place)


# --- Room ---------------------------------------------------------------------------------------------------------


def test_without_room_there_is_one_line_before_anything_is_copied(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, place, 5_000_000)
    with pytest.raises(NoRoom) as caught:
        stage(data, place)
    assert str(caught.value).startswith(f"stage_to = {place}: train.beton need")
    assert "5.0 MB are free there; make room, or use another folder or --stage_to auto" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert copies(place) == set()


def test_a_disk_that_fills_up_meanwhile_is_no_room(data: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(NoRoom, match="is full; make room"):
        stage(data, place)
    assert copies(place) == set(), "what was copied is removed, so that others have the room"


def test_unused_copies_are_removed_only_if_asked_and_the_oldest_first(
    data: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (other_data(data, name) for name in ("one", "two", "three"))
    size = (data / "train.beton").stat().st_size
    old, new = (stage(each, place).folder for each in (one, two))
    os.utime(staging_root(place) / f"{old.name}.lock", (1, 1))
    limit(monkeypatch, place, int(2.5 * size))
    with pytest.raises(NoRoom, match=r"remove unused copies in .* with --stage_evict true"):
        stage(three, place)
    assert copies(place) == {old.name, new.name}
    third = stage(three, place, stage_evict=True).folder
    assert copies(place) == {new.name, third.name}


def test_a_copy_in_use_is_never_removed(data: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (other_data(data, name) for name in ("one", "two"))
    limit(monkeypatch, place, int(1.5 * (data / "train.beton").stat().st_size))
    with stage_data(config_of(one, place), TRAIN) as (there, _):
        assert there.data_path is not None
        with pytest.raises(NoRoom):
            stage(two, place, stage_evict=True)
        assert copies(place) == {there.data_path.name}
    assert stage(two, place, stage_evict=True).how == "copied"
    assert there.data_path.name not in copies(place)


# --- auto ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two places for auto that count as another disk than the data's."""
    places = [tmp_path / "first", tmp_path / "second"]
    for each in places:
        each.mkdir()
    monkeypatch.setattr(module, "_candidates", lambda: {each.name: str(each) for each in places})
    monkeypatch.setattr(module, "_on_one_disk", lambda *_: False)
    return places


def test_auto_takes_the_first_place_with_room(
    data: Path, candidates: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "room_in", lambda place: (0 if place == candidates[0] else 1 << 40, "there"))
    assert candidates[1] in stage(data, "auto").folder.parents
    monkeypatch.setattr(module, "room_in", lambda _: (1 << 40, "there"))
    assert stage(data, "auto").how == "found", "a copy is better than an earlier place"


def test_auto_without_a_place_reads_the_original_with_one_warning(
    data: Path, candidates: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "room_in", lambda _: (0, "there"))
    with stage_data(config_of(data, "auto"), TRAIN) as (config, found):
        assert config.data_path == data
        assert found is not None
        assert (found.how, found.folder) == ("original", data)
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.getMessage().startswith(f"stage_to = auto: training reads the original in {data}: ")
    assert all(str(place) in record.getMessage() for place in candidates)


def test_auto_does_not_copy_within_a_disk_or_to_a_network(
    data: Path, candidates: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "is_on_network", lambda place: place == candidates[0])
    monkeypatch.setattr(module, "_on_one_disk", lambda place, _: place == candidates[1])
    assert stage(data, "auto").how == "original"
    assert f"first = {candidates[0]} is on a network" in caplog.text
    assert f"second = {candidates[1]} is on the disk of the original" in caplog.text


def test_the_places_of_auto_are_the_scratch_folders_of_the_job_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/t")
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    assert list(module._candidates().values()) == ["/t", "/dev/shm"]
    monkeypatch.setenv("SLURM_TMPDIR", "/s")
    assert list(module._candidates().values()) == ["/s", "/t", "/dev/shm"]


# --- The setting --------------------------------------------------------------------------------------------------


def test_a_variable_is_the_node_s(data: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_OF_THE_TEST", str(place))
    assert place in stage(data, "$SCRATCH_OF_THE_TEST").folder.parents
    monkeypatch.delenv("SCRATCH_OF_THE_TEST")
    with pytest.raises(ValueError, match=r"stage_to = \$SCRATCH_OF_THE_TEST: the variable is not set on "):
        stage(data, "$SCRATCH_OF_THE_TEST")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage_to", "/does/not/exist"], "error: stage_to = /does/not/exist does not exist on "),
        (["--stage_to", "scratch"], "error: stage_to = scratch: expected a folder that begins with /, ~ or a variable"),
        (["--stage_evict", "true"], "error: stage_evict = true needs --stage_to DIR"),
    ],
)
def test_a_wrong_setting_is_one_line(
    small_settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    flags = [word for name, value in small_settings.items() for word in (f"--{name}", str(value))]
    assert run_command("train", [*flags, "--output_dir", str(tmp_path / "run"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_a_folder_of_another_user_is_refused(data: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging_root(place).mkdir()
    folder = staging_root(place)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(module, "staging_root", lambda _: folder)
    with pytest.raises(NoRoom, match="belongs to another user"):
        stage(data, place)


def test_a_file_system_without_locks_is_refused(data: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(NoRoom, match="has no locks; use a local disk"):
        stage(data, place)


# --- Runs ---------------------------------------------------------------------------------------------------------


def test_a_run_reads_the_copy_and_records_the_original(
    small_settings: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    settings = {**small_settings, "epochs": 2}
    plain, staged = tmp_path / "plain", tmp_path / "staged"
    train_here(settings, output_dir=plain)
    train_here(settings, output_dir=staged, stage_to=str(place))
    ours, theirs = (read_checkpoint(folder / "checkpoint-last.pth") for folder in (staged, plain))
    for part in ("model", "ema", "optimizer"):
        assert_equal(ours[part], theirs[part], where=part)
    (start,) = json.loads((staged / "run.json").read_text())["starts"]
    data = small_settings["data_path"]
    assert (start["staged"]["how"], start["staged"]["source"]) == ("copied", data)
    assert f"data_path: {data}\n" in (staged / "config.yaml").read_text()
    (start,) = json.loads((plain / "run.json").read_text())["starts"]
    assert start["staged"] is None


@pytest.mark.parametrize("at_first", [True, False])
def test_a_run_may_continue_with_or_without_a_copy(
    at_first: bool, small_settings: dict[str, Any], place: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip

    words: list[dict[str, Any]] = [{"stage_to": str(place)}, {}]
    first, second = words if at_first else words[::-1]
    train_here(small_settings, output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        send_at_step(patch, 7, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train_here(small_settings, output_dir=tmp_path / "run", **first)
    train_here(small_settings, output_dir=tmp_path / "run", **second)
    ours, theirs = (read_checkpoint(tmp_path / name / "checkpoint-last.pth") for name in ("run", "whole"))
    assert_equal(ours["model"], theirs["model"])
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["staged"] is not None for start in starts] == [at_first, not at_first]


def test_an_evaluation_finds_the_copy_of_training(small_settings: dict[str, Any], place: Path, tmp_path: Path) -> None:
    settings = {**small_settings, "epochs": 1, "output_dir": tmp_path / "run", "stage_to": str(place)}
    scores = train_here(settings)
    (copy,) = copies(place)
    (found,) = evaluate_only(Config.from_flat({**settings, "eval": True})).values()
    assert found["test_acc1"] == scores["test_acc1"]
    assert copies(place) == {copy}
