"""One decoder layer of the 16-bit model in memory: run it, observe its inputs, install quantized weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bq_kernels.format import QuantConfig
from bq_kernels.reference import angles_of, dense_weight
from torch import nn

from .architecture import InputGroup
from .errors import UserError
from .input_statistics import InputStatistics
from .on_demand import LinearOnDemand

TOKENS_PER_BATCH = 4096


class _InputReached(Exception):
    """Stops a forward pass once the wanted input has been seen."""


@contextlib.contextmanager
def _stop_at(module: nn.Module) -> Iterator[list[tuple]]:
    """Let every pass end where it reaches a module, and keep the arguments that the module would get."""
    seen: list[tuple] = []

    def stop(_, args):
        seen.append(args)
        raise _InputReached

    hook = module.register_forward_pre_hook(stop)
    try:
        yield seen
    finally:
        hook.remove()


@dataclass(frozen=True)
class Routed:
    """What the experts of a layer read.

    Attributes:
        x: inputs, [tokens, hidden].
        numbers: int64 [tokens, k], the experts of every token.
    """

    x: torch.Tensor
    numbers: torch.Tensor

    def rows(self, expert: int) -> torch.Tensor:
        """Inputs of one expert."""
        return self.x[(self.numbers == expert).any(-1)]


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

    def weights(self, group: InputGroup | None = None) -> int:
        """Number of weights of the linear layers of one group, or of all."""
        return sum(layer.in_features * layer.out_features for layer in self.linears(group).values())

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
            make = functools.partial(dense_weight, *packed, angles, block_size, layer.in_features)
            if isinstance(layer, LinearOnDemand):
                layer.make = make
            else:
                self.set_weight(name, make())
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
        with _stop_at(self.linear(group.layers[0])) as seen:
            for part in self._batches(hidden):
                with contextlib.suppress(_InputReached):
                    self.forward(part)
                yield seen.pop()[0]

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
        self.check_inputs(statistics, group)
        return statistics

    @torch.no_grad()
    def routed(self, hidden: torch.Tensor, group: InputGroup) -> Routed:
        """Inputs of the experts to which a group belongs, and which expert gets which.

        Args:
            hidden: as for `capture`.
            group: of layers of experts.
        """
        found = []
        with _stop_at(self.module.get_submodule(group.layers[0].rsplit(".", 2)[0])) as seen:
            for part in self._batches(hidden):
                with contextlib.suppress(_InputReached):
                    self.forward(part)
                found.append(seen.pop()[:2])
        return Routed(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def capture_expert(self, routed: Routed, part: InputGroup) -> InputStatistics:
        """Statistics of the inputs of one expert's layers, of the tokens that are routed to it, in this process.

        Args:
            routed: inputs of all experts.
            part: the layers, one of `InputGroup.parts`.
        """
        name = part.layers[0].rsplit(".", 1)[0]
        expert, statistics = self.module.get_submodule(name), InputStatistics(self.in_features(part), routed.x.device)
        with _stop_at(self.linear(part.layers[0])) as seen:
            for rows in routed.rows(int(name.rsplit(".", 1)[1])).split(TOKENS_PER_BATCH):
                with contextlib.suppress(_InputReached):
                    expert(rows)
                statistics.add(seen.pop()[0])
        return statistics

    def check_inputs(self, statistics: InputStatistics, group: InputGroup) -> None:
        """Refuse inputs of a group that hold NaN or infinity.

        Raises:
            UserError: naming block and group.
        """
        if not bool(torch.isfinite(statistics.mean_abs).all()):
            raise UserError(f"block {self.index}, {group.name}: the inputs hold NaN or infinity; is the model sound?")


@dataclass(frozen=True)
class Original:
    """A block of the 16-bit model and the hidden states that this model sends into it, [samples, seqlen, hidden]."""

    block: Block
    hidden: torch.Tensor
