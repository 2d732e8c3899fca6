"""Experts of a mixture as files have them, each with linear layers of its own; transformers stacks their weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .architecture import expert_layers


class Expert(nn.Module):
    """One expert: down(act(gate(x)) · up(x)).

    Args:
        hidden: features of its input and output.
        width: features between its layers.
        names: of its gate, up and down.
        act: activation function.
        like: gives dtype and device of its weights.
    """

    def __init__(self, hidden: int, width: int, names: tuple[str, str, str], act: nn.Module, like: torch.Tensor):
        super().__init__()
        self.names, self.act = names, act
        for name, features in zip(names, ((hidden, width), (hidden, width), (width, hidden)), strict=True):
            self.add_module(name, nn.Linear(*features, bias=False, dtype=like.dtype, device=like.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to the same."""
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """All experts of a mixture, in place of a module of transformers that stacks their weights.

    Args:
        stacked: that module, with weights `gate_up_proj` [experts, 2·width, hidden] and `down_proj`
            [experts, hidden, width]; only their shapes are taken over.
        names: of an expert's gate, up and down.
    """

    def __init__(self, stacked: nn.Module, names: tuple[str, str, str]):
        count, hidden, width = stacked.down_proj.shape
        super().__init__(Expert(hidden, width, names, stacked.act_fn, stacked.down_proj) for _ in range(count))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over a token's experts of their outputs, weighted.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of every token.
            top_k_weights: [tokens, k].

        Returns:
            [tokens, hidden], in the dtype of `hidden_states`.
        """
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            token, place = (top_k_index == number).nonzero(as_tuple=True)
            found = self[number](hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, found.to(out.dtype))
        return out


def split_experts(model: PreTrainedModel) -> None:
    """Put `Experts` in place of all modules of a model that stack the weights of experts, called as in its files."""
    known = expert_layers(model.config.model_type)
    if known is None:
        return
    path, names = known
    for layer in model.get_decoder().layers:
        for name, module in list(layer.named_modules()):
            stacked = [getattr(module, weight, None) for weight in ("gate_up_proj", "down_proj")]
            if all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in stacked):
                layer.set_submodule(name, Experts(module, names))
                _rename(layer, name.split(".")[0], path.split(".")[0])


def _rename(layer: nn.Module, old: str, new: str) -> None:
    """Call a child of a layer otherwise; the layer's own code finds it under its old name too, not as a child."""
    if old != new:
        child = layer._modules.pop(old)
        layer.add_module(new, child)
        layer.__dict__[old] = child
