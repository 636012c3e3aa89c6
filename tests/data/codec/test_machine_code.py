"""Compiled code that is kept on the disk and called without numba."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ffcv_convnext.data.codec import machine_code, resample
from ffcv_convnext.data.codec.machine_code import Array, Code, Functions, _callable, load_code

MODULE = """
import numpy as np
from numba import njit

options = dict(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@njit(_nrt=False, **options)
def weigh(pixels, matrix, factor):
    total = 0
    for i in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            total += matrix[i, k] * pixels[k] * factor
    pixels[0] = 7
    return total


@njit(**options)
def allocates(number):
    return np.zeros(number, np.int64)[number // 2] + number


@njit(_nrt=False, **options)
def returns_a_fraction(number):
    return number / 2
"""
KINDS = {"weigh": (Array(np.uint8), Array(np.int64, 2), int)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder; the module above can be imported."""
    (tmp_path / "counted.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.setattr(machine_code, "code_folder", lambda: folder)
    return folder


def weigh() -> int:
    pixels, matrix = np.array([1, 2, 3], np.uint8), np.array([[1, 10, 100], [2, 20, 200]])
    result = Functions("counted", KINDS).weigh(pixels, matrix, -3)
    assert pixels.tolist() == [7, 2, 3]
    return result


def test_a_function_gets_its_arrays_and_numbers() -> None:
    assert weigh() == -3 * (321 + 642)


def test_the_second_load_compiles_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weigh()
    monkeypatch.setattr(machine_code, "_compile", lambda *_: pytest.fail("compiled again"))
    assert weigh() == first
    assert len(list(cache.iterdir())) == 1, "no temporary files stay"


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[:90] + b"x" + content[91:]])
def test_a_damaged_file_is_compiled_again(cache: Path, damage) -> None:
    first = weigh()
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert weigh() == first


def test_without_room_on_the_disk_it_works_all_the_same(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine_code, "write_atomically", full)
    assert weigh() == -3 * 963
    assert list(cache.iterdir()) == []


def test_another_setting_of_the_compiler_has_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weigh()
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    weigh()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(3, np.int8),
        np.zeros((3, 1), np.uint8),
        np.zeros(6, np.uint8)[::2],
    ],
)
def test_an_array_of_another_kind_is_an_error(wrong: np.ndarray) -> None:
    """It would be read as something else."""
    call = _callable("weigh", KINDS["weigh"], 0)
    with pytest.raises(TypeError, match=r"weigh: .*expected a contiguous array"):
        call(wrong, np.zeros((2, 3), np.int64), 1)


def test_code_that_needs_numba_s_memory_functions_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"lets allocates call .*NRT"):
        Functions("counted", {"allocates": (int,)})


def test_a_result_that_is_no_int64_is_refused() -> None:
    with pytest.raises(RuntimeError, match="returns_a_fraction returns float64"):
        Functions("counted", {"returns_a_fraction": (int,)})


@pytest.mark.parametrize("features", ["", "+avx2"])
def test_code_for_another_processor_resizes_to_the_same_bytes(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "+avx2" not in machine_code.binding.get_host_cpu_features().flatten() and features:
        pytest.skip("a processor without AVX2")
    image = np.random.default_rng(0).integers(0, 256, (211, 333, 3), dtype=np.uint8)
    expected = resample.resample(image, (150, 95))

    class Features:
        def flatten(self) -> str:
            return features

    monkeypatch.setattr(machine_code.binding, "get_host_cpu_name", lambda: "generic")
    monkeypatch.setattr(machine_code.binding, "get_host_cpu_features", Features)
    monkeypatch.setattr(resample, "_functions", resample._functions.__wrapped__)
    assert np.array_equal(resample.resample(image, (150, 95)), expected)


def test_a_file_with_two_functions_keeps_both(cache: Path) -> None:
    codes = resample._compile()
    assert all(load_code("two", lambda: codes))
    assert machine_code._read(next(cache.glob("two-*"))) == codes
    assert len(set(load_code("two", lambda: [Code("none", b"")]))) == 2


def test_markers_are_added_without_numba_once_they_are_compiled(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.jpg")
    program = (
        "import sys\nfrom ffcv_convnext.data.codec.restart_markers import add_restart_markers\n"
        f"add_restart_markers(open({str(tmp_path / 'red.jpg')!r}, 'rb').read())\nprint('numba' in sys.modules)"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "False"
