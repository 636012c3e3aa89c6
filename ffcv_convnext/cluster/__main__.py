"""Requeue a job or leave it; the last line of a batch script: `python -m ffcv_convnext.cluster STATUS FOLDER`."""

import sys
from pathlib import Path

from ffcv_convnext.cluster.slurm import requeue
from ffcv_convnext.errors import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(lambda: requeue(int(sys.argv[1]), Path(sys.argv[2]))))
