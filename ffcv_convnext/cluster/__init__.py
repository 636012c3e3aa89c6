"""Runs as jobs: on a Slurm cluster through submitit, or as processes on this machine."""

from ffcv_convnext.cluster.conversion import conversion_status, submit_conversion
from ffcv_convnext.cluster.settings import ClusterConfig, add_cluster_flags, cluster_from_args, split_slurm_options
from ffcv_convnext.cluster.slurm import cancel, states
from ffcv_convnext.cluster.submission import (
    Task,
    await_data,
    last_error,
    num_processes,
    output_of,
    plan_task,
    submit_run,
    submit_tasks,
)
from ffcv_convnext.cluster.submissions import Submission, read_submissions

__all__ = [
    "ClusterConfig",
    "Submission",
    "Task",
    "add_cluster_flags",
    "await_data",
    "cancel",
    "cluster_from_args",
    "conversion_status",
    "last_error",
    "num_processes",
    "output_of",
    "plan_task",
    "read_submissions",
    "split_slurm_options",
    "states",
    "submit_conversion",
    "submit_run",
    "submit_tasks",
]
