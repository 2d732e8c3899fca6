"""Builds Triton's kernels on all cores before anything is timed: one after the other takes minutes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import time
from typing import NamedTuple

import torch
from bq_kernels import triton_linear
from bq_kernels.triton_linear import Launch
from rich.console import Console

from benchmarks.packed_linear.cases import DTYPE, LinearCase
from benchmarks.packed_linear.methods import WIDE_BLOCK

MOST_PROCESSES = 14


class WarmUp(NamedTuple):
    """The kernels of one layer.

    Attributes:
        out_features, in_features, group_size: the layer.
        tokens: numbers of rows of x.
        launches: how to compute them; None for what launch.json says.
    """

    out_features: int
    in_features: int
    group_size: int
    tokens: list[int]
    launches: list[Launch | None]


def warm_triton_cache(job: WarmUp, device: str = "cuda") -> None:
    """Run the kernels of a layer once, in a process of its own: Triton then keeps their builds on disk."""
    case = LinearCase(job.out_features, job.in_features, job.group_size, device, 0)
    block_sizes = {job.group_size}
    if job.launches == [None]:
        block_sizes |= {job.in_features, *([WIDE_BLOCK] if job.in_features % WIDE_BLOCK == 0 else [])}
    for tokens, launch, block_size in itertools.product(job.tokens, job.launches, [None, *block_sizes]):
        x = torch.randn(tokens, job.in_features, device=device, dtype=DTYPE)
        tables = case.rotation_tables(block_size) if block_size else (None, None)
        with contextlib.suppress(Exception):  # a kernel that cannot be built is reported where it is timed
            triton_linear.packed_linear(x, *case.packed[0], None, job.out_features, *tables, launch)


def build_kernels(jobs: list[WarmUp], console: Console) -> None:
    """Build the kernels of all jobs on all cores; does nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, MOST_PROCESSES), mp_context=spawn) as pool:
        for done in concurrent.futures.as_completed([pool.submit(warm_triton_cache, job) for job in jobs]):
            if problem := done.exception():  # the timed run will say more
                console.print(f"building ahead: {type(problem).__name__}: {problem}"[:160], markup=False)
    console.print(f"kernels built in {time.monotonic() - started:.0f} s")
