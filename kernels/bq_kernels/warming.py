"""Compiles the kernels that a model will launch, on all cores, before it launches them.

Triton compiles a kernel when it is first launched, and a model's first launches come one after the other. Here they are
made once without being carried out: Triton's own hook hands over what it would compile, and all of that is compiled
side by side. Threads suffice: while one compiled four kernels for 17.7 s (Triton 3.9), another was kept from running
Python for 0.8 s in all. What has been compiled lies in Triton's cache on disk, where a second start finds it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from triton import JITFunction, knobs

MOST_THREADS = 16
ALIGNED = 16  # Triton tells integers that it divides from others
MOST_SPLIT_ROWS = 512  # up to here the launch table's lines and their split of K change with the number of rows


class Specialization(NamedTuple):
    """A kernel with all that its machine code depends on.

    Attributes:
        kernel: the function.
        data: its compile-time arguments, types and options, as Triton serialises them.
    """

    kernel: JITFunction
    data: str

    def compile(self) -> None:
        """Compile it for the current device, or take it from Triton's cache; its next launch finds it."""
        self.kernel.preload(self.data)


def representative_rows(most: int) -> list[int]:
    """Numbers of rows of x that together launch every kernel that any number up to `most` launches.

    Compile-time arguments change where the launch table's lines do, with the next power of two, and with the number of
    programs over the rows; an argument of 1, and one that 16 divides, have kernels of their own.
    """
    steps = range(ALIGNED, MOST_SPLIT_ROWS + 1, ALIGNED)
    powers = [1 << exponent for exponent in range(most.bit_length())]
    candidates = {1, *powers, *steps, *(n - 1 for n in (*powers, *steps)), most - most % ALIGNED, most}
    return sorted(n for n in candidates if 1 <= n <= most)


@contextlib.contextmanager
def recording() -> Iterator[dict[Specialization, None]]:
    """This thread's launches of kernels that are not compiled yet are recorded and not made; other launches are made.

    The tensors must therefore be real ones on the GPU. What the recorded launches would write stays uninitialised.

    Yields:
        the specializations, each once, in the order of their launches.
    """
    found: dict[Specialization, None] = {}
    thread, before = threading.get_ident(), knobs.runtime.jit_cache_hook

    def record(*, fn, compile, **others):
        if threading.get_ident() != thread:
            return before(fn=fn, compile=compile, **others) if before else None
        found[Specialization(fn.jit_function, compile["specialization_data"])] = None
        return True  # neither compiled nor launched

    knobs.runtime.jit_cache_hook = record
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


class Compilation:
    """Compiles in the background, in as many threads as there are cores.

    Attributes:
        builds: what has been handed over, in that order.
    """

    def __init__(self) -> None:
        self.builds: dict[Specialization, Future] = {}
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS), "compile")

    def add(self, specializations: Iterable[Specialization]) -> None:
        """Begin to compile those that have not been handed over before."""
        for wanted in specializations:
            if wanted not in self.builds:
                self.builds[wanted] = self._pool.submit(wanted.compile)

    def wait(self) -> dict[Specialization, Exception]:
        """Wait until all is compiled; returns why, for each that cannot be.

        What failed beside others is tried again alone: Triton reads kernels with `ast.parse`, which fails now and then
        in two threads at once (Python before 3.11.8, https://github.com/python/cpython/issues/106905).
        """
        self._pool.shutdown()
        problems = {}
        for wanted, build in self.builds.items():
            if build.exception():
                try:
                    wanted.compile()
                except Exception as problem:
                    problems[wanted] = problem
        return problems


def compile_kernels(specializations: Iterable[Specialization]) -> dict[Specialization, Exception]:
    """Compile on all cores and wait; returns why, for each that cannot be compiled."""
    compilation = Compilation()
    compilation.add(specializations)
    return compilation.wait()
