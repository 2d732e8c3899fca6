"""Properties of the GPU that a tensor is on, as far as launching a Triton kernel depends on them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: marketing name, as the driver reports it.
        architecture: device capability, `sm90`, or AMD's architecture, `gfx942`.
        multiprocessors: their number.
        pdl: whether it has programmatic dependent launch: a kernel may start before the previous one has ended.
    """

    name: str
    architecture: str
    multiprocessors: int
    pdl: bool

    @property
    def options(self) -> dict[str, bool]:
        """Compiler options of every launch."""
        # Triton 3.10 turns contraction to fused multiply-adds off by default
        return {"enable_fp_fusion": True} | ({"launch_pdl": True} if self.pdl else {})


@functools.cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture, pdl = properties.gcnArchName.split(":")[0], False
    else:
        architecture, pdl = f"sm{properties.major}{properties.minor}", properties.major >= 9
    return Gpu(properties.name, architecture, properties.multi_processor_count, pdl)


def gpu_of(tensor: torch.Tensor) -> Gpu:
    """The GPU of a tensor; for CPU tensors (interpreted kernels) a stand-in with a single multiprocessor."""
    return _gpu(tensor.device.index) if tensor.is_cuda else Gpu("", "", 1, False)


def nearest_capability(architecture: str) -> str:
    """The capability whose launches suit a GPU without launches of its own, by its matrix instruction and memory."""
    if architecture.startswith("gfx"):
        return "gfx942"
    return "sm80" if architecture.startswith(("sm8", "sm12")) else "sm90"
