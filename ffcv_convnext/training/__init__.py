"""Training and evaluation of one run."""

from ffcv_convnext.files import read_lines
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, autocast, input_dtype, train_step
from ffcv_convnext.training.run import build_learner, compiles, evaluate_only, num_classes_of_head, train

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
