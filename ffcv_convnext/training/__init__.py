"""Training and evaluation of one run. Import from a module: `from ffcv_convnext.training.run import train`.

preflight.py and schedule.py import neither torch nor timm: a submission is checked in a second.
"""

from __future__ import annotations

from ffcv_convnext.config import Config
from ffcv_convnext.signals import stopping_at_once

__all__ = ["run_config"]


def run_config(config: Config) -> int:
    """Train, continue or evaluate in this process; return exit status 0. Raises as `run.train` does."""
    with stopping_at_once():  # the imports take seconds
        if config.run.eval:
            from ffcv_convnext.training.evaluation import evaluate_only

            evaluate_only(config)
        else:
            from ffcv_convnext.training.run import train

            train(config)
    return 0
