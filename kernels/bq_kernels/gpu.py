"""What launching a Triton kernel needs to know of the GPU that a tensor is on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its driver says it.
        architecture: `sm90`, `gfx942`, …
        multiprocessors: how many it has.
        early_launch: whether a kernel may start before the last one has ended (programmatic dependent launch).
    """

    name: str
    architecture: str
    multiprocessors: int
    early_launch: bool

    @property
    def options(self) -> dict[str, bool]:
        """Compiler options of every launch."""
        # Triton 3.10 turns contraction to fused multiply-adds off by default
        return {"enable_fp_fusion": True} | ({"launch_pdl": True} if self.early_launch else {})


@functools.cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        architecture, hopper = properties.gcnArchName.split(":")[0], False
    else:
        architecture, hopper = f"sm{properties.major}{properties.minor}", properties.major >= 9
    return Gpu(properties.name, architecture, properties.multi_processor_count, hopper)


def gpu_of(tensor: torch.Tensor) -> Gpu:
    """The GPU of a tensor; for tensors elsewhere (interpreted kernels) one with a single multiprocessor."""
    return _gpu(tensor.device.index) if tensor.is_cuda else Gpu("", "", 1, False)
