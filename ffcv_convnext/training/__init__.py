"""Training and evaluation of one run."""

from ffcv_convnext.training.run import evaluate_only, train
from ffcv_convnext.training.runlog import read_lines

__all__ = ["evaluate_only", "read_lines", "train"]
