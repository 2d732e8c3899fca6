"""The dtype of products: 16 bits where the device multiplies them natively, 32 bits elsewhere.

A CPU without bfloat16 instructions multiplies bfloat16 7 to 50 times slower than float32. Which CPU that is, a product
of a millisecond tells better than a list of names. `python -m bq_calibration.compute` prints the dtype that suits this
machine, for `vllm serve --dtype`.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from .errors import UserError

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SIZE, _REPEATS = 256, 3  # 0.4 ms per float32 product on one core


@functools.cache
def _cpu_seconds() -> dict[torch.dtype, float]:
    """CPU seconds of one square product on one thread by dtype, the fastest of a few; measured once per process.

    On one thread and by its own clock: other programs on the machine then do not count.
    """
    fastest: dict[torch.dtype, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.ones(_SIZE, _SIZE, dtype=dtype)
            x @ x  # the first product prepares the library
            for _ in range(_REPEATS):
                started = time.thread_time()
                x @ x
                elapsed = time.thread_time() - started
                fastest[dtype] = min(elapsed, fastest.get(dtype, elapsed))
    finally:
        torch.set_num_threads(threads)
    return fastest


def native_dtype(preferred: torch.dtype, device: torch.device | str) -> torch.dtype:
    """`preferred` if the device multiplies it at least as fast as float32, else float32.

    Args:
        preferred: a float dtype.
        device: where products are computed. A CPU is measured, a few milliseconds once per process; CUDA is asked.
    """
    device = torch.device(device)
    if device.type == "cpu" and preferred in (seconds := _cpu_seconds()):
        native = seconds[preferred] <= seconds[torch.float32]
    elif device.type == "cuda" and preferred == torch.bfloat16:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = True
    return preferred if native else torch.float32


def operations_per_second() -> float:
    """Floating-point operations that this CPU does per second in float32 products, all threads together."""
    return 2 * _SIZE**3 / _cpu_seconds()[torch.float32] * torch.get_num_threads()


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which flags, settings and reports call a dtype: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ComputeDtypes:
    """The dtypes of a run's products.

    Attributes:
        forward: of the weights and activations of decoder layers that are only run.
        training: of the products of layers that are trained; what is trained itself stays float32.
    """

    forward: torch.dtype
    training: torch.dtype

    def to_dict(self) -> dict[str, str]:
        """Names, as settings and reports hold them."""
        return {part: dtype_name(dtype) for part, dtype in vars(self).items()}


def compute_dtypes(requested: str, source: torch.dtype, device: torch.device | str) -> ComputeDtypes:
    """The dtypes of a run.

    Args:
        requested: one of COMPUTE_DTYPES. `auto` runs layers in the source's dtype and trains in bfloat16, each where
            the device multiplies it natively, else in float32.
        source: dtype of the model's weights.
        device: where the run computes.

    Raises:
        UserError: for a name that is not in COMPUTE_DTYPES.
    """
    if requested not in COMPUTE_DTYPES:
        raise UserError(f"--compute-dtype {requested}: expected one of {', '.join(COMPUTE_DTYPES)}")
    if requested == "auto":
        return ComputeDtypes(native_dtype(source, device), native_dtype(torch.bfloat16, device))
    forced = getattr(torch, requested)
    # gradients underflow in float16, so training then takes the other 16-bit dtype or 32 bits
    training = native_dtype(torch.bfloat16, device) if forced == torch.float16 else forced
    return ComputeDtypes(forced, training)


if __name__ == "__main__":
    print(dtype_name(native_dtype(torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")))
