"""Linear layers without weights in memory: a decoder layer of hundreds of experts may not fit with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


class LinearOnDemand(nn.Linear):
    """A linear layer whose weight is made for every use.

    Args:
        like: gives shape, dtype and bias.
        device: of the weight.
        make: gives the weight [N, K], in any dtype and on any device.
    """

    def __init__(self, like: nn.Linear, device: torch.device, make: Callable[[], torch.Tensor]):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        self.make, self._place = make, (device, like.weight.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [N, K]."""
        return self.make().to(*self._place)


@contextlib.contextmanager
def on_demand(module: nn.Module, layers: dict[str, LinearOnDemand]) -> Iterator[None]:
    """Put layers in place of those of a module, for as long as the context lasts.

    Args:
        module: a decoder layer without weights.
        layers: by name.
    """
    replaced = {name: module.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        module.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, layer in replaced.items():
            module.set_submodule(name, layer)
