"""The training loop. It reads like the paper's method section; what it is made of is built in run.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_convnext.augment import TrainAugment
from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.rng import Stream, step_seed
from ffcv_convnext.signals import stop_signals
from ffcv_convnext.training.checkpoint import BEST, BEST_EMA, Checkpoints
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.metrics import LossMean, LossTracker, Throughput, evaluate
from ffcv_convnext.training.optim import restore_optimizer, set_hyperparameters
from ffcv_convnext.training.runlog import RunLog
from ffcv_convnext.training.schedule import Schedules

if TYPE_CHECKING:  # at run time it needs ffcv, which the tests of this file do without
    from ffcv_convnext.data.load import EvalLoader, TrainLoader


@dataclass(slots=True)
class State:
    """Where a run stands: epochs completed, optimiser steps taken in all, and the best top-1 so far (percent)."""

    epoch: int = 0
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Learner:
    """What takes an optimiser step: all parts of a run but its data and its folder."""

    config: Config
    processes: Processes
    network: nn.Module  # the plain network: its state is what checkpoints hold
    model: nn.Module  # the same, compiled and wrapped for gradient reduction as the config says
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: Schedules
    augment: TrainAugment
    criterion: nn.Module
    tracker: LossTracker
    state: State

    def autocast(self) -> torch.autocast:
        return autocast(self.config, self.processes.device)

    @property
    def memory_format(self) -> torch.memory_format:
        return memory_format(self.config)

    def sync_gradients(self, *, last: bool) -> AbstractContextManager[Any]:
        """DDP reduces gradients on a step's last micro-batch only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()


@dataclass(slots=True, kw_only=True)
class Run(Learner):
    """The parts of a run."""

    train_loader: TrainLoader
    val_loader: EvalLoader
    checkpoints: Checkpoints
    log: RunLog

    def candidates(self) -> Iterator[tuple[str, nn.Module]]:
        """The networks to evaluate, by the ending of their keys in the log: raw and averaged weights."""
        yield "", self.network
        if self.ema is not None and self.config.run.model_ema_eval:
            yield "_ema", self.ema.module

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors, numbers and words only. Averages running statistics over processes."""
        self.processes.average_buffers(self.network)
        if self.ema is not None:
            self.processes.average_buffers(self.ema.module)
        return {
            "model": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.state.epoch,
            "step": self.state.step,
            "best": self.state.best,
            "epoch_loss": asdict(self.tracker.epoch),
            "interval_loss": asdict(self.tracker.interval),
            "global_batch": self.train_loader.sampler.global_batch,
            "data": self.train_loader.manifest.sha256,
            "config": self.config.flat(),
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Take over a checkpoint's state. Raises ValueError when its training data or global batch is another one."""
        theirs, shares = content["global_batch"], self.train_loader.sampler
        if content["data"] != self.train_loader.manifest.sha256:
            raise ValueError(
                f"the checkpoint was made on other training data than {self.config.data.data_path}/train.beton; "
                "continue on the same file, or start from the checkpoint's weights with --finetune"
            )
        if theirs != shares.global_batch:
            raise ValueError(
                f"the checkpoint was made with a global batch of {theirs}, this run has {shares.global_batch} "
                f"(batch_size {shares.batch_size} x update_freq {shares.update_freq} x {shares.world} processes); "
                f"choose update_freq and processes whose product is {theirs / shares.batch_size:g}"
            )
        self.network.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        restore_optimizer(self.optimizer, content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.tracker.epoch = LossMean(**content["epoch_loss"])
        self.tracker.interval = LossMean(**content["interval_loss"])
        self.state = State(content["epoch"], content["step"], dict(content["best"]))


def memory_format(config: Config) -> torch.memory_format:
    """Of weights and images; images come out of the loader in channels_last."""
    return torch.channels_last if config.run.channels_last else torch.contiguous_format


def input_dtype(config: Config) -> torch.dtype:
    """Of images as the network gets them in training, and of what autocast computes in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[config.run.amp]


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=input_dtype(config), enabled=config.run.amp != "off")


def fit(run: Run) -> dict[str, float]:
    """Train to the last epoch, from wherever run.state stands; returns the last evaluation's scores.

    Raises Interrupted after saving when a signal asks to stop, Failure when a loss is not finite.
    """
    config, state = run.config.run, run.state
    num_steps = run.train_loader.steps_per_epoch
    throughput = Throughput()
    scores: dict[str, float] = {}
    with stop_signals() as stop:
        for epoch in range(state.epoch, run.config.schedule.epochs):
            first_step = state.step - epoch * num_steps
            if first_step == 0:
                run.tracker.epoch = LossMean()
            run.model.train()
            run.log.start_epoch(epoch, first_step, num_steps)
            epoch_started, waited, logged = time.perf_counter(), run.train_loader.wait_s, state.step
            replaced = run.train_loader.num_replaced
            throughput.start()
            for micro_batches in run.train_loader.steps(epoch, first_step):
                train_step(run, micro_batches)
                state.step += 1
                run.log.advance()
                if state.step % config.log_every == 0 or state.step == (epoch + 1) * num_steps:
                    images = (state.step - logged) * run.train_loader.sampler.global_batch
                    logged = state.step
                    log_point(run, epoch, throughput, images)
                stopping = run.processes.any(stop.requested)
                if stopping or (config.save_ckpt_steps and state.step % config.save_ckpt_steps == 0):
                    save(run)
                if stopping:
                    raise Interrupted(stop.message(state.step))
            train_s = time.perf_counter() - epoch_started
            check_weights(run)
            state.epoch = epoch + 1
            scores = evaluate_candidates(run)
            run.log.epoch(
                {
                    "epoch": epoch,
                    "step": state.step,
                    "train_loss": run.tracker.epoch.value,
                    **scores,
                    "images_per_s": throughput.take(),
                    "data_wait_s": run.train_loader.wait_s - waited,
                    "train_s": train_s,
                    "epoch_s": time.perf_counter() - epoch_started,
                    "bad_samples": int(run.processes.sum(torch.tensor(run.train_loader.num_replaced - replaced))),
                    "lr": run.schedules.lr(state.step - 1),
                    "n_parameters": sum(p.numel() for p in run.network.parameters()),
                }
            )
            save_best(run, scores)
            finished = state.epoch == run.config.schedule.epochs
            stopping = run.processes.any(stop.requested)
            if finished or stopping or state.epoch % config.save_ckpt_freq == 0:
                save(run)
            if stopping and not finished:
                raise Interrupted(stop.message(state.step))
    return scores or evaluate_candidates(run)  # none when the run was ended between its last checkpoint and `done`


def train_step(run: Learner, micro_batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """One optimiser step on this process's micro-batches; the host does not wait for the device."""
    step, num = run.state.step, run.config.data.update_freq
    lr, weight_decay = run.schedules.lr(step), run.schedules.weight_decay(step)
    set_hyperparameters(run.optimizer, lr=lr, weight_decay=weight_decay)
    for i, (images, labels) in enumerate(micro_batches):
        micro_batch = run.processes.rank + i * run.processes.world  # its number in the global batch
        inputs, targets = run.augment(images, labels, step=step, micro_batch=micro_batch)
        torch.manual_seed(step_seed(run.config.run.seed, step, micro_batch, Stream.NETWORK))
        with run.sync_gradients(last=i == num - 1):
            with run.autocast():
                loss = run.criterion(run.model(inputs.contiguous(memory_format=run.memory_format)), targets)
            run.scaler.scale(loss / num).backward()
        run.tracker.add(loss.detach(), step + 1)  # the log's number: the first step is 1
    if run.config.optim.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.network.parameters(), run.config.optim.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(run.network, step=step)


def log_point(run: Run, epoch: int, throughput: Throughput, images: int) -> None:
    """Fetch the losses since the last log point (the host waits here), check and log them."""
    flush_losses(run)
    step = run.state.step
    loss, run.tracker.interval = run.tracker.interval.value, LossMean()
    run.log.train(
        {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "lr": run.schedules.lr(step - 1),
            "weight_decay": run.schedules.weight_decay(step - 1),
            "images_per_s": throughput.interval(images),
        },
        run.train_loader.steps_per_epoch,
    )


def flush_losses(run: Run) -> None:
    try:
        run.tracker.flush()
    except Failure as error:
        raise Failure(
            f"{error}; {run.checkpoints.folder} keeps its last good checkpoint. Lower lr, clip the gradient "
            "(clip_grad) or use amp bf16 instead of fp16"
        ) from None


def evaluate_candidates(run: Run) -> dict[str, float]:
    """Scores of the raw and of the averaged weights: test_acc1, test_acc5, test_loss, and the same with _ema."""
    alone = Processes(0, 1, run.processes.local_rank, run.processes.device)
    processes = run.processes if run.config.run.dist_eval else alone
    scores: dict[str, float] = {}
    for ending, network in run.candidates():
        run.processes.average_buffers(network)
        result = evaluate(network, run.val_loader, processes, run.autocast, run.memory_format)
        scores |= {f"test_{key}{ending}": result[key] for key in ("acc1", "acc5", "loss")}
    return scores


def check_weights(run: Run) -> None:
    """Raises Failure when a weight is not finite, so that it is neither evaluated nor saved. The host waits here."""
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(run.network.parameters()))])
    if not torch.isfinite(norms).all():
        raise Failure(
            f"the weights are not finite after optimiser step {run.state.step}; {run.checkpoints.folder} keeps its "
            "last good checkpoint. Lower lr or clip the gradient (clip_grad)"
        )


def save(run: Run) -> None:
    """Make the present state the newest checkpoint: rank 0 writes, the others wait.

    Raises Failure rather than save weights that are not finite.
    """
    flush_losses(run)
    check_weights(run)
    content = run.content()
    if run.processes.is_main:
        run.log.flush()  # so that the trackers hold all that comes before the checkpoint
        run.checkpoints.save(content)
    run.processes.barrier()


def save_best(run: Run, scores: dict[str, float]) -> None:
    """Keep the weights of the best epoch by validation top-1, raw and averaged apart."""
    for key, name, part, network in (
        ("test_acc1", BEST, "model", run.network),
        ("test_acc1_ema", BEST_EMA, "ema", None if run.ema is None else run.ema.module),
    ):
        if key in scores and network is not None and scores[key] > run.state.best.get(key, -1.0):
            run.state.best[key] = scores[key]
            if run.processes.is_main:
                content = {part: network.state_dict(), "epoch": run.state.epoch, "step": run.state.step, **scores}
                run.checkpoints.save_best(name, {**content, "config": run.config.flat()})
