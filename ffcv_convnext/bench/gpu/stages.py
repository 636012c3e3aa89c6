"""The stages of `bench gpu`: generators of figures. Each runs in a separate process: `python -m ... NAME DEVICE OUT`.

On a GPU they have the recipe's shapes: ConvNeXt-T, 128 images of 224 pixels, bf16. On a CPU they have small ones, so
that all of the code is tried before a GPU is at hand.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ffcv_convnext.augment import Normalisation, TrainAugment
from ffcv_convnext.bench.gpu.runner import RESULT, RN_CONFIGS
from ffcv_convnext.bench.profile import ceilings, profile_step
from ffcv_convnext.bench.timing import Batch, random_batch, synchronizer
from ffcv_convnext.bench.train_step import device_facts, ladder_contestants
from ffcv_convnext.config import Config, load_config
from ffcv_convnext.host import available_cores, available_memory
from ffcv_convnext.training.cuda_graphs import GraphedPasses
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, backward, input_dtype, train_step
from ffcv_convnext.training.kernel_choice import KernelChoice
from ffcv_convnext.training.run import build_learner

Figures = Iterator[dict[str, Any]]
NUM_CLASSES = 1000
TINY = {"resnet_layers": "1,1,1,1", "resnet_embed_dim": 16}
SMALL = {**TINY, "batch_size": 4, "input_size": 64, "aa": "rand-m9-n1-mstd0.5"}  # on a CPU
TORCH = KernelChoice(augment=False, network=False, optimizer=False)
NUM_ROUNDS = 5
FIRST_STEP_S = 90.0  # goal for the first step, which compiles
SHAPES = ((56, 96), (28, 192), (14, 384), (7, 768))  # side and channels of ConvNeXt-T's blocks at 224 pixels


class Stage:
    """What the stages share: the device and shapes."""

    def __init__(self, device: str, out: Path) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.on_gpu = device == "cuda"
        self.out = out
        self.wait = synchronizer(self.device)

    def config(self, **changes: Any) -> Config:
        """Return the recipe's ConvNeXt-T, small on a CPU."""
        flat = {
            "device": self.device.type,
            "batch_size": 128,
            "update_freq": 1,
            "recipe_batch": 128,
            "compile": "false",
        }
        overrides = {**flat, **({} if self.on_gpu else SMALL), **changes}
        return load_config(RN_CONFIGS / "convnext_tiny.yaml", overrides=overrides)

    def learner(self, config: Config, kernels: KernelChoice = TORCH) -> Learner:
        """Return a new learner in training mode, with PyTorch's operations unless `kernels` says otherwise."""
        processes = Processes(0, 1, 0, self.device)
        learner = build_learner(config, processes, num_classes=NUM_CLASSES, steps_per_epoch=1000, kernels=kernels)
        learner.model.train()
        return learner

    def batch(self, config: Config) -> Batch:
        """Return random crops and labels on the device."""
        return random_batch(config, config.data.batch_size, self.device, num_classes=NUM_CLASSES)

    def ms(self, call: Callable[[], object], num: int = 10, warm: int = 3) -> float:
        """Return the mean time of a call in milliseconds."""
        for _ in range(warm):
            call()
        self.wait()
        started = time.perf_counter()
        for _ in range(num):
            call()
        self.wait()
        return 1000 * (time.perf_counter() - started) / num

    def rounds_ms(self, call: Callable[[], object], num: int) -> list[float]:
        """Return the mean time of a call in each of several rounds, milliseconds: their range is the spread."""
        return [self.ms(call, num, warm=3 if i == 0 else 0) for i in range(NUM_ROUNDS)]

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the time of one call in seconds, e.g. of a first one, which compiles."""
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def peak_gb(self) -> float | None:
        """Return the maximum of allocated device memory so far; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else None


def facts(stage: Stage) -> Figures:
    """Name the machine and measure its limits."""
    yield {
        "python": platform.python_version(),
        "cores": available_cores(),
        "memory_gb": available_memory().num_bytes / 1e9,
        **device_facts(stage.device),
    }
    limits = ceilings(stage.device, torch.bfloat16 if stage.on_gpu else torch.float32)
    yield {"tflops": limits["flops_per_s"] / 1e12, "copy_gb_per_s": limits["bytes_per_s"] / 1e9}
    if stage.on_gpu:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        ms = stage.ms(lambda: host.to(stage.device, non_blocking=True))
        yield {"to_device_gb_per_s": host.numel() / ms / 1e6}


def eager(stage: Stage) -> Figures:
    """Take steps without a compiler, and check that a step never waits for the device."""
    config = stage.config(aa="none")
    learner, batch = stage.learner(config), stage.batch(config)

    def step() -> None:
        train_step(learner, iter([batch]))

    yield {"first_s": stage.seconds(step)}
    learner.tracker.flush()
    yield {"loss": learner.tracker.interval.value}
    step()
    if stage.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            yield {"waits": " ".join(str(error).split())[:300]}
        else:
            yield {"waits": "never"}
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ms = stage.ms(step, 5)
    yield {"ms": ms, "images_per_s": 1000 * config.data.batch_size / ms, "peak_gb": stage.peak_gb()}


def augment(stage: Stage, triton: bool = False) -> Figures:
    """Compile the recipe's augmentation, compare it with a CPU's, and time it."""
    config = stage.config()
    images, labels = stage.batch(config)

    def make(device: torch.device, compile: bool, **kernels: Any) -> TrainAugment:
        return TrainAugment(
            config.augment,
            num_classes=NUM_CLASSES,
            seed=0,
            device=device,
            normalisation=Normalisation.of(config.data),
            interpolation=config.data.train_interpolation,
            compile=compile,
            **kernels,
        )

    fast = make(stage.device, False, kernels=True) if triton else make(stage.device, True)
    exact = make(torch.device("cpu"), False)
    yield {"first_s": stage.seconds(lambda: fast(images, labels, step=0, micro_batch=0))}
    level = 1 / (255 * min(config.data.std))
    for step in range(3):
        found, targets = fast(images, labels, step=step, micro_batch=0)
        expected, expected_targets = exact(images.cpu(), labels.cpu(), step=step, micro_batch=0)
        difference = (found.float().cpu() - expected).abs()
        yield {
            "step": step,
            "max_levels": (difference.max() / level).item(),
            "share_above_1": (difference > 1.01 * level).float().mean().item(),
            "targets": (targets.cpu() - expected_targets).abs().max().item(),
        }
    steps = iter(range(1, 10**9))
    side, num = config.data.input_size, len(images)
    draw_ms = 1000 * stage.seconds(lambda: fast.draw(num, side, side, step=0, micro_batch=0))
    rounds = stage.rounds_ms(lambda: fast(images, labels, step=next(steps), micro_batch=0), 8 if stage.on_gpu else 1)
    yield {"ms": median(rounds), "draw_ms": draw_ms, "peak_gb": stage.peak_gb(), "rounds_ms": rounds}


def augment_triton(stage: Stage) -> Figures:
    """Compare and time the augmentation's Triton kernels in the same way."""
    if not stage.on_gpu:
        yield {"skipped": "the Triton kernels need a GPU; the tests in tests/augment interpret them"}
        return
    yield from augment(stage, triton=True)


def step(stage: Stage, kernels: KernelChoice = TORCH) -> Figures:
    """Compile the step and time it: from ready inputs, and with the augmentation."""
    config = stage.config(compile="true")
    learner, batch = stage.learner(config, kernels), stage.batch(config)
    augmented = learner.augment
    plain = TrainAugment(
        config.replace(aa="none").augment,
        num_classes=NUM_CLASSES,
        seed=0,
        device=stage.device,
        normalisation=Normalisation.of(config.data),
        dtype=input_dtype(config),
    )
    ready = plain(*batch, step=0, micro_batch=0)
    learner.augment = lambda *_, **__: ready  # type: ignore[assignment]

    def take() -> None:
        train_step(learner, iter([batch]))
        learner.state.step += 1

    first_s = stage.seconds(take)
    yield {"first_s": first_s, "first_goal_s": FIRST_STEP_S, "first_within_goal": first_s <= FIRST_STEP_S}
    learner.tracker.flush()
    yield {"loss": learner.tracker.interval.value}
    num = 5 if stage.on_gpu else 1
    rounds = stage.rounds_ms(take, num)
    ms = median(rounds)
    yield {"ms": ms, "images_per_s": 1000 * config.data.batch_size / ms, "peak_gb": stage.peak_gb()}
    yield {"rounds_ms": rounds}
    stage.wait()
    started = time.perf_counter()
    take()
    yield {"host_ms": 1000 * (time.perf_counter() - started)}
    yield {"shares": profile_step(take, stage.device)}
    if not kernels.network:
        learner.augment = augmented
        stage.seconds(take)  # compiles the augmentation
        yield {"augmented_ms": stage.ms(take, num)}
    if stage.on_gpu:
        learner.augment = lambda *_, **__: ready  # type: ignore[assignment]
        yield _graphed(stage, learner, take, num)


def _graphed(stage: Stage, learner: Learner, take: Callable[[], None], num: int) -> dict[str, Any]:
    """Time the same step with forward and backward as one CUDA graph; it comes last, and an error is a figure."""
    learner.graphs = GraphedPasses(learner.network, partial(backward, learner))
    try:
        stage.seconds(take)  # records
        rounds = stage.rounds_ms(take, num)
    except RuntimeError as error:
        return {"graphs_failed": " ".join(str(error).split())[:300]}
    return {"graphs_ms": median(rounds), "graphs_rounds_ms": rounds, "graphs_peak_gb": stage.peak_gb()}


def step_triton(stage: Stage) -> Figures:
    """Take the same step with the Triton kernels."""
    if not stage.on_gpu:
        yield {"skipped": "the Triton kernels need a GPU; tests/models/test_kernels.py interprets them"}
        return
    yield from step(stage, replace(TORCH, network=True))


def update(stage: Stage) -> Figures:
    """Time what follows the backward pass (AdamW, averaged weights, cleared gradients), with either kernels."""
    config = stage.config(aa="none", model_ema=True)
    for optimizer in (False, True) if stage.on_gpu else (False,):
        learner = stage.learner(config, replace(TORCH, optimizer=optimizer))
        gradients = [(parameter, torch.ones_like(parameter)) for parameter in learner.network.parameters()]
        rounds = stage.rounds_ms(partial(_update, learner, gradients), 20 if stage.on_gpu else 1)
        name = "triton" if optimizer else "torch"
        yield {f"{name}_ms": median(rounds), f"{name}_rounds_ms": rounds}


def _update(learner: Learner, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Take an optimiser step with these gradients and without images."""
    for parameter, gradient in gradients:
        parameter.grad = gradient
    train_step(learner, iter(()))


def kernels(stage: Stage) -> Figures:
    """Compare the fused convolution and norm with float64, and time them beside cuDNN's and PyTorch's."""
    from ffcv_convnext.models.kernels import TWINS, Operations, triton_operations

    shapes: Sequence[tuple[int, int]] = SHAPES
    num, dtype, ours = 128, torch.bfloat16, TWINS
    if stage.on_gpu:
        ours = triton_operations()
    else:
        shapes, num = ((8, 16),), 2
    for side, channels in shapes:
        generator = torch.Generator().manual_seed(side)

        def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
            made = torch.randn(shape, generator=generator).to(stage.device)
            return made.contiguous(memory_format=torch.channels_last) if made.ndim == 4 else made

        x, weight = random(num, channels, side, side), random(channels, 1, 7, 7) / 7
        bias, gain, offset = (random(channels) for _ in range(3))
        slope = random(num, channels, side, side).to(dtype)
        leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, gain, offset)]

        def both(operations: Operations, leaves: list[Tensor] = leaves, slope: Tensor = slope) -> tuple[Tensor, ...]:
            image, kernel, shift, scale, start = leaves
            with torch.autocast(stage.device.type, dtype=dtype):
                result = operations.depthwise_layer_norm(image, kernel, shift, 1, scale, start, 1e-6)
            return result, *torch.autograd.grad(result, leaves, slope.to(result.dtype))

        first_s = stage.seconds(lambda: both(ours))
        found, again = both(ours), both(ours)
        part = 8  # images; float64 is slow
        wide = [
            tensor.detach()[: part if tensor.ndim == 4 and len(tensor) == num else None].double() for tensor in leaves
        ]
        wide = [tensor.requires_grad_() for tensor in wide]
        exact = both_exact(wide, slope[:part])
        small = [leaf.detach()[:part].requires_grad_() if leaf is x else leaf for leaf in leaves]
        of_part = both(ours, small, slope[:part])
        yield {
            "side": side,
            "channels": channels,
            "first_s": first_s,
            "relative_errors": [
                ((ours_.double() - exact_).norm() / exact_.norm()).item()
                for ours_, exact_ in zip(of_part, exact, strict=True)
            ],
            "repeats_bits": all(torch.equal(a, b) for a, b in zip(found, again, strict=True)),
            "ms": stage.ms(lambda: both(ours)),
            "pytorch_ms": stage.ms(lambda: both(TWINS)),
        }


def both_exact(leaves: list[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
    """Return convolution and norm in float64, and the gradients."""
    x, weight, bias, gain, offset = leaves
    sums = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    result = F.layer_norm(sums.permute(0, 2, 3, 1), gain.shape, gain, offset, 1e-6).permute(0, 3, 1, 2)
    return result, *torch.autograd.grad(result, leaves, slope.double())


def nccl(stage: Stage) -> Figures:
    """Join a process group of one and reduce a step's gradients through DDP."""
    from torch.nn.parallel import DistributedDataParallel

    backend = "nccl" if stage.on_gpu else "gloo"
    config = stage.config(aa="none", model_ema=False)
    learner, batch = stage.learner(config), stage.batch(config)
    where: dict[str, Any] = {"device_id": stage.device} if stage.on_gpu else {}
    store = dist.HashStore()  # type: ignore[attr-defined]  # of one process
    dist.init_process_group(backend, store=store, rank=0, world_size=1, **where)
    try:
        sent = torch.arange(4.0, device=stage.device)
        dist.all_reduce(sent)
        yield {"backend": backend, "all_reduce": sent.tolist() == [0, 1, 2, 3]}
        learner.model = DistributedDataParallel(
            learner.network, device_ids=[stage.device] if stage.on_gpu else None, gradient_as_bucket_view=True
        )
        yield {"first_s": stage.seconds(lambda: train_step(learner, iter([batch])))}
        ms = stage.ms(lambda: train_step(learner, iter([batch])), 5)
        yield {"ms": ms, "images_per_s": 1000 * config.data.batch_size / ms}
    finally:
        dist.destroy_process_group()


def peers(stage: Stage) -> Figures:
    """Time timm's ConvNeXt-T, eager and compiled, in the same way."""
    from ffcv_convnext.bench.contestants.steps import peer

    choices = ("false", "true") if stage.on_gpu else ("false",)
    name = "convnext_tiny" if stage.on_gpu else "test_convnext"
    for compile in choices:
        flat = stage.config(compile=compile, model_ema=True).flat()
        work, first = peer(flat, 3.0 if stage.on_gpu else 0.5, "timm", name)
        assert first is not None
        first_s = stage.seconds(first)
        done = work()
        assert not isinstance(done, int)
        yield {
            "name": f"timm {name}",
            "compiled": compile,
            "first_s": first_s,
            "images_per_s": done.images / done.seconds,
        }


def ladder(stage: Stage) -> Figures:
    """Take eager steps of every design step."""
    flags: dict[str, Any] = {"device": stage.device.type, "compile": "false", "aa": "none"}
    if not stage.on_gpu:
        flags |= {"batch_size": 2, "input_size": 64}
    for name, (_, arguments) in ladder_contestants(RN_CONFIGS, flags, stage.device).items():
        config = Config.from_flat(arguments["config"])
        learner, batch = stage.learner(config), stage.batch(config)
        if stage.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        num, warm = (5, 2) if stage.on_gpu else (1, 0)
        ms = stage.ms(partial(_take, learner, batch), num, warm)
        rate = 1000 * config.data.batch_size / ms
        yield {"name": name, "ms": ms, "images_per_s": rate, "peak_gb": stage.peak_gb()}


def _take(learner: Learner, batch: Batch) -> None:
    train_step(learner, iter([batch]))


def loader(stage: Stage) -> Figures:
    """Train from a .beton, beside training from the same crops in memory."""
    if (reason := _lacks("ffcv", "numba")) is not None:
        yield {"skipped": reason}
        return
    from ffcv_convnext.bench.contestants.steps import ours

    beton = _data(stage) / "train.beton"
    config = stage.config(compile="true" if stage.on_gpu else "false", num_workers=available_cores()).flat()
    seconds = 4.0 if stage.on_gpu else 1.0
    rates = {}
    for images in ("augmented", "loaded"):
        work, first = ours(config, seconds, images, str(beton), available_cores())
        first_s = stage.seconds(first or work)
        done = work()
        assert not isinstance(done, int)
        rates[images] = done.images / done.seconds
        yield {"images": images, "first_s": first_s, "images_per_s": rates[images]}
    yield {"share_of_synthetic": rates["loaded"] / rates["augmented"]}


def resume(stage: Stage) -> Figures:
    """Kill a run, continue it, and compare its weights with those of a run that was left alone."""
    if (reason := _lacks("ffcv", "numba", "tensorboard")) is not None:
        yield {"skipped": reason}
        return
    flat = {
        **TINY,
        **{"config": RN_CONFIGS / "convnext_tiny.yaml", "data_path": _data(stage), "input_size": 32},
        **{"batch_size": 16, "epochs": 2, "warmup_epochs": 0, "recipe_batch": 16, "compile": "false"},
        **{"device": stage.device.type, "save_ckpt_steps": 3, "log_every": 1, "num_workers": 2, "model_ema": True},
    }
    command = [sys.executable, "-m", "ffcv_convnext.cli", "train"]
    command += [word for name, value in flat.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory(dir=stage.out) as work:
        whole, killed = Path(work) / "whole", Path(work) / "killed"
        subprocess.run([*command, "--output_dir", str(whole)], check=True)
        process = subprocess.Popen([*command, "--output_dir", str(killed)])
        steps = killed / "steps.jsonl"
        while process.poll() is None and (not steps.exists() or steps.read_text().count("\n") < 5):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        at = steps.read_text().count("\n")
        subprocess.run([*command, "--output_dir", str(killed)], check=True)
        ours, theirs = (torch.load(folder / "checkpoint-last.pth", weights_only=True) for folder in (killed, whole))
    differences = [
        (ours[part][name].double() - value.double()).abs().max().item()
        for part in ("model", "ema")
        for name, value in theirs[part].items()
    ]
    yield {"killed_after_step": at, "steps": theirs["step"], "max_difference": max(differences)}


def _lacks(*packages: str) -> str | None:
    """Return which of the packages are missing here, or None."""
    missing = [name for name in packages if find_spec(name) is None]
    return f"{', '.join(missing)} not installed; give wheels with --wheels" if missing else None


def _data(stage: Stage) -> Path:
    """Return a folder with train.beton and val.beton of drawn pictures, 464 x 396 pixels; make it if it is missing."""
    folder = stage.out / "beton"
    if (folder / "val.beton").exists():
        return folder
    from PIL import Image

    from ffcv_convnext.data.convert import ConversionOptions, convert

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=stage.out) as images:
        for split, num in (("train", 512 if stage.on_gpu else 128), ("val", 32)):
            for i in range(num):
                place = Path(images) / split / f"class_{i % 4}"
                place.mkdir(parents=True, exist_ok=True)
                coarse = Image.fromarray(generator.integers(0, 256, (24, 28, 3), dtype=np.uint8))
                coarse.resize((464, 396), Image.Resampling.BICUBIC).save(place / f"{i}.jpg", quality=90)
        convert(ConversionOptions(data_path=Path(images), out_dir=folder, split="all"))
    return folder


RUNS: dict[str, Callable[[Stage], Figures]] = {
    **{each.__name__: each for each in (augment, augment_triton, step, step_triton)},
    **{each.__name__: each for each in (facts, eager, update, kernels, nccl, peers, resume, loader, ladder)},
}


def main(name: str, device: str, out: str) -> None:
    """Run a stage and print its figures, one line each."""
    for figures in RUNS[name](Stage(device, Path(out))):
        sys.stdout.write(f"{RESULT}{json.dumps(figures)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
