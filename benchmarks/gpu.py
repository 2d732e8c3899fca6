"""All measurements on a GPU that is lent for minutes: `python benchmarks/gpu.py --help`, code in lease/."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # in place of this folder, where transformers would find `kernels`: the project need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.lease.cli import app

    app()
