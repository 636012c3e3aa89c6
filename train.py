"""Train one step of the ladder, or any network, on .beton files: `python train.py --help` lists the settings.

On one device:   python train.py --config rn_configs/07_kernel7.yaml --data_path BETON_DIR --output_dir runs/07
On a node:       torchrun --nproc_per_node=8 train.py ... --update_freq 4
On a cluster:    python train.py ... --nodes 4 --job_dir JOB_DIR, see docs/cluster.md
"""

import sys

from ffcv_convnext.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train"))
