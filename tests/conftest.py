"""Helpers for every folder of tests: `import tiny` writes small checkpoints."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "vllm"))
# tensors here are so small that a second thread mostly waits, and on a busy machine for long
torch.set_num_threads(1)


class Driver:
    """Stands in for the driver of an H100 that is not there: kernels are compiled for it and cannot be launched."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator:
    """Triton compiles for an H100, which tensors without memory count as, into an empty cache."""
    from bq_kernels import gpu
    from triton import JITFunction, knobs
    from triton.runtime.driver import driver

    def forget() -> None:
        for kernel in kernels:
            kernel.device_caches.clear()

    stand_in = gpu.Gpu("", "sm90", 132, True)
    modules = [module for name, module in sys.modules.items() if name.startswith("bq_kernels.")]
    for module in modules:
        if hasattr(module, "gpu_of"):
            monkeypatch.setattr(module, "gpu_of", lambda tensor: stand_in)
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    monkeypatch.setattr(driver, "_active", Driver())
    forget()
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        yield stand_in
    forget()
