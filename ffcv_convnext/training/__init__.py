"""Training and evaluation of one run."""

from ffcv_convnext.files import read_lines
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, autocast, input_dtype, train_step
from ffcv_convnext.training.preflight import Plan, check_config
from ffcv_convnext.training.run import build_learner, compiles, count_classes, evaluate_only, train

__all__ = [
    "Learner",
    "Plan",
    "Processes",
    "autocast",
    "build_learner",
    "check_config",
    "compiles",
    "count_classes",
    "evaluate_only",
    "input_dtype",
    "read_lines",
    "train",
    "train_step",
]
