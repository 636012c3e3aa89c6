"""The training loop. It reads like the paper's method section; run.py builds its parts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_convnext.augment import Normalisation, TrainAugment
from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.models import batch_norms, fixed_statistics
from ffcv_convnext.rng import Stream, step_seed
from ffcv_convnext.signals import stop_signals
from ffcv_convnext.training.checkpoint import BEST, BEST_EMA, Checkpoints
from ffcv_convnext.training.cuda_graphs import GraphedPasses
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.fused_adamw import FusedAdamW
from ffcv_convnext.training.metrics import Evaluation, LossMean, LossTracker, Throughput, evaluate
from ffcv_convnext.training.optim import restore_optimizer, set_hyperparameters
from ffcv_convnext.training.preflight import TestedClasses
from ffcv_convnext.training.runlog import RunLog
from ffcv_convnext.training.schedule import Schedules

if TYPE_CHECKING:  # needs ffcv, which this file's tests do without
    from ffcv_convnext.data.load import EvalLoader, GlobalBatchSampler, TrainLoader

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images and labels, or inputs and targets
RECOMPUTE_IMAGES = 10_000  # Wu and Johnson 2021, arXiv:2105.07576: BatchNorm's statistics need 1,000 to 10,000


@dataclass(slots=True)
class State:
    """Progress of a run: completed epochs, optimiser steps in total, best top-1 so far (percent)."""

    epoch: int = 0
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Learner:
    """Everything that an optimiser step needs: the parts of a run without its data and its folder."""

    config: Config
    processes: Processes
    network: nn.Module  # the plain network: checkpoints hold its state
    model: nn.Module  # the same, compiled and wrapped for gradient reduction according to the config
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: Schedules
    augment: TrainAugment
    criterion: nn.Module
    tracker: LossTracker
    state: State
    graphs: GraphedPasses | None = None  # forward and backward by replay, or None: as they are called

    def sync_gradients(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return a context for forward and backward in which DDP reduces gradients if `last` is true."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def candidates(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the networks to evaluate with the suffix of their keys in the log: raw and averaged weights."""
        yield "", self.network
        if self.ema is not None and self.config.run.model_ema_eval:
            yield "_ema", self.ema.module


@dataclass(slots=True, kw_only=True)
class Run:
    """A learner with its data and its folder."""

    learner: Learner
    train_loader: TrainLoader
    val_loader: EvalLoader
    checkpoints: Checkpoints
    log: RunLog

    @property
    def sampler(self) -> GlobalBatchSampler:
        """The division of an epoch into global batches and micro-batches."""
        return self.train_loader.sampler

    def content(self) -> dict[str, Any]:
        """Return a checkpoint of tensors, numbers and strings only. Averages running statistics over processes."""
        learner = self.learner
        learner.processes.average_buffers(learner.network)
        if learner.ema is not None:
            learner.processes.average_buffers(learner.ema.module)
        return {
            "model": learner.network.state_dict(),
            "ema": None if learner.ema is None else learner.ema.module.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "scaler": learner.scaler.state_dict(),
            "epoch": learner.state.epoch,
            "step": learner.state.step,
            "best": learner.state.best,
            "epoch_loss": asdict(learner.tracker.epoch),
            "interval_loss": asdict(learner.tracker.interval),
            "global_batch": self.sampler.global_batch,
            "data": self.train_loader.manifest.sha256,
            "config": learner.config.flat(),
            "run": self.log.run_id,
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Load a checkpoint's state. Raises ValueError if it has different training data or another global batch."""
        learner, theirs, ours = self.learner, content["global_batch"], self.sampler
        if content["data"] != self.train_loader.manifest.sha256:
            raise ValueError(
                f"the checkpoint was made with other training data than {learner.config.data.data_path}/train.beton; "
                "continue on the same file, or start from the checkpoint's weights with --finetune"
            )
        if theirs != ours.global_batch:
            raise ValueError(
                f"the checkpoint was made with a global batch of {theirs}, this run has {ours.global_batch} "
                f"(batch_size {ours.batch_size} x update_freq {ours.update_freq} x {ours.world} processes); "
                f"choose update_freq and processes whose product is {theirs / ours.batch_size:g}"
            )
        learner.network.load_state_dict(content["model"])
        if learner.ema is not None:
            learner.ema.module.load_state_dict(content["ema"])
        restore_optimizer(learner.optimizer, content["optimizer"])
        learner.scaler.load_state_dict(content["scaler"])
        learner.tracker.epoch = LossMean(**content["epoch_loss"])
        learner.tracker.interval = LossMean(**content["interval_loss"])
        learner.state = State(content["epoch"], content["step"], dict(content["best"]))


def memory_format(config: Config) -> torch.memory_format:
    """Return the memory format of weights and images; the loader's images are in channels_last."""
    return torch.channels_last if config.run.channels_last else torch.contiguous_format


def input_dtype(config: Config) -> torch.dtype:
    """Return the data type of training images as the network gets them, and of autocast."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[config.run.amp]


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context of a run."""
    return torch.autocast(device.type, dtype=input_dtype(config), enabled=config.run.amp != "off")


def fit(run: Run) -> dict[str, float]:
    """Train from the learner's state to the last epoch; return the last evaluation's scores.

    Raises Interrupted after saving if a signal stops the run, Failure if a loss is not finite.
    """
    learner, loader = run.learner, run.train_loader
    config, state, processes = learner.config.run, learner.state, learner.processes
    num_steps, num_epochs = loader.steps_per_epoch, learner.config.schedule.epochs
    throughput = Throughput()
    scores: dict[str, float] = {}
    with stop_signals() as stop:
        for epoch in range(state.epoch, num_epochs):
            first_step = state.step - epoch * num_steps
            if first_step == 0:
                learner.tracker.epoch = LossMean()
            learner.model.train()
            run.log.start_epoch(epoch, first_step, num_steps)
            epoch_started, waited, logged = time.perf_counter(), loader.wait_s, state.step
            replaced = loader.num_replaced
            throughput.start()
            for micro_batches in loader.steps(epoch, first_step):
                step_started = time.perf_counter()
                train_step(learner, micro_batches)
                state.step += 1
                run.log.advance(time.perf_counter() - step_started)
                if state.step % config.log_every == 0 or state.step == (epoch + 1) * num_steps:
                    images = (state.step - logged) * run.sampler.global_batch
                    logged = state.step
                    log_point(run, epoch, throughput, images)
                stopping = processes.any(stop.requested)
                if stopping or (config.save_ckpt_steps and state.step % config.save_ckpt_steps == 0):
                    save(run)
                if stopping:
                    wait_for_checkpoints(run)
                    raise Interrupted(stop.message(state.step))
            train_s, data_wait_s = time.perf_counter() - epoch_started, loader.wait_s - waited
            num_bad = loader.num_replaced - replaced
            check_weights(run)
            state.epoch = epoch + 1
            scores = evaluate_candidates(run)
            run.log.epoch(
                {
                    "epoch": epoch,
                    "step": state.step,
                    "train_loss": learner.tracker.epoch.value,
                    **scores,
                    "images_per_s": throughput.take(),
                    "data_wait_s": data_wait_s,
                    "train_s": train_s,
                    "epoch_s": time.perf_counter() - epoch_started,
                    "bad_samples": int(processes.sum(torch.tensor(num_bad))),
                    "lr": learner.schedules.lr(state.step - 1),
                    "train_size": (size := learner.config.data.train_size(epoch)),
                    "micro_batch": learner.config.data.batch_size * learner.config.data.num_joined(size),
                    "n_parameters": sum(p.numel() for p in learner.network.parameters()),
                }
            )
            save_best(run, scores)
            finished = state.epoch == num_epochs
            stopping = processes.any(stop.requested)
            if finished or stopping or state.epoch % config.save_ckpt_freq == 0:
                save(run)
            if finished or stopping:
                wait_for_checkpoints(run)
            if stopping and not finished:
                raise Interrupted(stop.message(state.step))
    return scores or evaluate_candidates(run)  # no scores if the run ended between its last checkpoint and `done`


def train_step(learner: Learner, micro_batches: Iterable[Batch]) -> None:
    """Take one optimiser step on this process's micro-batches; the host does not wait for the device.

    With res_batch, forward and backward join as many of them as the epoch's image size allows.
    """
    config, processes, step = learner.config, learner.processes, learner.state.step
    num_joined = config.data.num_joined(config.data.train_size(learner.state.epoch))
    lr, weight_decay = learner.schedules.lr(step), learner.schedules.weight_decay(step)
    set_hyperparameters(learner.optimizer, lr=lr, weight_decay=weight_decay)
    inputs, first = augmented(learner, micro_batches, step), 0
    while parts := list(islice(inputs, num_joined)):
        micro_batch, first = processes.rank + first * processes.world, first + len(parts)
        loss = _backward(learner, parts, step, micro_batch, last=first == config.data.update_freq)
        learner.tracker.add(loss, step + 1)  # the log counts steps from 1
    if config.optim.clip_grad is not None:
        learner.scaler.unscale_(learner.optimizer)
        nn.utils.clip_grad_norm_(learner.network.parameters(), config.optim.clip_grad)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.ema is not None and not isinstance(learner.optimizer, FusedAdamW):  # its step has updated them
        learner.ema.update(learner.network)  # from the initial weights on: with step=, timm copies the first two


def augmented(learner: Learner, micro_batches: Iterable[Batch], step: int) -> Iterator[Batch]:
    """Yield inputs and targets of this process's micro-batches of a step, each augmented by its own draws."""
    processes = learner.processes
    for i, (images, labels) in enumerate(micro_batches):
        micro_batch = processes.rank + i * processes.world  # its number in the global batch
        yield learner.augment(images, labels, step=step, micro_batch=micro_batch)


def join(parts: list[Batch]) -> Batch:
    """Return augmented micro-batches as one. Empties the list, so that no memory is held twice."""
    if len(parts) == 1:
        return parts.pop()
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    parts.clear()
    return inputs, targets


def _backward(learner: Learner, parts: list[Batch], step: int, micro_batch: int, *, last: bool) -> Tensor:
    """Add the gradients of augmented micro-batches, joined; return their mean loss. Empties the list.

    micro_batch: number of the first one, which seeds the network's random numbers.   last: as for `backward`.
    """
    num_joined = len(parts)
    inputs, targets = join(parts)
    seed = step_seed(learner.config.run.seed, step, micro_batch, Stream.NETWORK)
    if learner.graphs is not None:  # with update_freq 1: nothing is joined
        return learner.graphs(inputs, targets, seed=seed)
    torch.manual_seed(seed)
    return backward(learner, inputs, targets, num_joined=num_joined, last=last)


def backward(learner: Learner, inputs: Tensor, targets: Tensor, *, num_joined: int = 1, last: bool = True) -> Tensor:
    """Add the gradients of an augmented micro-batch to those of the parameters; return its detached loss.

    inputs: (N, 3, H, W).   targets: (N, K) float32.   num_joined: how many of the step's update_freq micro-batches
    they are.   last: of the optimiser step: DDP reduces the gradients.
    """
    config = learner.config
    with learner.sync_gradients(last=last):
        with autocast(config, learner.processes.device):
            logits = learner.model(inputs.contiguous(memory_format=memory_format(config)))
            loss: Tensor = learner.criterion(logits, targets)
        scaled: Tensor = learner.scaler.scale(loss / (config.data.update_freq / num_joined))
        with fixed_statistics(learner.network) if config.model.grad_checkpointing else nullcontext():
            scaled.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def compile_sizes(learner: Learner) -> None:
    """Compile network and augmentation for every image size that the rest of the run has, before it begins.

    So an image size that does not fit into memory fails now and not in epoch 40. Weights, running statistics, optimiser
    and draws stay as they are.
    """
    started = time.perf_counter()
    config, device = learner.config, learner.processes.device
    epochs = range(learner.state.epoch, config.schedule.epochs)
    sizes = sorted({config.data.train_size(epoch) for epoch in epochs})
    before = [buffer.clone() for buffer in learner.network.buffers()]
    learner.model.train()
    for number, size in enumerate(sizes, 1):
        num, num_joined = config.data.batch_size, config.data.num_joined(size)
        several = f", {num_joined * num} at a time" if config.data.res_batch else ""
        log.info("compiling for images of %d pixels%s (%d of %d)", size, several, number, len(sizes))
        images = torch.zeros(num, size, size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        labels = torch.zeros(num, dtype=torch.int64, device=device)
        parts = list(augmented(learner, [(images, labels)] * num_joined, learner.state.step))
        _backward(learner, parts, learner.state.step, 0, last=False)
    learner.optimizer.zero_grad(set_to_none=True)
    for buffer, value in zip(learner.network.buffers(), before, strict=True):
        buffer.copy_(value)
    log.info("compiled in %.1f s", time.perf_counter() - started)


def log_point(run: Run, epoch: int, throughput: Throughput, images: int) -> None:
    """Fetch the losses since the last log point (the host waits here), check and log them."""
    flush_losses(run)
    run.checkpoints.check()
    tracker, schedules, step = run.learner.tracker, run.learner.schedules, run.learner.state.step
    loss, tracker.interval = tracker.interval.value, LossMean()
    run.log.train(
        {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "lr": schedules.lr(step - 1),
            "weight_decay": schedules.weight_decay(step - 1),
            "images_per_s": throughput.interval(images),
        },
        run.train_loader.steps_per_epoch,
    )


def flush_losses(run: Run) -> None:
    """Fetch the losses. Raises Failure, with advice, if one is not finite."""
    try:
        run.learner.tracker.flush()
    except Failure as error:
        raise Failure(
            f"{error}; {run.checkpoints.folder} keeps its last good checkpoint. Lower lr, clip the gradient "
            "(clip_grad) or use amp bf16 instead of fp16"
        ) from None


def evaluate_network(
    network: nn.Module, loader: EvalLoader, config: Config, processes: Processes, classes: TestedClasses | None = None
) -> dict[str, Evaluation]:
    """Evaluate a network with the config's precision, tta and eval_csv; with dist_eval the processes share the work.

    classes: of an evaluation set that need not have all classes.   Returns as `metrics.evaluate` does.
    """
    return evaluate(
        network,
        loader,
        processes if config.run.dist_eval else replace(processes, rank=0, world=1),
        lambda: autocast(config, processes.device),
        Normalisation.of(config.data),
        memory_format(config),
        columns=None if classes is None else classes.columns,
        flip=config.run.tta == "flip",
        predictions=config.run.eval_csv is not None,
    )


def evaluate_candidates(run: Run) -> dict[str, float]:
    """Return the scores of the raw and of the averaged weights, these with the suffix _ema."""
    learner = run.learner
    scores: dict[str, float] = {}
    if learner.ema is not None and learner.config.run.model_ema_bn == "recompute":
        recompute_statistics(run, learner.ema.module)
    for suffix, network in learner.candidates():
        learner.processes.average_buffers(network)
        scores |= evaluate_network(network, run.val_loader, learner.config, learner.processes)[""].scores(suffix)
    return scores


def recompute_statistics(run: Run, network: nn.Module) -> None:
    """Set BatchNorm's running statistics to their mean over micro-batches of the epoch that has just ended.

    Takes the epoch's first optimiser steps, as many as have 10,000 images or all, with the crops and draws that they
    had in training, but without stochastic depth; each process its share of the micro-batches. Leaves the network in
    evaluation mode.
    """
    learner, loader = run.learner, run.train_loader
    config, processes, epoch = learner.config, learner.processes, learner.state.epoch - 1
    norms = batch_norms(network.eval())
    num_joined = config.data.num_joined(config.data.train_size(epoch))
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
    num_steps, number = math.ceil(RECOMPUTE_IMAGES / run.sampler.global_batch), 0
    with torch.no_grad(), closing(loader.steps(epoch)) as steps:
        for step, micro_batches in enumerate(islice(steps, num_steps), epoch * loader.steps_per_epoch):
            several = augmented(learner, micro_batches, step)
            while parts := list(islice(several, num_joined)):
                number += 1
                for norm in norms:
                    norm.momentum = 1 / number  # makes the running statistics the mean of all so far
                inputs, _ = join(parts)
                with autocast(config, processes.device):
                    network(inputs.contiguous(memory_format=memory_format(config)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def check_weights(run: Run) -> None:
    """Raise Failure if a weight is not finite, so that it is neither evaluated nor saved. The host waits here."""
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(run.learner.network.parameters()))])
    if not torch.isfinite(norms).all():
        raise Failure(
            f"the weights are not finite after optimiser step {run.learner.state.step}; {run.checkpoints.folder} "
            "keeps its last good checkpoint. Lower lr or clip the gradient (clip_grad)"
        )


def save(run: Run) -> None:
    """Save the current state as the newest checkpoint: rank 0 copies it, and a thread of rank 0 writes the copy.

    Raises Failure instead of saving weights that are not finite, or if the checkpoint before could not be written.
    """
    flush_losses(run)
    check_weights(run)
    content = run.content()
    if run.learner.processes.is_main:
        run.log.flush()  # so that the trackers hold everything before the checkpoint
        run.checkpoints.save(content)


def wait_for_checkpoints(run: Run) -> None:
    """Wait, on every process, until rank 0 has its checkpoints on disk. Raises Failure if one could not be written."""
    run.checkpoints.wait()
    run.learner.processes.barrier()


def save_best(run: Run, scores: dict[str, float]) -> None:
    """Keep the weights of the best epoch by validation top-1, raw and averaged separately."""
    learner = run.learner
    for key, name, part, network in (
        ("test_acc1", BEST, "model", learner.network),
        ("test_acc1_ema", BEST_EMA, "ema", None if learner.ema is None else learner.ema.module),
    ):
        if key in scores and network is not None and scores[key] > learner.state.best.get(key, -1.0):
            learner.state.best[key] = scores[key]
            if learner.processes.is_main:
                content = {part: network.state_dict(), "epoch": learner.state.epoch, "step": learner.state.step}
                run.checkpoints.save_best(name, {**content, **scores, "config": learner.config.flat()})
