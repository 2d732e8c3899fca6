"""Compiles the kernels of a benchmark on all cores before anything is timed: one after the other takes minutes."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
from bq_kernels import triton_linear
from bq_kernels.triton_linear import Launch
from bq_kernels.warming import Compilation, Specialization, recording
from rich.console import Console

from benchmarks.packed_linear.cases import DTYPE, LinearCase
from benchmarks.packed_linear.methods import EPSILON, WIDE_BLOCK


class WarmUp(NamedTuple):
    """The kernels of one layer.

    Attributes:
        out_features, in_features, group_size: the layer.
        tokens: numbers of rows of x.
        launches: how to compute them; None for what launch.json says.
        normed: also behind an RMSNorm.
    """

    out_features: int
    in_features: int
    group_size: int
    tokens: list[int]
    launches: list[Launch | None]
    normed: bool = False


def kernels_of(job: WarmUp, device: str = "cuda") -> Iterable[Specialization]:
    """The kernels of a layer that are not compiled yet."""
    case = LinearCase(job.out_features, job.in_features, job.group_size, device, 0)
    block_sizes = {job.group_size}
    if job.launches == [None]:
        block_sizes |= {job.in_features, *([WIDE_BLOCK] if job.in_features % WIDE_BLOCK == 0 else [])}
    with recording() as found:
        for tokens, launch, block_size in itertools.product(job.tokens, job.launches, [None, *block_sizes]):
            x = torch.randn(tokens, job.in_features, device=device, dtype=DTYPE)
            tables = case.rotation_tables(block_size) if block_size else (None, None)
            with contextlib.suppress(Exception):  # a launch that fails is reported where it is timed
                layer = *case.packed[0], None, job.out_features, *tables
                triton_linear.packed_linear(x, *layer, launch)
                if job.normed and block_size == job.group_size:
                    triton_linear.norm_linear(x, x, x.new_ones(job.in_features), EPSILON, *layer, launch)
    return found


def build_kernels(jobs: list[WarmUp], console: Console) -> None:
    """Compile the kernels of all jobs; does nothing without a GPU."""
    if not torch.cuda.is_available():
        return
    started = time.monotonic()
    compilation = Compilation()
    for job in jobs:
        compilation.add(kernels_of(job))
    for wanted, problem in compilation.wait().items():  # where it is timed, it will fail again
        console.print(f"building ahead: {wanted.kernel}: {type(problem).__name__}: {problem}"[:160], markup=False)
    console.print(f"{len(compilation.builds)} kernels built in {time.monotonic() - started:.0f} s")
