"""Mixed bits: which layers deserve more, by the nats per token that the model loses when a layer is rounded.

To second order KL(16-bit ‖ quantized) is ½ E[(g·δ)²], δ the error of a layer's output and g the gradient of the loss at
tokens drawn from the model itself (the Fisher information). With outputs taken as independent that is
½ Σᵢ E[gᵢ²] (E H Eᵀ)ᵢᵢ, E the error of the weight and H the mean of x xᵀ. One pass forward and one back, a decoder layer
in memory at a time, give g and H of every linear layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from bq_kernels.format import BITS, QuantConfig
from bq_kernels.reference import hadamard_angles
from rich.progress import Progress

from .architecture import InputGroup
from .block import Block
from .errors import UserError
from .model import SourceModel
from .preflight import bits_per_weight
from .quantize_block import rotated, round_weight
from .recipes import SENSITIVITY_SAMPLES, Recipe
from .rotation import MOST_ROWS
from .sampling import spread_rows

_ROWS = 256  # tokens whose logits are in memory at a time
Losses = dict[tuple[int, InputGroup], dict[int, float]]
# (rows of a weight [rows, K], hessian [K, K], group, bits) -> rounded rows minus rows, and the Hessian in their basis
RoundingError = Callable[[torch.Tensor, torch.Tensor, InputGroup, int], tuple[torch.Tensor, torch.Tensor]]


def mixed_bits(
    source: SourceModel, config: QuantConfig, recipe: Recipe, tokens: torch.Tensor, progress: Progress
) -> dict[str, int]:
    """Bits of the layers that get more than the recipe's, by full name, so that `target_bpw` is spent.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format without mixed bits.
        recipe: settings of the run; layers are rounded as it says, behind a Hadamard where it rotates.
        tokens: int64 [samples, seqlen].

    Raises:
        UserError: if the budget does not suffice for the recipe's own bits.
    """
    block = source.empty_block(0)
    weights = {group: block.weights(group) for group in block.groups}
    least = bits_per_weight(source, config)
    if recipe.target_bpw < least:
        raise UserError(f"--target-bpw {recipe.target_bpw}: {config.bits} bits alone, all counted, take {least:.3f}")
    budget = (recipe.target_bpw - least) * sum(weights.values()) * source.num_blocks

    def rounding_error(rows, hessian, group, bits):
        angles, block_size = None, config.rotation.block(group.layers[0])
        if config.rotation.kind != "none":
            angles = hadamard_angles(rows.shape[1], block_size, source.device)
        rows, hessian = rotated(rows, hessian, angles, block_size)
        return round_weight(rows, hessian, bits, config, recipe).weight() - rows, hessian

    losses = sensitivities(source, tokens, rounding_error, recipe.seed, progress)
    given = allocate(losses, weights, config.bits, budget)
    return {
        source.block_prefix(index) + name: bits
        for (index, group), bits in sorted(given.items(), key=lambda item: item[0][0])
        for name in group.layers
    }


def sensitivities(
    source: SourceModel, tokens: torch.Tensor, rounding_error: RoundingError, seed: int, progress: Progress
) -> Losses:
    """Expected loss by every group of layers that share an input, at 2, 3 and 4 bits.

    Args:
        source: the 16-bit model.
        tokens: int64 [samples, seqlen]; the first SENSITIVITY_SAMPLES are used.
        rounding_error: for rows of a weight, Hessian, group of layers and bits: the error of the rows [rows, K] and the
            Hessian in the basis of that error.
        seed: of the tokens that are drawn.

    Returns:
        nats per token, by (index of the block, group) and bits.
    """
    hidden = source.embed(tokens[:SENSITIVITY_SAMPLES])
    entering = []
    task = progress.add_task("sensitivity of the layers", total=2 * source.num_blocks)
    for index in range(source.num_blocks):
        entering.append(hidden.clone())
        with source.block(index) as block:
            block.run(hidden, out=hidden)
        progress.advance(task)
    gradient = _fisher_gradient(source, hidden, seed)
    losses: Losses = {}
    for index in reversed(range(source.num_blocks)):
        with source.block(index) as block:
            with block.observe() as statistics, _observe_gradients(block) as squares:
                for x, g in zip(entering.pop().split(1), gradient.split(1), strict=True):
                    x.requires_grad_()
                    with torch.enable_grad():
                        output = block.forward(x)
                    g.copy_(torch.autograd.grad(output, x, g)[0])
            for group, seen in statistics.items():
                rows = spread_rows(block.weight(group), MOST_ROWS)
                fisher = spread_rows(torch.cat(squares[group]) / seen.tokens, MOST_ROWS)
                losses[index, group] = {}
                for bits in BITS:
                    error, hessian = rounding_error(rows, seen.hessian, group, bits)
                    mean = (fisher * ((error @ hessian) * error).sum(1)).mean()
                    outputs = sum(layer.out_features for layer in block.linears(group).values())
                    losses[index, group][bits] = float(0.5 * mean * outputs)
        progress.advance(task)
    progress.remove_task(task)
    return losses


def _fisher_gradient(source: SourceModel, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """Gradient at the last block's output of the loss at tokens drawn from the model's own prediction."""
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


@contextlib.contextmanager
def _observe_gradients(block: Block) -> Iterator[dict[InputGroup, list[torch.Tensor]]]:
    """Collect Σ g² over tokens at the outputs of every group's layers, [out_features] each, from passes inside."""
    squares: dict[InputGroup, list[torch.Tensor]] = {}
    hooks = []
    for group in block.groups:
        squares[group] = []
        for layer in block.linears(group).values():
            total = torch.zeros(layer.out_features, device=layer.weight.device)

            def see_gradient(gradient, total=total):
                total.add_(gradient.float().flatten(0, -2).square().sum(0))

            squares[group].append(total)
            hooks.append(layer.register_forward_hook(lambda _l, _x, y, see=see_gradient: y.register_hook(see) and None))
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


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
        steps = []  # one more bit for one group: (loss saved per bit stored, bits stored, group)
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
