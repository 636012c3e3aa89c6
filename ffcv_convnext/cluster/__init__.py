"""Runs as jobs: on a Slurm cluster by way of submitit, or as processes of this machine."""

from ffcv_convnext.cluster.local_executor import log_of
from ffcv_convnext.cluster.settings import ClusterConfig, add_cluster_flags, cluster_from_args, split_slurm_options
from ffcv_convnext.cluster.slurm import cancel, log_of_job, states
from ffcv_convnext.cluster.submission import Task, num_processes, plan_task, submit_run, submit_tasks, unfinished
from ffcv_convnext.cluster.submissions import Submission, holder, read_submissions

__all__ = [
    "ClusterConfig",
    "Submission",
    "Task",
    "add_cluster_flags",
    "cancel",
    "cluster_from_args",
    "holder",
    "log_of",
    "log_of_job",
    "num_processes",
    "plan_task",
    "read_submissions",
    "split_slurm_options",
    "states",
    "submit_run",
    "submit_tasks",
    "unfinished",
]
