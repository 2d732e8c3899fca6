"""SpinQuant (arXiv 2405.16406): learned rotations of the residual stream and of heads, then GPTQ.

python -m benchmarks.baselines.spinquant MODEL -o OUT --tokens tokens.safetensors [--bits 2] [--steps 0]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from bq_calibration.architecture import InputGroup
from bq_calibration.block import Block
from bq_calibration.files import write_tensors
from bq_calibration.model import SourceModel
from bq_calibration.quantize import round_gptq, search_scale
from bq_kernels.format import midrise_zero
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from benchmarks.baselines.cayley import cayley_step, cosine_rate
from benchmarks.baselines.levels import MIDRISE, Levels, straight_through_round
from benchmarks.baselines.stream import PRECEDING, TOKENS_PER_STEP, QuantizeBlock, Run, training_autocast
from benchmarks.baselines.third_party.packages import Bits, GroupSize, Model, Out, Tokens

CAYLEY_RATE = 1.5  # as published

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def hadamard(n: int) -> torch.Tensor:
    """An orthogonal matrix with entries of nearly one size, float32 [n, n].

    The Hadamard matrix of the largest power of two in n, times (Kronecker) a Hartley matrix of odd size, whose entries
    are at most √2 larger than the mean.
    """
    odd = n // (n & -n)
    phase = 2 * math.pi / odd * torch.outer(torch.arange(odd), torch.arange(odd))
    matrix = (phase.cos() + phase.sin()) / math.sqrt(odd)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix) / math.sqrt(2)
    return matrix


def rotate_rows(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate every row, in blocks as wide as the rotation: [..., n] by [b, b], b dividing n."""
    return (x.unflatten(-1, (-1, len(rotation))) @ rotation.T).flatten(-2)


class Basis(nn.Module):
    """The basis in which a weight is quantized: W′ = L W Rᵀ.

    Args:
        inner: R of the input, float32 [b, b] with b dividing K.
        outer: L of the output, or None.
        unit: step of the best mid-rise quantizer of a group of unit Gaussians, for learning.
        levels: to round to.
    """

    def __init__(self, inner: torch.Tensor, outer: torch.Tensor | None, unit: float, levels: Levels):
        super().__init__()
        self.inner, self.outer = inner, outer
        self.unit, self.levels = unit, levels

    def rotate(self, w: torch.Tensor) -> torch.Tensor:
        """W′ of float32 [N, K]."""
        w = rotate_rows(w, self.inner)
        return w if self.outer is None else rotate_rows(w.T, self.outer).T

    def inverse(self, w: torch.Tensor) -> torch.Tensor:
        """W of W′, float32 [N, K]."""
        w = rotate_rows(w, self.inner.T)
        return w if self.outer is None else rotate_rows(w.T, self.outer.T).T

    def rotate_hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        """Mean of x′ x′ᵀ for the rotated inputs, float32 [K, K]."""
        return rotate_rows(rotate_rows(hessian, self.inner).T, self.inner)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """The weight that a quantized layer computes with; gradients pass the rounding."""
        middle = midrise_zero(self.levels.bits)
        grouped = self.levels.grouped(self.rotate(w).float())
        step = self.unit * grouped.square().mean(-1, keepdim=True).clamp(min=1e-20).sqrt()
        level = grouped / step
        rounded = straight_through_round(level.clamp(-middle, middle) + middle) - middle
        return self.inverse((step * rounded).flatten(1))


def _input_groups(source: SourceModel, layer: nn.Module) -> Iterator[tuple[InputGroup, dict[str, nn.Linear]]]:
    """Linear layers of a decoder layer of any model of this architecture, by the input that they share."""
    for group in source.groups[0]:
        yield group, {name: layer.get_submodule(name) for name in group.layers}


@torch.no_grad()
def fold_norms(source: SourceModel, layer: nn.Module) -> None:
    """Move the weights of a decoder layer's norms into the linear layers behind them: rotations then pass the norms."""
    for group, linears in _input_groups(source, layer):
        norm = layer.get_submodule(PRECEDING[group.layers[0]])
        if not isinstance(norm, nn.Linear):
            for linear in linears.values():
                linear.weight.mul_(norm.weight)
            norm.weight.fill_(1)


class Rotations:
    """SpinQuant's rotations: R₁ of the residual stream, R₂ of every block's heads, and the fixed R₄ before down_proj.

    All but R₄ are folded into weights; R₄ is a Hadamard transform at run time. Nothing is stored for them.

    Args:
        source: the 16-bit model.
        levels: to round to.
        seed: of the signs of R₁.
    """

    def __init__(self, source: SourceModel, levels: Levels, seed: int = 0):
        config = source.config
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (config.hidden_size,), generator=generator) * 2.0 - 1
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.learned = {"residual": hadamard(config.hidden_size) * signs}
        self.learned |= {f"heads.{index}": hadamard(head) for index in range(source.num_blocks)}
        self.learned = {name: matrix.to(source.device) for name, matrix in self.learned.items()}
        self.down = hadamard(config.intermediate_size).to(source.device)
        gaussian = torch.randn(4096, 1, levels.group_size, generator=generator)
        self.unit, self.levels = float(search_scale(gaussian, levels.bits, MIDRISE)[0].float().mean()), levels

    def basis(self, index: int, name: str) -> Basis:
        """The basis of layer `name` of block `index`."""
        residual, heads = self.learned["residual"], self.learned[f"heads.{index}"]
        inner, outer = {
            "v_proj": (residual, heads),
            "o_proj": (heads, residual),
            "down_proj": (self.down, residual),
        }.get(name.rsplit(".", 1)[-1], (residual, None))
        return Basis(inner, outer, self.unit, self.levels)

    def learn(self, source: SourceModel, tokens: torch.Tensor, steps: int) -> list[float]:
        """Cayley SGD on the next-token loss of the model with rounded weights, whole and in float32.

        SpinQuant learns with rounded activations and 16-bit weights; with activations that stay at 16 bits the weights
        have to be rounded, and are, to the nearest level.

        Args:
            source: the 16-bit model.
            tokens: int64 [samples, seqlen].
            steps: of TOKENS_PER_STEP tokens.

        Returns:
            the loss at every step.
        """
        model = self._rounded_model(source)
        for rotation in self.learned.values():
            rotation.requires_grad_(True)
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(steps):
            rows = torch.randperm(len(tokens), generator=generator)[: max(1, TOKENS_PER_STEP // tokens.shape[1])]
            batch = tokens[rows].to(source.device)
            with training_autocast(source):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            for rotation in self.learned.values():
                cayley_step(rotation, cosine_rate(CAYLEY_RATE, step, steps))
            losses.append(loss.item())
            print(f"rotations, step {step + 1} of {steps}: loss {losses[-1]:.4f}", flush=True)
        for rotation in self.learned.values():
            rotation.requires_grad_(False)
        return losses

    def _rounded_model(self, source: SourceModel) -> nn.Module:
        """The whole model in float32, its linear layers rounded in their bases at every pass."""
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).to(source.device)
        model.requires_grad_(False)
        for index, layer in enumerate(model.model.layers):
            fold_norms(source, layer)
            for _, linears in _input_groups(source, layer):
                for name, linear in linears.items():
                    parametrize.register_parametrization(linear, "weight", self.basis(index, name), unsafe=True)
        return model


def quantize_block(block: Block, hidden: torch.Tensor, source: SourceModel, rotations: Rotations) -> None:
    """GPTQ of one decoder block in the bases that its rotations make, and back to the model's own.

    Args:
        block: left quantized.
        hidden: its inputs, [samples, seqlen, hidden].
        source: the model that it is of.
        rotations: learned or fixed.
    """
    fold_norms(source, block.module)
    levels = rotations.levels
    for group in block.groups:
        hessian = block.capture(hidden, group).hessian
        for name, layer in block.linears(group).items():
            basis = rotations.basis(block.index, name)
            weight, rotated_hessian = basis.rotate(layer.weight.float()), basis.rotate_hessian(hessian)
            quantized = round_gptq(weight, rotated_hessian, levels.bits, levels.group_size, MIDRISE)
            block.set_weight(name, basis.inverse(quantized.weight()))


@app.command(help=__doc__)
def main(
    model: Model,
    out: Out,
    tokens: Tokens,
    bits: Bits = 2,
    group_size: GroupSize = 64,
    steps: Annotated[int, typer.Option(help="Steps of learning; 0 is QuaRot, a random Hadamard matrix.")] = 100,
) -> None:
    """Quantize a model in SpinQuant's bases and write it."""
    levels = Levels(bits, group_size)

    def prepare(source: SourceModel, train_tokens: torch.Tensor, staging: Path) -> QuantizeBlock:
        rotations, saved = Rotations(source, levels), staging / "rotations" / "learned.safetensors"
        if steps and not saved.exists():
            saved.parent.mkdir(exist_ok=True)
            losses = rotations.learn(source, train_tokens, steps)
            write_tensors(saved, rotations.learned | {"losses": torch.tensor(losses)})
        if steps:
            rotations.learned = load_file(saved, str(source.device))
        return lambda block, hidden, _: quantize_block(block, hidden, source, rotations)

    Run("SpinQuant", model, out, tokens, levels, end_to_end=bool(steps)).run(prepare)


if __name__ == "__main__":
    app()
