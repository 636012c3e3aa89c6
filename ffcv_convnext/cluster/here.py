"""A run in this process."""

from __future__ import annotations

from ffcv_convnext.config import Config
from ffcv_convnext.signals import stopping_at_once


def run_config(config: Config) -> int:
    """Train or continue, or evaluate, as the config says; returns exit status 0. Raises as `training.train` does."""
    with stopping_at_once():  # the imports take seconds
        from ffcv_convnext.training import evaluate_only, train

        if config.run.eval:
            evaluate_only(config)
        else:
            train(config)
    return 0
