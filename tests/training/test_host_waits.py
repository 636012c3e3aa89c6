"""Between two log points the host never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.host_waits import HostWaits, fake_cuda, no_waits
from support.runs import config_from, train_here
from torch import Tensor

from ffcv_convnext.augment import Normalisation, TrainAugment
from ffcv_convnext.bench.timing import random_batch
from ffcv_convnext.data.load.device import DeviceTransfer
from ffcv_convnext.files import read_lines
from ffcv_convnext.training import engine
from ffcv_convnext.training import run as run_module
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, Run, train_step
from ffcv_convnext.training.run import build_learner

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LOG_POINTS = ("log_point", "evaluate_candidates", "check_weights", "save", "save_best")
POLICIES = ("rand-m9-mstd0.5-inc1", "none", "3a")
Build = Callable[..., Learner]


def on_device(learner: Learner) -> Learner:
    """Augment on the CPU with the operators of a GPU, which a run compiles there."""
    learner.augment._compiled = learner.augment._batched
    return learner


@pytest.fixture
def build(small_settings: dict[str, Any]) -> Build:
    def built(**changes: Any) -> Learner:
        config = config_from(small_settings, **changes)
        learner = on_device(build_learner(config, Processes(0, 1, 0, CPU), num_classes=4, steps_per_epoch=10))
        learner.model.train()
        return learner

    return built


def take_step(learner: Learner) -> None:
    batch = random_batch(learner.config, learner.config.data.batch_size, CPU, num_classes=4)
    with no_waits(all_on_device=True):
        train_step(learner, iter([batch]))


@pytest.mark.parametrize(
    "changes",
    [
        {"aa": "rand-m9-mstd0.5-inc1", "amp": "bf16"},
        {"clip_grad": 1.0, "color_jitter": 0.4, "resnet_norm_layer": "ln", "resnet_ls_init_values": 1e-6},
        {"opt": "sgd", "mixup_mode": "elem", "remode": "rand"},
        {"opt": "lamb"},
    ],
)
def test_a_step_waits_for_nothing(build: Build, changes: dict[str, Any]) -> None:
    take_step(build(**changes))


@pytest.mark.parametrize(
    "read",
    [
        Tensor.item,
        Tensor.tolist,
        Tensor.cpu,
        Tensor.numpy,
        Tensor.nonzero,
        float,
        int,
        bool,
        lambda loss: loss[loss > 0],
        lambda loss: torch.equal(loss, loss),
        lambda loss: torch.masked_select(loss, loss > 0),
        lambda loss: torch.unique(loss),
        lambda loss: torch.where(loss > 0),
    ],
)
def test_a_loss_that_reads_its_value_would_be_noticed(build: Build, read: Callable[[Tensor], Any]) -> None:
    learner = build()

    class Reading(torch.nn.Module):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            loss = (logits.softmax(-1) - targets).square().mean()
            read(loss.detach())
            return loss

    learner.criterion = Reading()
    with pytest.raises(HostWaits, match="reads a tensor on the device"):
        take_step(learner)


def test_a_run_waits_at_log_points_and_after_epochs_only(
    small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real images, averaged weights and a checkpoint inside the epoch."""
    from ffcv_convnext.data.load import TrainLoader

    plain_fit, plain_steps, visits = engine.fit, TrainLoader.steps, dict.fromkeys(LOG_POINTS, 0)

    def fit(run: Run) -> dict[str, float]:
        on_device(run.learner)
        with no_waits(all_on_device=True) as operators:

            def allowing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
                def allowed(*args: Any) -> Any:
                    visits[name] += 1
                    before, operators.strict = operators.strict, False
                    try:
                        return function(*args)
                    finally:
                        operators.strict = before

                return allowed

            def steps(loader: TrainLoader, epoch: int, first_step: int) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
                operators.strict = False  # decoded images are host memory
                decoded = [list(each) for each in plain_steps(loader, epoch, first_step)]
                operators.strict = True
                yield from map(iter, decoded)

            for name in LOG_POINTS:
                monkeypatch.setattr(engine, name, allowing(name, getattr(engine, name)))
            monkeypatch.setattr(TrainLoader, "steps", steps)
            return plain_fit(run)

    monkeypatch.setattr(run_module, "fit", fit)
    train_here(small_settings, output_dir=tmp_path, epochs=1, warmup_epochs=0, save_ckpt_steps=5)
    assert len(read_lines(tmp_path / "steps.jsonl")) == visits["log_point"] == 3, "after steps 4, 8 and 10"
    assert visits["save"] >= 2


@pytest.mark.parametrize("aa", POLICIES)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_batches_and_draws_reach_the_gpu_by_asynchronous_copies_from_pinned_memory(
    small_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, aa: str
) -> None:
    config = config_from(small_settings, aa=aa, color_jitter=0.4, batch_size=8)
    with fake_cuda(monkeypatch), no_waits() as operators:
        augment = TrainAugment(
            config.augment,
            num_classes=4,
            seed=0,
            device=CUDA,
            normalisation=Normalisation.of(config.data),
            dtype=torch.bfloat16,
        )
        augment._compiled = augment._batched
        transfer = DeviceTransfer(CUDA)
        images = transfer.empty(8, 32, 32, 3, dtype=torch.uint8)
        batch = transfer(images, transfer.empty(8, dtype=torch.int64))
        assert operators.num_copies == 2
        inputs, targets = augment(*batch, step=0, micro_batch=0)
        assert (inputs.device, inputs.dtype, tuple(inputs.shape)) == (CUDA, torch.bfloat16, (8, 3, 32, 32))
        assert (targets.device, tuple(targets.shape)) == (CUDA, (8, 4))
        assert operators.num_copies == 3 + (aa != "none"), "one for the policy, one for the other draws"


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        (lambda host, _: host.to(CUDA), "to the device and waited for"),
        (lambda host, _: host.pin_memory().to(CUDA), "to the device and waited for"),
        (lambda host, _: host.to(CUDA, non_blocking=True), "to the device from pageable memory"),
        (lambda host, gpu: gpu.copy_(host), "to the device and waited for"),
        (lambda host, gpu: gpu.copy_(host, non_blocking=True), "to the device from pageable memory"),
        (lambda _, gpu: gpu.to("cpu", non_blocking=True), "to the host"),
        (lambda host, gpu: host.copy_(gpu), "to the host"),
        (lambda _, gpu: gpu.cpu(), "reads"),
        (lambda _, gpu: gpu.sum().item(), "reads"),
        (lambda _, gpu: bool(gpu.sum() > 0), "reads"),
        (lambda _, gpu: gpu.nonzero(), "reads"),
        (lambda _, gpu: torch.equal(gpu, gpu), "reads"),
    ],
)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_copy_that_waits_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, copy: Callable[[Tensor, Tensor], Any], message: str
) -> None:
    with fake_cuda(monkeypatch), no_waits():
        host, gpu = torch.empty(8), torch.empty(8, device=CUDA)
        with pytest.raises(HostWaits, match=message):
            copy(host, gpu)
