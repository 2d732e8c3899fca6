"""One decoder layer of the 16-bit model in memory: run it, observe its inputs, install quantized weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bq_kernels.format import QuantConfig
from bq_kernels.reference import angles_of, dense_weight
from torch import nn

from . import parallel
from .architecture import InputGroup
from .errors import UserError
from .sampling import spread_rows

TOKENS_PER_BATCH = 4096
SAMPLE_TOKENS = 1024  # inputs kept for statistics and for the uniformity term
_SAMPLE_PER_BATCH = 64
_PANEL = 512  # rows of a symmetric product that are computed at once


class _InputReached(Exception):
    """Stops a forward pass once the wanted input has been seen."""


class InputStatistics:
    """Running sums over the inputs x of the layers of one group.

    Args:
        features: K, features of x.
        device: where the sums are kept.
    """

    def __init__(self, features: int, device: torch.device):
        self.tokens = 0
        self._outer = torch.zeros(features, features, device=device)
        self._magnitude = torch.zeros(features, device=device)
        self._drift: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, x16: torch.Tensor | None = None) -> None:
        """Count inputs x [..., K] in, and perhaps the 16-bit model's inputs x16 at the same tokens."""
        x = x.detach().flatten(0, -2).float()
        for start in range(0, x.shape[1], _PANEL):  # the lower triangle; the rest mirrors it
            stop = min(start + _PANEL, x.shape[1])
            self._outer[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        if x16 is not None:
            error = x16.detach().flatten(0, -2).float() - x
            self._drift = torch.zeros_like(self._outer) if self._drift is None else self._drift
            self._drift.addmm_(error.T, x)
        self._magnitude += x.abs().sum(0)
        self._rows.append(spread_rows(x, _SAMPLE_PER_BATCH).clone())
        self.tokens += len(x)

    def add_up(self) -> None:
        """Take the sums over all processes; the sample stays this one's."""
        tokens = torch.tensor(self.tokens, device=self._outer.device)
        sums = tokens, self._outer, self._magnitude, self._drift
        parallel.add_up(value for value in sums if value is not None)
        self.tokens = tokens.item()

    @classmethod
    def together(cls, statistics: list[InputStatistics]) -> InputStatistics:
        """Those of all inputs that several of them have seen."""
        whole = cls(len(statistics[0]._magnitude), statistics[0]._outer.device)
        for each in statistics:
            whole.tokens += each.tokens
            whole._outer += each._outer
            whole._magnitude += each._magnitude
            whole._rows += each._rows
        return whole

    def topped_up(self, hessian: torch.Tensor, tokens: float) -> torch.Tensor:
        """The Hessian as if so many more tokens had been seen whose Hessian is `hessian` [K, K]."""
        lower = self._outer.tril().add_(hessian.tril(), alpha=tokens).div_(self.tokens + tokens)
        return lower.add_(lower.tril(-1).T)

    @property
    def hessian(self) -> torch.Tensor:
        """Mean of x xᵀ over tokens, float32 [K, K]: the Hessian of the layer's squared output error, up to a factor."""
        lower = self._outer.tril().div_(self.tokens)
        return lower.add_(lower.tril(-1).T)

    @property
    def drift(self) -> torch.Tensor | None:
        """Mean of (x16 − x) xᵀ, float32 [K, K]: the inputs' error from earlier layers, as far as x tells it."""
        return None if self._drift is None else self._drift / self.tokens

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean of |x| over tokens, float32 [K]."""
        return self._magnitude / self.tokens

    @property
    def sample(self) -> torch.Tensor:
        """At most SAMPLE_TOKENS of the inputs, float32 [tokens, K]."""
        return spread_rows(torch.cat(self._rows), SAMPLE_TOKENS).clone()


@dataclass(frozen=True)
class Block:
    """A decoder layer.

    Attributes:
        index: its place in the model.
        prefix: what the names of its tensors begin with, `model.layers.3.`.
        module: the layer itself.
        groups: its linear layers by the input that they share, in the order in which the layer computes them.
        kwargs: further arguments of its forward pass (positions, masks), good for any batch of one sequence length.
    """

    index: int
    prefix: str
    module: nn.Module
    groups: tuple[InputGroup, ...]
    kwargs: dict[str, Any]

    def clone(self) -> Block:
        """The block with a module of its own."""
        return dataclasses.replace(self, module=copy.deepcopy(self.module))

    # ---- its linear layers

    def linear(self, name: str) -> nn.Linear:
        """The linear layer of that name inside the block.

        Raises:
            UserError: if the block has no such layer, or it is not a linear one.
        """
        try:
            layer = self.module.get_submodule(name)
        except AttributeError as error:
            raise UserError(f"{type(self.module).__name__}: there is no layer {name} inside") from error
        if not isinstance(layer, nn.Linear):
            raise UserError(f"{type(self.module).__name__}: {name} is a {type(layer).__name__}, not a linear layer")
        return layer

    def linears(self, group: InputGroup | None = None) -> dict[str, nn.Linear]:
        """Linear layers by name; of one group, or of all."""
        groups = self.groups if group is None else (group,)
        return {name: self.linear(name) for each in groups for name in each.layers}

    def weights(self) -> int:
        """Number of weights of its linear layers."""
        return sum(layer.in_features * layer.out_features for layer in self.linears().values())

    def other_linears(self) -> tuple[str, ...]:
        """Names of modules with a matrix that belong to no group: routers, which stay unquantized."""
        packed = self.linears()
        matrices = (name.removesuffix(".weight") for name, p in self.module.named_parameters() if p.dim() == 2)
        return tuple(name for name in matrices if name not in packed)

    def in_features(self, group: InputGroup) -> int:
        """Features of the input that a group shares."""
        return self.linear(group.layers[0]).in_features

    def weight(self, group: InputGroup) -> torch.Tensor:
        """The weights of a group stacked, float32 [N, K]."""
        return torch.cat([layer.weight.detach() for layer in self.linears(group).values()]).float()

    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Put a dense weight [N, K] in place of a linear layer's, in that one's dtype and on its device."""
        layer = self.linear(name)
        layer.weight = nn.Parameter(weight.to(layer.weight).contiguous(), requires_grad=False)

    def install(
        self, tensors: dict[str, torch.Tensor], config: QuantConfig, groups: Iterable[InputGroup] | None = None
    ) -> None:
        """Put the dense equivalent of stored tensors in place of the 16-bit weights: what serving will compute.

        Args:
            tensors: of the checkpoint, by full name; trained norms may be among them.
            config: the checkpoint's format.
            groups: whose layers to install; all by default.
        """
        rotation = config.rotation
        for name, layer in [item for group in groups or self.groups for item in self.linears(group).items()]:
            stored, block_size = self.prefix + name + ".", rotation.block(name)
            angles = angles_of(rotation.kind, tensors.get(stored + "angles"), layer.in_features, block_size)
            packed = tensors[stored + "qweight"], tensors[stored + "scales"], tensors.get(stored + "zeros")
            self.set_weight(name, dense_weight(*packed, angles, block_size, layer.in_features))
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                norm = self.module.get_submodule(name.removeprefix(self.prefix).removesuffix(".weight"))
                norm.weight = nn.Parameter(tensor.to(norm.weight), requires_grad=False)

    # ---- running it

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states behind the block for those in front of it, [samples, seqlen, hidden]; differentiable."""
        output = self.module(hidden, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output  # some architectures return a tuple

    def _batches(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return hidden.split(max(1, TOKENS_PER_BATCH // hidden.shape[1])) if len(hidden) else ()

    @torch.no_grad()
    def run(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states of all samples behind the block, batch by batch and without gradients.

        Args:
            hidden: [samples, seqlen, hidden].
            out: where to write them; `hidden` itself runs in place. A new tensor by default.
        """
        out = torch.empty_like(hidden) if out is None else out
        for before, after in zip(self._batches(hidden), self._batches(out), strict=True):
            after.copy_(self.forward(before))
        return out

    # ---- observing its inputs

    @contextlib.contextmanager
    def observe(self, groups: Iterable[InputGroup] | None = None) -> Iterator[dict[InputGroup, InputStatistics]]:
        """Collect statistics of the inputs of some groups, of all by default, from every pass inside the context."""
        found, hooks = {}, []
        for group in groups or self.groups:
            layer = self.linear(group.layers[0])
            found[group] = InputStatistics(layer.in_features, layer.weight.device)
            hooks.append(layer.register_forward_pre_hook(lambda _, args, seen=found[group]: seen.add(args[0])))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def inputs(self, hidden: torch.Tensor, group: InputGroup) -> Iterator[torch.Tensor]:
        """One group's inputs [samples, seqlen, K], batch by batch of `hidden` [samples, seqlen, hidden].

        Each pass ends where it reaches them.
        """
        seen = []

        def stop(_, args):
            seen.append(args[0])
            raise _InputReached

        hook = self.linear(group.layers[0]).register_forward_pre_hook(stop)
        try:
            for part in self._batches(hidden):
                with contextlib.suppress(_InputReached):
                    self.forward(part)
                yield seen.pop()
        finally:
            hook.remove()

    @torch.no_grad()
    def capture(self, hidden: torch.Tensor, group: InputGroup, original: Original | None = None) -> InputStatistics:
        """Statistics of one group's inputs, in all processes.

        Args:
            hidden: hidden states in front of the block, this process's [samples, seqlen, hidden].
            group: whose inputs to observe.
            original: the same in the 16-bit model, for `InputStatistics.drift`.

        Raises:
            UserError: if the inputs hold NaN or infinity.
        """
        statistics = InputStatistics(self.in_features(group), hidden.device)
        if original is None:
            for x in self.inputs(hidden, group):
                statistics.add(x)
        else:
            wanted = original.block.inputs(original.hidden, group)
            for x, x16 in zip(self.inputs(hidden, group), wanted, strict=True):
                statistics.add(x, x16)
        statistics.add_up()
        self._check(statistics, group)
        return statistics

    @torch.no_grad()
    def capture_experts(self, hidden: torch.Tensor, group: InputGroup) -> list[InputStatistics]:
        """Statistics of the inputs of every expert, of the tokens that are routed to it, in all processes.

        Args:
            hidden: as for `capture`.
            group: of layers of experts.

        Raises:
            UserError: as for `capture`.
        """
        with self.observe(group.parts()) as found:
            for part in self._batches(hidden):
                self.forward(part)
        for statistics in found.values():
            statistics.add_up()
        self._check(InputStatistics.together(list(found.values())), group)
        return list(found.values())

    def _check(self, statistics: InputStatistics, group: InputGroup) -> None:
        if not bool(torch.isfinite(statistics.mean_abs).all()):
            raise UserError(f"block {self.index}, {group.name}: the inputs hold NaN or infinity; is the model sound?")


@dataclass(frozen=True)
class Original:
    """A block of the 16-bit model and the hidden states that this model sends into it, [samples, seqlen, hidden]."""

    block: Block
    hidden: torch.Tensor
