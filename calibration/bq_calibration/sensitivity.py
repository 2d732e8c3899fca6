"""Which layers deserve more bits: what the model loses, in nats a token, by a layer's rounding to 2, 3 or 4 bits.

To second order KL(16-bit ‖ quantized) is ½ E[(g·δ)²], δ the error of a layer's output and g the gradient of the loss at
tokens drawn from the model itself (the Fisher information). With outputs taken as independent that is
½ Σᵢ E[gᵢ²] (E H Eᵀ)ᵢᵢ, E the error of the weight and H the mean of x xᵀ. One pass forward and one back, a decoder block
in memory at a time, give g and H of every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from bq_kernels.format import BITS
from rich.progress import Progress
from torch import nn

from .architecture import InputGroup
from .model import SourceModel, block_output

SAMPLES = 8  # sequences that are looked at
_ROWS = 256  # tokens whose logits are in memory at a time
Losses = dict[tuple[int, InputGroup], dict[int, float]]
# (weight [N, K], hessian [K, K], group, bits) -> rounded weight minus weight, in a basis where hessian holds too
RoundingError = Callable[[torch.Tensor, torch.Tensor, InputGroup, int], tuple[torch.Tensor, torch.Tensor]]


def sensitivities(
    source: SourceModel, tokens: torch.Tensor, rounding_error: RoundingError, seed: int, progress: Progress
) -> Losses:
    """Expected loss by every group of layers that share an input, at 2, 3 and 4 bits.

    Args:
        source: the 16-bit model.
        tokens: int64 [samples, seqlen]; the first SAMPLES are used.
        rounding_error: for weight, Hessian, group of layers and bits: the error of the weight [rows, K] and the Hessian
            in the basis of that error; rows may be a spread of the weight's.
        seed: of the tokens that are drawn.

    Returns:
        nats a token, by (index of the block, group) and bits.
    """
    hidden, arguments = source.embed(tokens[:SAMPLES])
    entering = []
    task = progress.add_task("sensitivity of the layers", total=2 * source.num_blocks)
    for index in range(source.num_blocks):
        entering.append(hidden.clone())
        with source.block(index) as block, torch.no_grad():
            for row in hidden.split(1):
                row.copy_(block_output(block, row, arguments[index]))
        progress.advance(task)
    gradient = _fisher_gradient(source, hidden, seed)
    losses: Losses = {}
    for index in reversed(range(source.num_blocks)):
        with source.block(index) as block:
            statistics = {group: _Statistics(source, block, group) for group in source.groups}
            for x, g in zip(entering.pop().split(1), gradient.split(1), strict=True):
                x.requires_grad_()
                with torch.enable_grad():
                    output = block_output(block, x, arguments[index])
                g.copy_(torch.autograd.grad(output, x, g)[0])
            for group, found in statistics.items():
                losses[index, group] = found.losses(rounding_error)
        progress.advance(task)
    progress.remove_task(task)
    return losses


def _fisher_gradient(source: SourceModel, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """Gradient, at what leaves the last block, of the loss at tokens drawn from the model's own prediction."""
    generator = torch.Generator(hidden.device).manual_seed(seed)
    gradients = []
    with source.final_norm() as norm, source.head() as head:
        for rows in hidden.flatten(0, 1).split(_ROWS):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad():
                logits = head(norm(rows)).float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, drawn, reduction="sum")
            gradients.append(torch.autograd.grad(loss, rows)[0])
    return torch.cat(gradients).view(hidden.shape)


class _Statistics:
    """Collects H at the input of a group of layers and E[g²] at their outputs, through hooks."""

    def __init__(self, source: SourceModel, block: nn.Module, group: InputGroup):
        self.group = group
        self.layers = [source.linear(block, name) for name in group.layers]
        width = self.layers[0].in_features
        self.hessian = torch.zeros(width, width, device=source.device)
        self.squares = [torch.zeros(layer.out_features, device=source.device) for layer in self.layers]
        self.tokens = 0
        self.hooks = [self.layers[0].register_forward_pre_hook(self._see_input)]
        for layer, squares in zip(self.layers, self.squares, strict=True):
            self.hooks.append(layer.register_forward_hook(self._gradient_hook(squares)))

    def _see_input(self, _layer, args):
        x = args[0].detach().flatten(0, -2).float()
        self.hessian.addmm_(x.T, x)
        self.tokens += len(x)

    @staticmethod
    def _gradient_hook(squares: torch.Tensor):
        def see_gradient(gradient):
            squares.add_(gradient.float().flatten(0, -2).square().sum(0))

        def see_output(_layer, _args, output):
            output.register_hook(see_gradient)

        return see_output

    def losses(self, rounding_error: RoundingError) -> dict[int, float]:
        for hook in self.hooks:
            hook.remove()
        weight = torch.cat([layer.weight.detach() for layer in self.layers]).float()
        squares = torch.cat(self.squares) / self.tokens
        found = {}
        for bits in BITS:
            error, hessian = rounding_error(weight, self.hessian / self.tokens, self.group, bits)
            step = max(1, len(weight) // len(error))
            rows = squares[::step][: len(error)]
            energy = ((error @ hessian) * error).sum(1)
            found[bits] = float(0.5 * (rows * energy).mean() * len(weight))
        return found


def allocate(
    losses: Losses, weights: dict[InputGroup, int], bits: int, budget: float
) -> dict[tuple[int, InputGroup], int]:
    """Spend a budget of bits where a bit saves most.

    Args:
        losses: from `sensitivities`.
        weights: number of weights of every group of layers.
        bits: that every layer has to begin with.
        budget: bits to spend on codes beyond that, all layers together.

    Returns:
        bits by (index of the block, group), for those that get more than they began with.
    """
    given: dict[tuple[int, InputGroup], int] = {}
    while True:
        steps = []  # a bit more for one group: (loss saved by a bit stored, bits stored, group)
        for key, loss in losses.items():
            now = given.get(key, bits)
            cost = weights[key[1]]
            if now + 1 in BITS and cost <= budget:
                steps.append(((loss[now] - loss[now + 1]) / cost, cost, key))
        if not steps:
            return given
        _, cost, key = max(steps, key=lambda step: step[0])
        given[key] = given.get(key, bits) + 1
        budget -= cost
