"""CUDA graphs as far as a CPU can tell: when they are refused, and a run whose passes are replayed by a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import config_from
from torch import Tensor, nn

from ffcv_convnext.bench.timing import random_batch
from ffcv_convnext.training.cuda_graphs import WARMUP, GraphedPasses, uses_cuda_graphs
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, backward, train_step
from ffcv_convnext.training.run import build_learner, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Replays:
    """Record as CudaRecord does: a replay computes in the memory that the recording has used, and draws anew."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.num_recorded = self.num_replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.num_recorded += 1
        for _ in range(WARMUP):
            function()
        loss = function()  # a CUDA graph only records here
        static = [p.grad for p in self.network.parameters()]

        def replay() -> None:
            self.num_replayed += 1
            loss.copy_(function())
            for own, p in zip(static, self.network.parameters(), strict=True):
                if own is not None:
                    own.copy_(p.grad)  # type: ignore[arg-type]

        return replay, loss


def learn(settings: dict[str, Any], sizes: list[int], *, graphs: bool) -> tuple[Learner, list[Tensor], Replays]:
    config = config_from(settings, opt="adamw", drop_path=0.4, model_ema=True, update_freq=1, clip_grad=1.0)
    learner = build_learner(config, Processes(0, 1, 0, CPU), num_classes=4, steps_per_epoch=10)
    learner.model.train()
    record = Replays(learner.network)
    if graphs:
        learner.graphs = GraphedPasses(learner.network, partial(backward, learner), record)
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        images, labels = random_batch(config, config.data.batch_size, CPU, num_classes=4)
        train_step(learner, iter([(images[..., :size, :size], labels)]))
        learner.state.step += 1
    return learner, [loss for _, loss in learner.tracker._waiting], record


def test_replayed_passes_give_the_same_run(small_settings: dict[str, Any]) -> None:
    side = config_from(small_settings).data.input_size
    sizes = [side - 8, side - 8, side, side - 8, side]
    eager, losses, _ = learn(small_settings, sizes, graphs=False)
    graphed, replayed, record = learn(small_settings, sizes, graphs=True)
    assert (record.num_recorded, record.num_replayed) == (2, 5)  # a recording for each size
    assert len(set(map(float, losses))) == 5
    assert torch.equal(torch.stack(losses), torch.stack(replayed))
    for ours, theirs in ((graphed.network, eager.network), (graphed.ema, eager.ema)):
        assert ours is not None
        assert theirs is not None
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_another_seed_draws_other_numbers_from_the_same_recording() -> None:
    network = nn.Linear(4, 2)

    def function(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(network(nn.functional.dropout(inputs)), targets)
        loss.backward()
        return loss.detach()

    record = Replays(network)
    passes = GraphedPasses(network, function, record)
    x, y = torch.randn(64, 4), torch.randn(64, 2)
    first, other, again = (passes(x, y, seed=seed) for seed in (1, 2, 1))
    assert first == again != other
    assert record.num_recorded == 1


@pytest.mark.parametrize(
    ("changes", "world", "device", "reason"),
    [
        ({}, 1, CPU, "needs a CUDA device"),
        ({}, 2, CUDA, "needs one process, not 2"),
        ({"update_freq": 4}, 1, CUDA, "needs update_freq = 1, not 4"),
        ({"amp": "fp16"}, 1, CUDA, "does not support amp = fp16"),
        ({"grad_checkpointing": True}, 1, CUDA, "does not support grad_checkpointing"),
    ],
)
def test_true_says_why_it_is_impossible(
    small_settings: dict[str, Any], changes: dict[str, Any], world: int, device: torch.device, reason: str
) -> None:
    settings = {**small_settings, "update_freq": 1, **changes}
    processes = Processes(0, world, 0, device)
    with pytest.raises(ValueError, match=f"cuda_graphs = true {reason}.*; or use --cuda_graphs false"):
        uses_cuda_graphs(config_from(settings, cuda_graphs="true"), processes)
    assert not uses_cuda_graphs(config_from(settings, cuda_graphs="false"), processes)


def test_auto_is_off_and_true_is_on_where_it_is_possible(small_settings: dict[str, Any]) -> None:
    settings, processes = {**small_settings, "update_freq": 1, "amp": "bf16"}, Processes(0, 1, 0, CUDA)
    assert uses_cuda_graphs(config_from(settings, cuda_graphs="true"), processes)
    assert not uses_cuda_graphs(config_from(settings), processes)


def test_a_run_is_refused_before_its_folder_is_made(small_settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="cuda_graphs = true needs a CUDA device"):
        train(config_from(small_settings, output_dir=str(folder), device="cpu", cuda_graphs="true"))
    assert not folder.exists()


@pytest.mark.gpu
def test_a_recorded_run_equals_an_eager_one_on_a_gpu(small_settings: dict[str, Any]) -> None:
    results = []
    for word in ("false", "true"):
        config = config_from(
            small_settings, opt="adamw", drop_path=0.4, update_freq=1, amp="bf16", device="cuda", cuda_graphs=word
        )
        learner = build_learner(config, Processes(0, 1, 0, CUDA), num_classes=4, steps_per_epoch=10)
        learner.model.train()
        for step in range(4):
            torch.manual_seed(step)
            train_step(learner, iter([random_batch(config, config.data.batch_size, CUDA, num_classes=4)]))
            learner.state.step += 1
        results.append(torch.stack([loss for _, loss in learner.tracker._waiting]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
