"""The backend that multiplies packed layers in vLLM.

`triton` (CUDA, ROCm) multiplies with the packed integers. `dense` (the default elsewhere) folds the rotation into a
16-bit weight at load time, and is then as fast and as large as the 16-bit model. `reference` is plain torch, for
comparison.
"""

from __future__ import annotations

import os

BACKENDS = ("triton", "dense", "reference")
BACKEND_VARIABLE = "BQ_VLLM_BACKEND"
ACTIVATION_BITS_VARIABLE = "BQ_VLLM_PREFILL_ACTIVATION_BITS"
FUSE_NORM_VARIABLE = "BQ_VLLM_FUSE_NORM"


def chosen_backend() -> str:
    """The backend that the environment asks for; empty where the platform decides."""
    return os.environ.get(BACKEND_VARIABLE, "")


def select_backend() -> str:
    """The backend of this process: that of `BQ_VLLM_BACKEND`, else `triton` on a GPU and `dense` on a CPU.

    Raises:
        ValueError: if the variable names no backend, or one that cannot run on this platform.
    """
    from bq_kernels import ops  # imported late: the plugin is registered before vLLM knows its platform
    from vllm.platforms import current_platform

    on_gpu = current_platform.is_cuda_alike()
    backend = chosen_backend() or ("triton" if on_gpu else "dense")
    if backend not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={backend}: unknown backend, expected one of {list(BACKENDS)}")
    if backend == "triton" and not on_gpu and not ops.interpreted():
        raise ValueError(f"{BACKEND_VARIABLE}=triton on a CPU needs TRITON_INTERPRET=1")
    return backend


def chosen_activation_bits() -> str:
    """The bits of a prefill's activations that the environment asks for; empty where the checkpoint decides."""
    return os.environ.get(ACTIVATION_BITS_VARIABLE, "")


def select_activation_bits(backend: str, configured: int) -> int:
    """Bits of a prefill's activations: those of `BQ_VLLM_PREFILL_ACTIVATION_BITS`, else those of the checkpoint.

    Args:
        backend: of this process; `dense` has no rotated activations, and leaves them as they are.
        configured: `prefill_activation_bits` of the checkpoint's config.

    Raises:
        ValueError: if the variable holds another value than 8 or 16, or 8 with the backend `dense`.
    """
    from bq_kernels.format import ACTIVATION_BITS

    asked = chosen_activation_bits()
    if asked and asked not in map(str, ACTIVATION_BITS):
        raise ValueError(f"{ACTIVATION_BITS_VARIABLE}={asked}: expected one of {list(ACTIVATION_BITS)}")
    if asked == "8" and backend == "dense":
        raise ValueError(f"{ACTIVATION_BITS_VARIABLE}=8 needs {BACKEND_VARIABLE}=triton or reference, not dense")
    return ACTIVATION_BITS[0] if backend == "dense" else int(asked or configured)


def chosen_fuse_norm() -> str:
    """1 where the environment asks for RMSNorms inside the packed linear; empty or 0 where it does not."""
    return os.environ.get(FUSE_NORM_VARIABLE, "")


def select_fuse_norm(backend: str) -> bool:
    """Whether `BQ_VLLM_FUSE_NORM` asks for RMSNorm and packed linear as one operator.

    Raises:
        ValueError: if the variable holds another value than 0 or 1, or 1 with a backend that launches no kernels.
    """
    asked = chosen_fuse_norm()
    if asked not in ("", "0", "1"):
        raise ValueError(f"{FUSE_NORM_VARIABLE}={asked}: expected 0 or 1")
    if asked == "1" and backend != "triton":
        raise ValueError(f"{FUSE_NORM_VARIABLE}=1 needs {BACKEND_VARIABLE}=triton, not {backend}")
    return asked == "1"
