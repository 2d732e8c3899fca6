"""Mixed into vLLM's workers: fills dummy weights, checks them, and says what they take."""

from __future__ import annotations

import math
from itertools import chain

import torch

PACKED = ("qweight", "weight_packed", "weight")


class Weights:
    """The value of `--worker-extension-cls`; its methods are called through `collective_rpc`."""

    def prepare_weights(self) -> dict[str, float | None]:
        """Fill packed codes with random bits if the weights are dummies; returns the size of all tensors in GiB.

        The size is None where vLLM keeps weights elsewhere and leaves empty tensors, as its CPU build does on a CPU
        for which it repacks them.

        Raises:
            ValueError: if a tensor holds NaN or infinity.
        """
        model, size = self.get_model(), 0
        dummy = self.vllm_config.load_config.load_format == "dummy"
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            size += tensor.nbytes
            if tensor.is_floating_point():
                if not math.isfinite(tensor.data.sum(dtype=torch.float32)):  # isfinite() would need memory of its own
                    raise ValueError(f"{name} holds NaN or infinity")
            # by name: other integers are counters, locks and indices
            elif dummy and name.rpartition(".")[2] in PACKED:
                limits = torch.iinfo(tensor.dtype)
                tensor.data.random_(limits.min, limits.max + 1)
        moved = any(not parameter.numel() for parameter in model.parameters())
        return {"weights_gib": None if moved else size / 2**30}


EXTENSION = f"{Weights.__module__}.{Weights.__qualname__}"
