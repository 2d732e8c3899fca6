"""Helpers for every folder of tests: `import tiny` writes small checkpoints."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "vllm"))
