"""Experts of a mixture as files have them, each with linear layers of its own; transformers stacks their weights."""

from __future__ import annotations

import torch
from torch import nn


class Expert(nn.Module):
    """One expert: down(act(gate(x)) · up(x)).

    Args:
        hidden: features of its input and output.
        width: features between its layers.
        act: activation function.
        like: gives dtype and device of its weights.
    """

    def __init__(self, hidden: int, width: int, act: nn.Module, like: torch.Tensor):
        super().__init__()
        options = {"bias": False, "dtype": like.dtype, "device": like.device}
        self.gate_proj, self.up_proj = nn.Linear(hidden, width, **options), nn.Linear(hidden, width, **options)
        self.down_proj = nn.Linear(width, hidden, **options)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to the same."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """All experts of a mixture, in place of a module of transformers that stacks their weights.

    Args:
        stacked: that module, with weights `gate_up_proj` [experts, 2·width, hidden] and `down_proj`
            [experts, hidden, width]; only their shapes are taken over.
    """

    def __init__(self, stacked: nn.Module):
        count, hidden, width = stacked.down_proj.shape
        super().__init__(Expert(hidden, width, stacked.act_fn, stacked.down_proj) for _ in range(count))

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


def split_experts(model: nn.Module) -> None:
    """Put `Experts` in place of all modules of a model that stack the weights of experts."""
    for name, module in list(model.named_modules()):
        stacked = [getattr(module, weight, None) for weight in ("gate_up_proj", "down_proj")]
        if all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in stacked):
            model.set_submodule(name, Experts(module))
