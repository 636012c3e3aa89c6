"""Training and evaluation of one run."""

from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, autocast, input_dtype, train_step
from ffcv_convnext.training.run import build_learner, compiles, evaluate_only, num_classes_of_head, train
from ffcv_convnext.training.runlog import read_lines

__all__ = [
    "Learner",
    "Processes",
    "autocast",
    "build_learner",
    "compiles",
    "evaluate_only",
    "input_dtype",
    "num_classes_of_head",
    "read_lines",
    "train",
    "train_step",
]
