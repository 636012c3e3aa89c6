"""Runs as jobs: on a Slurm cluster by way of submitit, or as processes of this machine."""

from ffcv_convnext.cluster.here import run_config
from ffcv_convnext.cluster.records import Submission, read_submissions
from ffcv_convnext.cluster.settings import ClusterConfig, add_cluster_flags, cluster_from_args, split_slurm_options
from ffcv_convnext.cluster.slurm import cancel, states
from ffcv_convnext.cluster.submission import Task, num_processes, plan_task, submit_run, submit_tasks

__all__ = [
    "ClusterConfig",
    "Submission",
    "Task",
    "add_cluster_flags",
    "cancel",
    "cluster_from_args",
    "num_processes",
    "plan_task",
    "read_submissions",
    "run_config",
    "split_slurm_options",
    "states",
    "submit_run",
    "submit_tasks",
]
