"""Where stored bytes come from: the same batches from every data_cache, reads ahead, memory, a disk that fails."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.samples import lists, pack_all
from torch import Tensor

pytest.importorskip("ffcv.reader")

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.beton.manifest import Manifest, tables_digest
from ffcv_convnext.data.load import loader
from ffcv_convnext.data.load.decoder import SampleError
from ffcv_convnext.data.load.loader import EvalLoader, TrainLoader
from ffcv_convnext.data.load.sampler import GlobalBatchSampler, Samples
from ffcv_convnext.data.load.sources import Buffered, Mmap, ReadError, merge
from ffcv_convnext.host import AvailableMemory, evict, num_bytes_in_memory

CPU = torch.device("cpu")
MB = 1 << 20
Batches = list[tuple[Tensor, Tensor]]


def settings(data_path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"data_path": data_path, "batch_size": 8, "input_size": 32, "num_workers": 2, **changes})


def same(ours: Batches, theirs: Batches) -> bool:
    """Whether two lists of batches are equal bit for bit."""
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)
    )


def epoch(of: TrainLoader, number: int = 0, first_step: int = 0) -> Batches:
    return [batch for step in of.steps(number, first_step) for batch in step]


@pytest.fixture
def own_dir(beton_dir: Path, tmp_path: Path) -> Path:
    """A copy of `beton_dir` that a test may damage."""
    return Path(shutil.copytree(beton_dir, tmp_path / "beton"))


def sample_file(kind: type[Mmap | Buffered], folder: Path) -> tuple[Mmap | Buffered, NDArray[Any]]:
    """An opened train.beton, and its table of samples."""
    from ffcv.reader import Reader

    reader = Reader(str(folder / "train.beton"))
    return kind(folder / "train.beton", reader.metadata["f0"]["data_ptr"], reader.alloc_table), reader.metadata


# --- the same batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(beton_dir: Path) -> dict[str, Batches]:
    """What data_cache os gives."""
    train = TrainLoader(settings(beton_dir), CPU, seed=3)
    return {"0": epoch(train), "1": epoch(train, 1), "val": list(EvalLoader(settings(beton_dir), CPU))}


@pytest.mark.parametrize("data_cache", ["process", "ram"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_data_cache_gives_the_same_batches_bit_for_bit(
    beton_dir: Path, expected: dict[str, Batches], data_cache: str, num_workers: int
) -> None:
    config = settings(beton_dir, data_cache=data_cache, num_workers=num_workers)
    train, val = TrainLoader(config, CPU, seed=3), EvalLoader(config, CPU)
    assert same(epoch(train), expected["0"])
    assert same(epoch(train, 1), expected["1"])
    assert same(epoch(train, 1, first_step=4), expected["1"][4:])
    assert same(list(val), expected["val"])
    for each in (train, val):
        each.close()


@pytest.mark.parametrize("data_cache", ["process", "ram"])
def test_a_loader_can_be_read_twice_at_once_from_every_data_cache(
    beton_dir: Path, expected: dict[str, Batches], data_cache: str
) -> None:
    train = TrainLoader(settings(beton_dir, data_cache=data_cache), CPU, seed=3)
    iterators = [(batch for step in train.steps(number) for batch in step) for number in (0, 1)]
    first, second = zip(*zip(*iterators, strict=True), strict=True)
    assert same(list(first), expected["0"])
    assert same(list(second), expected["1"])


def test_a_sample_that_lies_outside_the_file_is_named_by_every_data_cache(own_dir: Path) -> None:
    beton = own_dir / "train.beton"
    _, rows = sample_file(Mmap, own_dir)
    content = bytearray(beton.read_bytes())
    at = content.index(rows.tobytes()) + rows.dtype.itemsize * 5
    rows = rows.copy()
    rows["f0"]["data_ptr"][5] = len(content) + 7
    content[at : at + rows.dtype.itemsize] = rows[5:6].tobytes()
    beton.write_bytes(content)
    manifest = Manifest.read(own_dir / "train.json")
    dataclasses.replace(manifest, sha256=tables_digest(beton)).write(own_dir / "train.json")
    for data_cache in ("os", "process", "ram"):
        train = TrainLoader(settings(own_dir, data_cache=data_cache), CPU, seed=0)
        with pytest.raises(SampleError, match=r"sample 5 .* its data lies outside the file"):
            list(train.decoder.batches(lists([3, 5, 7]), 0, 0))
        with pytest.raises(SampleError, match=r"sample 5 .* its data lies outside the file"):
            list(train.decoder.batches(lists([5]), 0, 0))
        assert len(list(train.decoder.batches(lists([3, 7, 3]), 0, 0))) == 1, "and the others are read"


@pytest.mark.parametrize("size", [0, 1 << 20, 1 << 63, (1 << 64) - 8])
def test_a_table_that_points_out_of_the_file_is_not_followed(beton_dir: Path, size: int) -> None:
    beton = beton_dir / "train.beton"
    end = beton.stat().st_size
    table = np.zeros(3, [("ptr", "<u8"), ("size", "<u8")])
    table["ptr"], table["size"] = [end + 5, 16, end - 1], [0, 10, size]
    file = Buffered(beton, np.array([16, end - 1, end + 5, 99], np.uint64), table)
    data = file.begin(np.arange(4))
    kept = [16] if size else [16, end - 1]
    assert data.wait().addresses.tolist() == kept
    assert data.wait().content.tobytes() == beton.read_bytes()[16:26]
    file.close()


# --- page-wise ----------------------------------------------------------------------------------------------------


def test_a_quasi_random_epoch_has_every_sample_once_whatever_the_data_cache(paged: dict[str, Path]) -> None:
    found = []
    for data_cache in ("os", "process", "ram"):
        config = settings(
            paged["shuffled"], order="quasi_random", shuffle_window_mb=5, data_cache=data_cache, batch_size=30
        )
        train = TrainLoader(config, CPU, seed=3)
        assert train.page_shuffle is not None
        assert train.page_shuffle.num_windows == 3
        order = pack_all(GlobalBatchSampler(30, 1, 1).micro_batches(300, 3, 0, 0, 0, train.page_shuffle))
        assert np.array_equal(np.sort(order), np.arange(300))
        found.append(epoch(train))
        labels = train.decoder.labels[order]
        assert torch.cat([labels for _, labels in found[-1]]).tolist() == labels.tolist()
        assert same(epoch(train, 0, first_step=7), found[-1][7:])
        ranks = [TrainLoader(config, CPU, seed=3, rank=rank, world=2) for rank in (0, 1)]
        in_turn = [batch for pair in zip(*map(epoch, ranks), strict=True) for batch in pair]
        assert same(in_turn, found[-1])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_the_pages_of_the_next_window_are_read_while_this_one_is_used(
    paged: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(paged["shuffled"], order="quasi_random", shuffle_window_mb=5, batch_size=10)
    train = TrainLoader(config, CPU, seed=3)
    assert train.page_shuffle is not None
    assert isinstance(train.decoder.source, Mmap)
    announced: list[int] = []
    announce = train.decoder.source.announce

    def watched(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        announced.extend(starts[lengths == 2 * MB].tolist())
        announce(starts, lengths)

    monkeypatch.setattr(train.decoder.source, "announce", watched)
    epoch(train)
    first, *others = train.page_shuffle._windows(3, 0)
    assert announced == train.page_shuffle.offsets[np.concatenate(others)].tolist()
    assert set(announced).isdisjoint(train.page_shuffle.offsets[first].tolist())
    assert all(offset % (2 * MB) == 0 for offset in announced)


def test_quasi_random_refuses_a_file_in_class_order_unless_one_window_holds_it(paged: dict[str, Path]) -> None:
    config = settings(paged["in order"], order="quasi_random", shuffle_window_mb=5)
    with pytest.raises(ValueError, match=r"order = quasi_random: .*train\.beton is in class order.*--overwrite") as it:
        TrainLoader(config, CPU, seed=0)
    assert "\n" not in str(it.value)
    whole = TrainLoader(dataclasses.replace(config, shuffle_window_mb=100), CPU, seed=0)
    plain = TrainLoader(dataclasses.replace(config, order="random"), CPU, seed=0)
    assert same(epoch(whole), epoch(plain)), "a window that holds everything is a full shuffle"


# --- reading ahead ------------------------------------------------------------------------------------------------


def evict_or_skip(path: Path) -> None:
    try:
        evict(path)
    except OSError as error:
        pytest.skip(str(error))


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_mapped_file_s_coming_samples_are_read_before_they_are_touched(paged: dict[str, Path]) -> None:
    file, _ = sample_file(Mmap, paged["shuffled"])
    evict_or_skip(file.beton)
    wanted = np.arange(200, 240)
    size = sum(int(file.sizes[entry]) for entry in file.entries(wanted))
    data = file.begin(wanted)
    assert size <= data.num_bytes <= size + 40 * 32 * 1024
    assert until(lambda: num_bytes_in_memory(file.beton) >= size)
    assert num_bytes_in_memory(file.beton) < 3 * size, "and not much more than what was asked for"
    file.close()


@pytest.mark.parametrize("data_cache", ["os", "process"])
def test_little_more_than_the_requested_samples_is_read_from_a_cold_file(
    paged: dict[str, Path], data_cache: str
) -> None:
    """A page that is touched without having been asked for would bring up to some MB around it."""
    train = TrainLoader(settings(paged["shuffled"], data_cache=data_cache, check_data="never"), CPU, seed=0)
    file, wanted = train.decoder.source, np.arange(5, 300, 20)
    list(train.decoder.batches(lists(wanted[:1]), 0, 0))
    evict_or_skip(file.beton)
    list(train.decoder.batches(lists(wanted[:8], wanted[8:]), 0, 0))
    size = sum(int(file.sizes[entry]) for entry in file.entries(wanted))
    assert size <= num_bytes_in_memory(file.beton) < 2 * size < file.num_bytes / 5


def test_reading_ahead_has_a_limit(paged: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffcv_convnext.data.load.sources._BYTES_AHEAD", MB)
    for kind in (Mmap, Buffered):
        file, _ = sample_file(kind, paged["shuffled"])
        asked: list[int] = []

        def batches(asked: list[int] = asked) -> Iterator[Samples]:
            for number in range(30):
                asked.append(number)
                yield Samples.of(np.arange(10 * number, 10 * number + 10))

        fetched = file.fetch(batches())
        a_batch = file.num_bytes / 30
        for number, (samples, data) in enumerate(fetched):
            assert samples.indices[0] == 10 * number
            data.wait()
            data.release()
            assert len(asked) - number < MB / a_batch + 3
        assert len(asked) == 30
        file.close()


def test_near_parts_of_a_file_are_read_as_one() -> None:
    addresses = np.array([100, 150, 300, 1000, 1005], np.uint64)
    sizes = np.array([50, 20, 10, 50, 5], np.uint64)  # the last lies inside the one before
    starts, lengths, part = merge(addresses, sizes, gap=130)
    assert (starts.tolist(), lengths.tolist(), part.tolist()) == ([100, 1000], [210, 50], [0, 0, 0, 1, 1])
    starts, lengths, part = merge(addresses, sizes, gap=129)
    assert (starts.tolist(), lengths.tolist()) == ([100, 300, 1000], [70, 10, 50])
    assert [len(found) for found in merge(addresses[:0], sizes[:0], 5)] == [0, 0, 0]


@pytest.mark.parametrize("samples", [[3], [5, 4, 3, 200, 4], list(range(300)), list(range(0, 300, 7))])
def test_what_is_read_into_a_buffer_is_what_the_file_holds(paged: dict[str, Path], samples: list[int]) -> None:
    file, _ = sample_file(Buffered, paged["shuffled"])
    content = file.beton.read_bytes()
    data = file.begin(np.array(samples))
    stored = data.wait()
    assert len(stored.addresses) == len(set(samples))
    for address, size, offset in zip(stored.addresses, stored.sizes, stored.offsets, strict=True):
        assert stored.content[offset : offset + size].tobytes() == content[int(address) : int(address + size)]
    data.release()
    file.close()


def test_buffers_are_used_again_and_their_number_stays(paged: dict[str, Path]) -> None:
    train = TrainLoader(settings(paged["shuffled"], data_cache="process"), CPU, seed=0)
    spare = train.decoder.source.spare_buffers
    epoch(train)
    num_bytes = [sum(map(len, spare))]
    for number in range(1, 6):
        for step in train.steps(number):  # left early
            next(step)
            break
        epoch(train, number)
        num_bytes.append(sum(map(len, spare)))
    batch = 8 * (train.decoder.source.max_bytes + 32 * 1024) * 1.25
    assert max(num_bytes) < 38 * batch, "one for each of the 37 batches of this small file, which all fit"
    assert num_bytes[-1] <= num_bytes[1] * 1.1


# --- a disk that fails --------------------------------------------------------------------------------------------


def test_a_file_cut_off_while_it_is_read_is_an_error_that_names_it(own_dir: Path) -> None:
    train = TrainLoader(settings(own_dir, data_cache="process"), CPU, seed=0)
    os.truncate(own_dir / "train.beton", train.decoder.source.num_bytes // 2)
    with pytest.raises(
        ReadError, match=r"train\.beton ends at \d+, before the end of a sample: the file was truncated while in use"
    ):
        epoch(train)


def test_a_file_that_cannot_be_read_any_more_is_an_error_with_the_reason(own_dir: Path) -> None:
    train = TrainLoader(settings(own_dir, data_cache="process", bad_samples="skip"), CPU, seed=0)
    expected = epoch(train)
    file = train.decoder.source
    kept = os.dup(file.descriptor)
    unreadable = os.open(own_dir / "train.beton", os.O_WRONLY)
    os.dup2(unreadable, file.descriptor)
    for _ in range(3):
        with pytest.raises(ReadError, match=r"train\.beton: \d+ bytes at \d+ cannot be read: Bad file descriptor"):
            epoch(train)
    os.dup2(kept, file.descriptor)
    assert same(epoch(train), expected), "the loader works again when the file does"
    for descriptor in (kept, unreadable):
        os.close(descriptor)


# --- memory -------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_reported_before_the_start(
    beton_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    little = AvailableMemory(100_000, "on this machine", 0)
    monkeypatch.setattr(loader, "available_memory", lambda: little)
    message = (
        r"data_cache = ram: train\.beton and val\.beton take [\d.]+ .?B of memory, 100\.0 kB are available on this "
        r"machine, 90% of it at most for data; use --data_cache os, with --order quasi_random"
    )
    with pytest.raises(ValueError, match=message) as caught:
        TrainLoader(settings(beton_dir, data_cache="ram"), CPU, seed=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data_cache = ram: val\.beton take"):
        EvalLoader(settings(beton_dir, data_cache="ram"), CPU)
    with caplog.at_level("INFO"):
        TrainLoader(settings(beton_dir), CPU, seed=0)
        TrainLoader(settings(beton_dir, data_cache="process"), CPU, seed=0)
    assert "each epoch reads from the disk; --order quasi_random does so in large pieces" in caplog.text
    assert "are read through buffers in memory; 100.0 kB are available" in caplog.text


def locked_kb() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmLck"))


def test_data_cache_ram_has_the_whole_file_in_memory_before_the_first_batch(
    own_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beton = own_dir / "train.beton"
    size = beton.stat().st_size
    config = settings(own_dir, data_cache="ram")
    ranks = [TrainLoader(config, CPU, seed=0, local_rank=rank, num_local=2) for rank in (0, 1)]
    before = locked_kb()
    evict_or_skip(beton)
    with caplog.at_level("INFO"):
        for train in ranks:
            train.prepare()
    assert num_bytes_in_memory(beton) >= size
    assert f"{beton} is in memory after" in caplog.text
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked_kb() > before:
        assert locked_kb() - before == -(-size // 4096) * 4, "by one of the processes"
    else:
        assert limit < size
        assert "cannot be locked there" in caplog.text
    epoch(ranks[0])
    assert num_bytes_in_memory(beton) >= size
