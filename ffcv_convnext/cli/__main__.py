"""`python -m ffcv_convnext.cli` is the command `ffcv-convnext`."""

import sys

from ffcv_convnext.cli import main

if __name__ == "__main__":
    sys.exit(main())
