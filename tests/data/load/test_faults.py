"""What loading does when something is wrong, or goes on for long: see also test_loader.py and test_restart.py."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY
from support.samples import lists

pytest.importorskip("ffcv.reader")

from ffcv.reader import Reader
from ffcv.types import FieldDescType, HeaderType

import ffcv_convnext
from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.data.beton.manifest import tables_digest
from ffcv_convnext.data.load.crops import center_crop_kernel
from ffcv_convnext.data.load.decoder import BatchDecoder, SampleError
from ffcv_convnext.data.load.loader import EvalLoader, TrainLoader

CPU = torch.device("cpu")

# Prints a checksum of the batches of a training and an evaluation epoch; news about compilation go to stderr.
READ = """
import hashlib, logging, sys
from pathlib import Path

logging.basicConfig(level="INFO", format="%(message)s")
import torch
from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.load.loader import EvalLoader, TrainLoader

config = DataConfig(
    data_path=Path(sys.argv[1]), batch_size=8, input_size=40, num_workers=2, train_interpolation="random"
)
digest, cpu = hashlib.sha256(), torch.device("cpu")
loaders = [TrainLoader(config, cpu, seed=0)] + ([EvalLoader(config, cpu)] if sys.argv[2] == "both" else [])
logging.info("loaders are built")
for batches in [(batch for step in loaders[0].steps(0) for batch in step), *loaders[1:]]:
    for images, labels in batches:
        digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
print(digest.hexdigest())
"""

# Prints resident memory (kB), threads and open files after the 5th and after the 50th epoch of two loaders at once.
FIFTY_EPOCHS = """
import gc, json, os, sys
from pathlib import Path
import torch
from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.load.loader import EvalLoader, TrainLoader

def held():
    gc.collect()
    memory = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(memory.split()[1]), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

config, cpu = DataConfig(data_path=Path(sys.argv[1]), batch_size=16, num_workers=2), torch.device("cpu")
train, val = TrainLoader(config, cpu, seed=0), EvalLoader(config, cpu)
found = []
for epoch in range(1, 51):
    steps, evaluation = train.steps(epoch), iter(val)
    for number, step in enumerate(steps):
        for images, labels in step:
            next(evaluation, None)
        if epoch % 3 == 0 and number == 2:
            break  # leave the epoch early: now and then by closing it, else by forgetting it
    if epoch % 2:
        steps.close()
    if epoch in (5, 50):
        del steps, step, evaluation, images, labels
        found.append(held())
print(json.dumps(found))
"""


def python(program: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def ended(process: subprocess.Popen[str], timeout: float = 300) -> tuple[str, str]:
    """What a process printed to stdout and stderr; it must end well."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out.strip(), err


# --- the decoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [2_150, pytest.param(21_500, marks=pytest.mark.slow)])
def test_no_mutated_sample_crashes_a_decoder_or_makes_it_leave_its_memory(tmp_path: Path, num_images: int) -> None:
    """Mutated images through both decoders (`make slow`: 20,000), and 4,800 samples of mutated tables; see fuzz.py."""
    done = subprocess.run(
        [sys.executable, "-m", "support.fuzz", str(tmp_path), str(num_images), "1"],
        cwd=REPOSITORY / "tests",
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["images"]["mutated"] >= 0.93 * num_images
    assert sum(counts["tables"].values()) == 4_800
    outcomes = {
        "ok",
        "its data lies outside the file",
        "its data does not start with a readable JPEG header",
        "its data has another size than the sample table says",
        "its JPEG data is damaged",
    }
    assert outcomes <= set(counts["images"]), "each of them was met"
    assert counts["images"]["mutated, decoded"] > 0.05 * num_images
    assert outcomes - {"its JPEG data is damaged"} | {"the sample table gives it an unknown encoding"} <= set(
        counts["tables"]
    )


@pytest.mark.parametrize("sample", [-1, 20, (1 << 32) - 1, (1 << 32) + 20])
def test_a_sample_that_is_not_in_the_file_is_refused(beton_dir: Path, sample: int) -> None:
    loader = EvalLoader(Config.from_flat({"data_path": str(beton_dir)}).data, CPU).decoder
    with pytest.raises(ValueError, match="expected 0 to 19"):
        next(loader.batches(lists([3, sample]), 0, 0))


# --- the compiler ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(beton_dir: Path) -> str:
    """The checksum of both loaders' batches on this processor."""
    return ended(python(READ, str(beton_dir), "both"))[0]


@pytest.mark.parametrize(
    ("name", "features"), [("generic", ""), pytest.param("haswell", "+avx2,+bmi2,+fma", marks=pytest.mark.slow)]
)
def test_another_processor_makes_the_same_pixels(
    beton_dir: Path, tmp_path: Path, native: str, name: str, features: str
) -> None:
    """Compiled as for a processor without vector extensions, and for one with AVX2 but without AVX-512."""
    if name != "generic" and platform.machine() != "x86_64":
        pytest.skip("a processor of another family")
    env = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert ended(python(READ, str(beton_dir), "both", **env))[0] == native


def test_a_first_compilation_is_announced_and_kept_for_later_starts_however_many_begin_at_once(
    beton_dir: Path, tmp_path: Path
) -> None:
    first = [python(READ, str(beton_dir), "train", NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    results = [ended(process) for process in first]
    for _, news in results:
        lines = news.splitlines()
        assert len(lines) == 4, news
        assert re.fullmatch(
            r"compiling the decoder of train\.beton for this processor; .* once; cached in .*", lines[0]
        )
        assert re.fullmatch(r"compiled the decoder of train\.beton in \d+\.\d s", lines[1])
        assert lines[2].startswith("data_cache = os: train.beton and val.beton take ")
        assert lines[3] == "loaders are built", "the first batch does not wait for the compiler"
    # Later, from a copy of the sources, as a job runs them.
    package = Path(ffcv_convnext.__file__).parent
    copy = shutil.copytree(package, tmp_path / "copy" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    env = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1"}
    assert ended(python("import ffcv_convnext; print(ffcv_convnext.__file__)", **env))[0].startswith(str(copy))
    again = ended(python(READ, str(beton_dir), "train", **env))
    assert [line.partition(" =")[0] for line in again[1].splitlines()] == ["data_cache", "loaders are built"]
    assert {again[0]} == {checksum for checksum, _ in results}


# --- fifty epochs ------------------------------------------------------------------------------------------------


def test_memory_threads_and_open_files_stay_flat_over_fifty_epochs_of_two_loaders(beton_dir: Path) -> None:
    """Some of the epochs are left early; stock FFCV keeps a thread and its memory then.

    A batch kept in each epoch would be 45 x 2.4 MB. The allocator's own ups and downs are about ten batches.
    """
    (early_kb, *early), (late_kb, *late) = json.loads(ended(python(FIFTY_EPOCHS, str(beton_dir)))[0])
    assert late == early, "threads, open files"
    assert late_kb - early_kb < 50_000


def test_a_disk_that_does_not_answer_is_an_error_after_a_while(
    beton_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stand-in: a worker thread that waits."""
    loader = TrainLoader(Config.from_flat({"data_path": str(beton_dir), "batch_size": 8}).data, CPU, seed=0)
    answer = threading.Event()
    monkeypatch.setattr("ffcv_convnext.data.load.decoder._TIMEOUT_S", 0.3)
    monkeypatch.setattr(loader.decoder, "_decode", lambda *_: answer.wait(60))
    try:
        with pytest.raises(SampleError, match=r"decoding samples \[.*\] failed: timeout after 0\.3 s; check its"):
            list(loader.decoder.batches(lists(range(8)), seed=0, epoch=0))
        loader.close()  # does not wait for the thread
        assert not answer.is_set()
    finally:
        answer.set()


# --- what is refused before training starts ----------------------------------------------------------------------


def cut_off(beton: Path) -> None:
    os.truncate(beton, beton.stat().st_size - 1000)


def empty(beton: Path) -> None:
    os.truncate(beton, 0)


def write_header(beton: Path, **values: int) -> None:
    content = np.memmap(beton, np.uint8, "r+")
    for name, value in values.items():
        content[: HeaderType.itemsize].view(HeaderType)[name] = value
    content.flush()


def set_version(beton: Path) -> None:
    write_header(beton, version=3)


def lose_samples(beton: Path) -> None:
    write_header(beton, num_samples=0)


def replace_by_a_picture(beton: Path) -> None:
    beton.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(beton.stat().st_size - 8))


def take_another_manifest(beton: Path) -> None:
    other = "val" if beton.stem == "train" else "train"
    shutil.copy(beton.with_name(f"{other}.json"), beton.with_suffix(".json"))


def break_manifest(beton: Path) -> None:
    beton.with_suffix(".json").write_text("{")


def restate(beton: Path) -> None:
    """Make the manifest agree with the file again."""
    path = beton.with_suffix(".json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "sha256": tables_digest(beton), "num_bytes": beton.stat().st_size}))


def mislabel(beton: Path) -> None:
    content = np.memmap(beton, np.uint8, "r+")
    start = HeaderType.itemsize + 2 * FieldDescType.itemsize
    row = Reader(str(beton)).metadata.dtype
    content[start : start + row.itemsize].view(row)["f1"] = 1000
    content.flush()
    restate(beton)


def rename_fields(beton: Path) -> None:
    content = np.memmap(beton, np.uint8, "r+")
    fields = content[HeaderType.itemsize : HeaderType.itemsize + 2 * FieldDescType.itemsize].view(FieldDescType)
    for field, name in zip(fields, (b"picture", b"target"), strict=True):
        field["name"][:] = np.frombuffer(name.ljust(len(field["name"]), b"\0"), np.uint8)
    content.flush()
    restate(beton)


REFUSALS: dict[Callable[[Path], None], str] = {
    cut_off: r"has \d+ bytes, its manifest states \d+: an incomplete copy .*; copy it again",
    empty: r"has 0 bytes, its manifest states \d+",
    set_version: r"does not begin with FFCV's version number 2 \(found 3\): .*; convert it again",
    replace_by_a_picture: r"does not begin with FFCV's version number 2 \(found 20617\)",
    lose_samples: r"holds no samples: .*; convert it again",
    take_another_manifest: r"has \d+ bytes, its manifest states \d+: .* from another conversion",
    break_manifest: r"is not usable \(.*\); convert it again",
    mislabel: r"labels 0 to 1000 do not fit 4 classes",
    rename_fields: r"has the fields picture, target: expected image, label; convert it again with write_ffcv",
}


@pytest.fixture(scope="module")
def compiled(beton_dir: Path) -> None:
    """Compilation would be announced beside the error."""
    config = Config.from_flat({"data_path": str(beton_dir), "batch_size": 8}).data
    TrainLoader(config, CPU, seed=0).close()
    EvalLoader(config, CPU).close()


@pytest.mark.usefixtures("compiled", "one_thread")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("harm", list(REFUSALS))
def test_training_on_a_bad_file_ends_at_once_with_one_line(
    beton_dir: Path,
    tmp_path: Path,
    small_settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    split: str,
) -> None:
    own = Path(shutil.copytree(beton_dir, tmp_path / "data"))
    harm(own / f"{split}.beton")
    values = {**small_settings, "data_path": own, "output_dir": tmp_path / "run"}
    capsys.readouterr()
    assert run_command("train", [word for name, value in values.items() for word in (f"--{name}", str(value))]) == 2
    *news, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(each.startswith("data_cache = os: ") for each in news), "of the other file, which is good"
    assert len(news) == (split == "val")
    assert str(own / split) in line
    assert re.search(REFUSALS[harm], line), line
    assert not list((tmp_path / "run").glob("*.jsonl")), "no step was taken"


def test_a_file_without_manifest_is_looked_at_before_it_is_read(beton_dir: Path, tmp_path: Path) -> None:
    """The benchmarks' way to files of stock FFCV."""
    decoder = center_crop_kernel(Config().data)
    for harm in (set_version, lose_samples, empty):
        beton = Path(shutil.copy(beton_dir / "val.beton", tmp_path / f"{harm.__name__}.beton"))
        harm(beton)
        with pytest.raises(ValueError, match=r"(begin with FFCV's version number|holds no samples)") as caught:
            BatchDecoder(beton, decoder, num_workers=1, batches_ahead=1, device=CPU)
        assert "\n" not in str(caught.value)
