"""Training and evaluation of one run."""

from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, train_step
from ffcv_convnext.training.run import build_learner, evaluate_only, num_classes_of_head, train
from ffcv_convnext.training.runlog import read_lines

__all__ = [
    "Learner",
    "Processes",
    "build_learner",
    "evaluate_only",
    "num_classes_of_head",
    "read_lines",
    "train",
    "train_step",
]
