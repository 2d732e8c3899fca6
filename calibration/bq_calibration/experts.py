"""Experts of a mixture, each with linear layers of its own; transformers stacks their weights, some files do too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from bq_kernels.reference import clamped_swiglu
from torch import nn
from transformers import PreTrainedModel

from .architecture import STACKED, expert_layers
from .store import Slice, TensorStore

# (gate, up): what an expert's down layer reads
Gating = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gated(gate: torch.Tensor, up: torch.Tensor, act: nn.Module) -> torch.Tensor:
    """act(gate) · up."""
    return act(gate) * up


def _gating(stacked: nn.Module) -> Gating:
    if hasattr(stacked, "act_fn"):
        return functools.partial(gated, act=stacked.act_fn)
    return functools.partial(clamped_swiglu, alpha=stacked.alpha, limit=stacked.limit)


class Expert(nn.Module):
    """One expert: down(gating(gate(x), up(x))).

    Args:
        hidden: features of its input and output.
        width: features between its layers.
        names: of its gate, up and down.
        gating: what the gate does with the other.
        bias: whether its layers have one.
        like: gives dtype and device of its weights.
    """

    def __init__(
        self, hidden: int, width: int, names: tuple[str, str, str], gating: Gating, bias: bool, like: torch.Tensor
    ):
        super().__init__()
        self.names, self.gating = names, gating
        for name, features in zip(names, ((hidden, width), (hidden, width), (width, hidden)), strict=True):
            self.add_module(name, nn.Linear(*features, bias=bias, dtype=like.dtype, device=like.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to the same."""
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.gating(gate(x), up(x)))


class Experts(nn.ModuleList):
    """All experts of a mixture, in place of a module of transformers that stacks their weights.

    Args:
        stacked: that module, with weights `gate_up_proj` [experts, 2·width, hidden] and `down_proj`
            [experts, hidden, width], or, if it has biases, these with the last two dimensions exchanged; only their
            shapes are taken over.
        names: of an expert's gate, up and down.
    """

    def __init__(self, stacked: nn.Module, names: tuple[str, str, str]):
        bias = hasattr(stacked, "down_proj_bias")
        count, *features = stacked.down_proj.shape
        width, hidden = features if bias else reversed(features)
        one = functools.partial(Expert, hidden, width, names, _gating(stacked), bias, stacked.down_proj)
        super().__init__(one() for _ in range(count))
        self.names, self._replaced = names, (stacked,)

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

    def joined(self) -> nn.Module:
        """The module of transformers that this one has replaced, with biases, and with the weights of this one."""
        (stacked,) = self._replaced

        def of_all(name: str, suffix: str) -> torch.Tensor:
            tensors = torch.stack([getattr(getattr(expert, name), suffix) for expert in self])
            return tensors.mT if suffix == "weight" else tensors

        gate, up, down = self.names
        for suffix, last in (("weight", ""), ("bias", "_bias")):
            pairs = torch.stack((of_all(gate, suffix), of_all(up, suffix)), -1).flatten(-2)
            for name, tensor in (("gate_up_proj", pairs), ("down_proj", of_all(down, suffix))):
                setattr(stacked, name + last, nn.Parameter(tensor.contiguous(), requires_grad=False))
        return stacked


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


def join_experts(model: PreTrainedModel) -> None:
    """Undo `split_experts` in a model whose files stack experts; those of others have them as they are here."""
    if model.config.model_type in STACKED:
        for name, module in list(model.named_modules()):
            if isinstance(module, Experts):
                model.set_submodule(name, module.joined())


def split_tensors(store: TensorStore, model_type: str) -> None:
    """Let the store of a model give the tensors of every expert, if its files stack them."""
    if model_type not in STACKED:
        return
    path, (gate, up, down) = expert_layers(model_type)
    parts: dict[str, dict[str, slice]] = {}
    for last, suffix in (("", "weight"), ("_bias", "bias")):
        # a gate's column stands beside that of its up
        parts[f"gate_up_proj{last}"] = {f"{gate}.{suffix}": slice(0, None, 2), f"{up}.{suffix}": slice(1, None, 2)}
        parts[f"down_proj{last}"] = {f"{down}.{suffix}": slice(None)}
    for name in store.names():
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(path) and last in parts:
            experts = range(store.shape(name)[0])
            new = {f"{prefix}.{e}.{part}": Slice(e, columns) for e in experts for part, columns in parts[last].items()}
            store.split(name, new)


def _rename(layer: nn.Module, old: str, new: str) -> None:
    """Call a child of a layer otherwise; the layer's own code finds it under its old name too, not as a child."""
    if old != new:
        child = layer._modules.pop(old)
        layer.add_module(new, child)
        layer.__dict__[old] = child
