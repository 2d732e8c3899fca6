"""Cost of comparing a checkpoint's checksums at load: gigabytes per second, with and without SHA instructions."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from bq_kernels import checksums

from benchmarks.harness.provenance import command, cpu
from benchmarks.harness.results import write_json

MASKED = "OPENSSL_ia32cap"  # lets OpenSSL see a CPU without an instruction set
NO_SHA = ":~0x20000000"


def measure(size: int, runs: int) -> dict[str, Any]:
    """Compare two files of `size` bytes each, read before: the fastest of `runs`, in all threads and per core."""
    with tempfile.TemporaryDirectory() as name:
        folder, block = Path(name), random.Random(0).randbytes(2**20)
        for file in ("a.bin", "b.bin"):
            with open(folder / file, "wb") as handle:
                for _ in range(size // len(block)):
                    handle.write(block)
        checksums.write_sums(folder)
        total = sum(path.stat().st_size for path in folder.iterdir())
        seconds, of_a_core = [], []
        for _ in range(runs):
            os.environ.pop("_BQ_VERIFIED", None)
            wall, work = time.perf_counter(), time.process_time()
            checksums.compare_for_loading(folder)
            seconds.append(time.perf_counter() - wall)
            of_a_core.append(time.process_time() - work)
    return {"bytes": total, "gb_per_second": total / min(seconds) / 1e9, "per_core": total / min(of_a_core) / 1e9}


def main(
    size: Annotated[float, typer.Option(help="GB in each of two files.")] = 1.0,
    runs: Annotated[int, typer.Option(help="The fastest counts.")] = 3,
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("benchmarks/results/checksums.json"),
    only: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure the comparison of checksums on this CPU."""
    if only:
        print(json.dumps(measure(int(size * 1e9), runs)))
        return
    found = {"command": command(), "cpu": cpu(), "threads": os.cpu_count()}
    for name, environment in (("sha_instructions", {}), ("without", {MASKED: NO_SHA})):
        call = [sys.executable, __file__, "--size", str(size), "--runs", str(runs), "--only"]
        done = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    write_json(out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
