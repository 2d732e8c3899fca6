"""Helpers for every folder of tests: `import tiny` writes small checkpoints."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent / "vllm"))
# tensors here are so small that a second thread mostly waits, and on a busy machine for long
torch.set_num_threads(1)
