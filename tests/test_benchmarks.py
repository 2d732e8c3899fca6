"""The benchmarks run to their end on a CPU, on shapes so small that their times mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: object) -> str:
    call = [sys.executable, BENCHMARKS / script, *arguments]
    done = subprocess.run([str(part) for part in call], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels(tmp_path):
    printed = run("kernels.py", "run", "--smoke", "--json", tmp_path / "kernels.json")
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").exists()
    ours = {"ours, no rotation", "ours, block = group", "ours, full width", "ours, Hadamard = group"}
    for row in record["rows"]:
        assert ours | {"cuBLAS fp16"} <= row["times"].keys()
        assert all(0 < error < 2e-3 for name, error in row["errors"].items() if name in ours)
    # a peer that is not installed is named, not passed over
    assert "left out: smoke smoke, Humming W2" in printed or "Humming W2" in record["rows"][0]["times"]


@pytest.mark.slow
def test_tuning_of_kernels():
    table = BENCHMARKS.parent / "kernels" / "bq_kernels" / "launch.json"
    before = table.read_text()
    assert "3 lines" in run("kernels.py", "tune", "--smoke")
    assert table.read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_want_a_gpu():
    call = [sys.executable, BENCHMARKS / "kernels.py", "run"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no GPU here" in done.stderr
