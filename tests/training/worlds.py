"""Train a few steps on 1, 2 and 4 gloo processes: `python worlds.py float32|float64 FOLDER`, for test_worlds.py.

All see the same micro-batches of the same global batches. The processes are forks of one that has imported torch. The
weights go to FOLDER/WORLD.pth, those of a run that continues in a new learner after 7 steps to FOLDER/WORLD-again.pth.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import torch

from ffcv_convnext.config import Config
from ffcv_convnext.training import run
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, train_step
from ffcv_convnext.training.optim import restore_optimizer

STEPS, MICRO_BATCHES, SIZE = 20, 4, 32
SETTINGS = {
    **{"device": "cpu", "amp": "off", "batch_size": 4, "recipe_batch": 16, "input_size": SIZE, "nb_classes": 4},
    **{"resnet_layers": "1-1-1-1", "resnet_embed_dim": 8, "resnet_stem": "patch_embed", "resnet_act_layer": "gelu"},
    **{
        "resnet_norm_layer": "ln",
        "epochs": 2,
        "warmup_epochs": 0,
        "lr": 2e-3,
        "drop_path": 0.2,
        "aa": "none",
        "data_path": "none",
    },
    **{"mixup": 0.0, "cutmix": 0.0, "reprob": 0.0},  # their draws are float32
}


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (STEPS, MICRO_BATCHES, 4, 3, SIZE, SIZE) uint8 and labels (STEPS, MICRO_BATCHES, 4)."""
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS, MICRO_BATCHES, 4)
    images = torch.randint(0, 256, (*shape, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 4, shape, generator=generator)


def train(world: int, rank: int, again: bool, path: Path) -> None:
    """Train as one process of `world`; rank 0 saves the weights."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    processes = Processes.from_environment("cpu")
    processes.join()
    config = Config.from_flat({**SETTINGS, "update_freq": MICRO_BATCHES // world})

    def build() -> Learner:
        return run.build_learner(config, processes, num_classes=4, steps_per_epoch=STEPS // 2)

    learner, (images, labels) = build(), batches()
    for step in range(STEPS):
        if again and step == 7:
            before, learner = learner, build()
            learner.network.load_state_dict(before.network.state_dict())
            restore_optimizer(learner.optimizer, before.optimizer.state_dict())
            learner.state.step = step
        learner.model.train()
        shares = range(rank, MICRO_BATCHES, world)
        train_step(learner, ((images[step, m], labels[step, m]) for m in shares))
        learner.state.step += 1
    if rank == 0:
        torch.save(learner.network.state_dict(), path)
    processes.leave()


def fork(world: int, again: bool, path: Path) -> None:
    """Run `train` in `world` processes and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    children = []
    for rank in range(world):
        if pid := os.fork():
            children.append(pid)
            continue
        try:
            train(world, rank, again, path)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    assert not any(statuses)


if __name__ == "__main__":
    dtype, folder = getattr(torch, sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    run.input_dtype = lambda _config: dtype
    for world in (1, 2, 4):
        fork(world, False, folder / f"{world}.pth")
        fork(world, True, folder / f"{world}-again.pth")
