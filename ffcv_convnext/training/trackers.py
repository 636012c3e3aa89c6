"""TensorBoard and Weights & Biases: the run's numbers, its settings and its final and best scores.

TensorBoard sorts cards by their tag: accuracy, then loss, schedule and throughput. Its HParams tab compares runs: each
run states all its settings at the start, and the tab shows those that differ. Its scores are scalars of the run, so a
run that was killed has those of its last epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffcv_convnext.config import SETTINGS, Config, format_value
from ffcv_convnext.run_folder import finite

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SCORES = ("test_acc1", "test_acc1_ema")  # whose best value is kept
STEP_TAGS = {
    "loss": "loss/train_step",
    "lr": "schedule/lr",
    "weight_decay": "schedule/weight_decay",
    "images_per_s": "throughput/images_per_s_step",
}
SCHEDULE = ("train_size", "micro_batch")
NOT_SHOWN = ("step", "epoch", "lr", "n_parameters")  # of an epoch: the axis, shown step by step, or always the same
NOT_COMPARED = ("output_dir", "resume", "data_path", "stage_to", "eval_data_path")  # where a run lies, not what it does


def epoch_tag(key: str) -> str:
    """Return the tag of a number of log.jsonl."""
    if key.startswith("test_acc"):
        return f"accuracy/{key}"
    if "loss" in key:
        return f"loss/{key}"
    return f"{'schedule' if key in SCHEDULE else 'throughput'}/{key}"


def numbers_of(entry: Mapping[str, Any], best: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the numbers of a log entry by tag. best: scores of the best epoch so far; None: it is a log point."""
    if best is None:
        found = {STEP_TAGS[key]: value for key, value in entry.items() if key in STEP_TAGS}
    else:
        found = {epoch_tag(key): value for key, value in entry.items() if key not in NOT_SHOWN}
        found |= {f"accuracy/{name}_best": value for name, value in best.items()}
    return {tag: value for tag, value in found.items() if isinstance(value, int | float)}


class Trackers:
    """The trackers of a run, from the step on at which it starts.

    epochs: entries of log.jsonl before that step.   wandb: its open run, or None.
    continued: False removes the events of an earlier run here: the HParams tab keeps the first settings that it finds.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        *,
        step: int,
        epochs: Iterable[Mapping[str, Any]],
        continued: bool,
        wandb: Any = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and the benchmarks do without it

        if not continued:
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
        self.tensorboard: SummaryWriter = SummaryWriter(str(folder), purge_step=step + 1)
        self.wandb = wandb
        self.best: dict[str, float] = {}
        for entry in epochs:
            self._note_best(entry)
        self._end = self._state_settings(config)

    def _state_settings(self, config: Config) -> Any:
        """Write the settings for the HParams tab; return the summary that marks the run as finished."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard.summary import hparams

        settings = {
            name: value if isinstance(value, bool | int | float) else format_value(value)
            for name, value in config.flat().items()
            if name in SETTINGS and name not in NOT_COMPARED
        }
        # Without the summary of an experiment, the tab compares the runs itself and lists what differs first.
        # TensorBoard's function keeps true and false, which torch's turns into numbers. No trial: a row is a run.
        self._write(hparams_pb(settings, trial_id=""))
        *_, end = hparams({}, {})  # type: ignore[no-untyped-call]  # torch declares no types
        return end

    def _write(self, summary: Any) -> None:
        writer = self.tensorboard._get_file_writer()  # type: ignore[no-untyped-call]  # torch declares no types
        writer.add_summary(summary)

    def _note_best(self, entry: Mapping[str, Any]) -> None:
        for name in SCORES:
            value = finite(entry.get(name))
            if value is not None:
                self.best[name] = max(value, self.best.get(name, value))

    def step(self, entry: Mapping[str, Any]) -> None:
        """Add a log point within an epoch."""
        self._add(numbers_of(entry), entry["step"])

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Add an epoch with its evaluation."""
        self._note_best(entry)
        self._add(numbers_of(entry, self.best), entry["step"])

    def _add(self, numbers: Mapping[str, float], step: int) -> None:
        for tag, value in numbers.items():
            self.tensorboard.add_scalar(tag, value, step)
        if self.wandb is not None:
            self.wandb.log(dict(numbers), step=step)

    def done(self, scores: Mapping[str, Any]) -> None:
        """State the final and the best scores."""
        self._write(self._end)
        if self.wandb is not None:
            best = {f"best_{name}": value for name, value in self.best.items()}
            self.wandb.summary.update({**{f"final_{name}": value for name, value in scores.items()}, **best})

    def flush(self) -> None:
        """Write buffered events to disk, so that they survive if this process is killed."""
        self.tensorboard.flush()

    def close(self) -> None:
        """Close them."""
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()
