#!/usr/bin/env python3
"""Convert images (class folders, ImageNet's tars, WebDataset, parquet, lists) to train.beton and val.beton.

    python write_ffcv_dataset.py --data_path /imagenet --out_dir /beton

`--help` lists the options; the code is in ffcv_convnext/data/convert/.
"""

import sys

from ffcv_convnext.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("write"))
