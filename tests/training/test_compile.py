"""A compiled run trains as an eager one does, is compiled once, and can be stopped and continued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nursery import Nursery
from support.runs import config_from, log_without_timings, train_here
from torch import Tensor, nn

from ffcv_convnext.bench.timing import random_batch
from ffcv_convnext.training import engine
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import train_step
from ffcv_convnext.training.run import build_learner, compiled, compiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_auto_compiles_on_a_cuda_device_only(small_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("CXX", "c++")
    config = config_from(small_settings)
    assert config.run.compile == "auto"
    assert [compiles(config, torch.device(name)) for name in ("cpu", "cuda")] == [False, True]
    for choice, answer in (("true", True), ("false", False)):
        chosen = config.replace(compile=choice)
        assert [compiles(chosen, torch.device(name)) for name in ("cpu", "cuda")] == [answer, answer]


@pytest.mark.parametrize(("device", "compiler"), [("cpu", r"g\+\+"), ("cuda", "gcc")])
def test_a_missing_compiler_is_named(
    small_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str, compiler: str
) -> None:
    for variable in ("PATH", "CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=rf"compile = true: torch.compile needs {compiler} or .*--compile false"):
        compiles(config_from(small_settings, compile=True), torch.device(device))


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one_through_a_stop_and_is_compiled_once(
    small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**small_settings, "drop_path": 0, "save_ckpt_steps": 5, "resnet_norm_layer": "ln"}
    train_here(settings, output_dir=tmp_path / "eager")
    plain_step, calls = engine.train_step, 0

    def step(run: engine.Learner, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:  # the checkpoint of step 5 is what remains
            raise KeyboardInterrupt
        with torch.compiler.set_stance("default" if calls in (1, 9) else "fail_on_recompile"):
            plain_step(run, micro_batches)

    monkeypatch.setattr(engine, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        train_here(settings, compile=True, output_dir=tmp_path / "compiled")
    train_here(settings, compile=True, output_dir=tmp_path / "compiled")
    assert calls == 8 + 15, "continued after step 5 of 20"
    eager, ours = (log_without_timings(tmp_path / name) for name in ("eager", "compiled"))
    assert ours[0]["train_loss"] == pytest.approx(eager[0]["train_loss"], abs=1e-4)
    # Later AdamW enlarges rounding: weights changed by 2e-7 move an eager run's losses by 6e-3 in the second epoch.
    assert ours[1]["train_loss"] == pytest.approx(eager[1]["train_loss"], abs=1e-2)


@pytest.mark.slow
def test_two_compiled_processes_equal_one_eager_process(
    small_settings: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    """With two micro-batches each: one that does not reduce, one that does."""
    settings = {**small_settings, "drop_path": 0, "epochs": 1, "recipe_batch": 32, "resnet_norm_layer": "ln"}
    train_here(settings, update_freq=4, output_dir=tmp_path / "one")
    two = {**settings, "compile": True, "update_freq": 2, "output_dir": tmp_path / "two"}
    for status, output in nursery.run_ranks(two, strikes={}):
        assert status == 0, output
    ours, theirs = (log_without_timings(tmp_path / name)[0]["train_loss"] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, abs=1e-4)


class Branching(nn.Module):
    """No graph can hold its forward pass whole."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return y if y.sum().item() > 0 else 2 * y


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where a graph breaks
def test_a_timm_network_may_need_several_graphs(small_settings: dict[str, Any]) -> None:
    network, images = Branching(), torch.randn(2, 4)
    theirs = {key: value for key, value in small_settings.items() if not key.startswith("resnet")}
    model = compiled(network, config_from(theirs, model="test_vit"))
    assert torch.allclose(model(images), network(images))
    torch.compiler.reset()
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        compiled(network, config_from(small_settings))(images)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_never_waits_for_the_gpu(small_settings: dict[str, Any], amp: str) -> None:
    settings = {**small_settings, "device": "cuda", "amp": amp, "aa": "rand-m9-mstd0.5-inc1", "clip_grad": 1.0}
    config, device = config_from(settings), torch.device("cuda", 0)
    learner = build_learner(config, Processes(0, 1, 0, device), num_classes=4, steps_per_epoch=10)
    learner.model.train()
    batch = random_batch(config, config.data.batch_size, device, num_classes=4)
    for _ in range(3):  # compilation waits
        train_step(learner, iter([batch]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(learner, iter([batch]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    learner.tracker.flush()
