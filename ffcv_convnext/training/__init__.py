"""Training and evaluation of one run."""

from ffcv_convnext.files import read_lines
from ffcv_convnext.training.checks import Plan, check_config
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, train_step
from ffcv_convnext.training.run import build_learner, evaluate_only, train

__all__ = [
    "Learner",
    "Plan",
    "Processes",
    "build_learner",
    "check_config",
    "evaluate_only",
    "read_lines",
    "train",
    "train_step",
]
