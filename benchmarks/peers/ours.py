"""Peers of the accuracy table that are written here: AWQ, OmniQuant's learned clipping, SpinQuant's learned rotation.

    python benchmarks/peers/ours.py tokens MODEL -o tokens.safetensors [--dataset c4] [--samples 128] [--seqlen 512]
    python benchmarks/peers/ours.py awq MODEL -o OUT --tokens tokens.safetensors [--bits 2] [--levels minmax]

OUT is an ordinary dense checkpoint, fake-quantized in float32 and stored in the dtype of MODEL, one shard a decoder
block, with `peer.json` beside it. `OUT.partial` holds the finished blocks of an interrupted run, which goes on there.
Every block sees inputs from the blocks quantized before it.

Levels are `midrise`, s·(q − (2^bits − 1)/2) with searched scales as everywhere in this project, or the published
`minmax`: a range of weights and an integer zero point.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from bq_calibration.checkpoint import write_json, write_tensors
from bq_calibration.data import calibration_tokens
from bq_calibration.errors import UserError
from bq_calibration.model import SourceModel, block_output
from bq_calibration.quantize import Quantized, output_error, round_gptq, search_scale
from bq_calibration.train import batch_of
from packages import Bits, GroupSize, Model, Out, Tokens, write_facts
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # separate projections, norms that multiply and nothing else
# what makes the input of a group of layers, by the first of them: a norm, or a layer whose rows can be rescaled
PRECEDING = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
TOKENS_A_STEP = 2048
RATIOS = [n / 20 for n in range(20)]  # AWQ's grid of exponents
SHARES = [1 - n / 20 for n in range(10)]  # and of clipping
CLIPPING_RATE = 1e-2  # OmniQuant's for clipping
CAYLEY_RATE = 1.5  # SpinQuant's

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Levels = Annotated[str, typer.Option(help="midrise (searched scales) or minmax (as published).")]


# ---- one block after the other


@torch.no_grad()
def forward(block: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Outputs of a decoder block, [samples, seqlen, hidden] to the same."""
    parts = hidden.split(max(1, TOKENS_A_STEP // hidden.shape[1]))
    return torch.cat([block_output(block, part, arguments) for part in parts])


def capture(
    block: nn.Module, names: list[str], hidden: torch.Tensor, arguments: dict[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of the inputs x of some layers: the mean of x xᵀ over tokens, float32 [K, K], and the mean of |x|, [K]."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name, _module, args):
        x = args[0].flatten(0, -2).float()
        hessian, size = found.get(name, (0, 0))
        tokens = hidden.shape[0] * hidden.shape[1]
        found[name] = hessian + x.T @ x / tokens, size + x.abs().sum(0) / tokens

    handles = [block.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names]
    forward(block, hidden, arguments)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def stream(source: SourceModel, tokens: torch.Tensor, folder: Path, quantize: Callable, with_targets: bool) -> None:
    """Quantize the model block by block and write it as a dense checkpoint, a shard a block; finished shards are used.

    Args:
        source: the 16-bit model.
        tokens: int64 [samples, seqlen].
        folder: to write; may hold shards already.
        quantize: called with a block, its index, inputs [samples, seqlen, hidden], further arguments and targets;
            leaves the block quantized.
        with_targets: whether to keep what the 16-bit model gives after each block; else targets are None.
    """
    if source.config.model_type not in FAMILIES:
        raise UserError(f"{source.config.model_type}: this peer knows only {', '.join(FAMILIES)}")
    ignored = shutil.ignore_patterns("*.safetensors*", "*.bin", "*.gguf", "*.pth")
    shutil.copytree(source.folder, folder, ignore=ignored, dirs_exist_ok=True)
    hidden, arguments = source.embed(tokens)
    targets, shards, weight_map = hidden if with_targets else None, source.num_blocks + 1, {}
    for index in range(source.num_blocks):
        shard = folder / f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        prefix = source.block_prefix(index)
        with source.block(index) as block:
            if with_targets:
                targets = forward(block, targets, arguments[index])
            if not shard.exists():
                quantize(block, index, hidden, arguments[index], targets)
                write_tensors(shard, {prefix + name: tensor.cpu() for name, tensor in block.state_dict().items()})
            kept = load_file(shard)
            block.load_state_dict(
                {name.removeprefix(prefix): tensor.to(source.device) for name, tensor in kept.items()}
            )
            hidden = forward(block, hidden, arguments[index])
        weight_map |= dict.fromkeys(kept, shard.name)
        print(f"block {index + 1} of {source.num_blocks}", flush=True)
    rest = {name: source.store.get(name) for name in source.store.names() if name not in weight_map}
    last = folder / f"model-{shards:05d}-of-{shards:05d}.safetensors"
    write_tensors(last, rest)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": weight_map | dict.fromkeys(rest, last.name)},
    )


# ---- levels


def clipped_range(
    w: torch.Tensor, bits: int, low: torch.Tensor | float, high: torch.Tensor | float, levels: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and integer zero point of every group for shares of its range; differentiable in the shares.

    Args:
        w: float32 [N, groups, group].
        bits: bits per code.
        low: share of the smallest weight, [N, groups] or a number; not used by `midrise`.
        high: share of the largest weight, of the largest magnitude with `midrise`.
        levels: `midrise` or `minmax`.

    Returns:
        scales and zeros [N, groups]; zeros None for mid-rise.
    """
    top = 2**bits - 1
    if levels == "midrise":
        return (high * w.abs().amax(-1) * 2 / top).clamp(min=1e-7), None
    least, most = low * w.amin(-1).clamp(max=0), high * w.amax(-1).clamp(min=0)
    scale = ((most - least) / top).clamp(min=1e-7)
    return scale, _round(-least / scale)


def _round(x: torch.Tensor) -> torch.Tensor:
    """Nearest integers; the gradient passes straight through."""
    return x + (x.round() - x).detach()


def _codes(w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    zero = (2**bits - 1) / 2 if zeros is None else zeros.unsqueeze(-1)
    return _round(w / scales.unsqueeze(-1) + zero).clamp(0, 2**bits - 1)


def _nearest(w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> Quantized:
    scales, zeros = scales.half(), None if zeros is None else zeros.half()
    codes = _codes(w, scales.float(), None if zeros is None else zeros.float(), bits)
    return Quantized(codes.flatten(1).to(torch.uint8), scales, zeros, bits)


def _install(layer: nn.Linear, weight: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype).contiguous(), requires_grad=False)


# ---- AWQ


def round_clipped(
    w: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, levels: str, shares: list[float]
) -> Quantized:
    """Round to nearest with the clipping that changes a group's share of the output least; `w` float32 [N, K].

    With `midrise` the search is `search_scale`'s, weighted by the input's size; else it is AWQ's, over `shares`.
    """
    grouped = w.unflatten(1, (-1, group))
    if levels == "midrise":
        return _nearest(grouped, *search_scale(grouped, bits, levels, hessian.diagonal().view(-1, group)), bits)
    groups = grouped.shape[1]
    local = hessian.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, g, g]
    best = w.new_full(grouped.shape[:2], torch.inf)
    scales, zeros = torch.zeros_like(best), torch.zeros_like(best)
    for share in shares:
        scale, zero = clipped_range(grouped, bits, share, share, levels)
        delta = _nearest(grouped, scale, zero, bits).weight().view_as(grouped) - grouped
        error = (torch.einsum("ngk,gkj->ngj", delta, local) * delta).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        zeros = torch.where(better, zero, zeros)
    return _nearest(grouped, scales, zeros, bits)


def awq_block(
    source: SourceModel, bits: int, group: int, levels: str, block: nn.Module, _index, hidden, arguments, _targets
) -> None:
    """AWQ (arXiv 2306.00978) of one decoder block.

    Input channels are scaled by their mean magnitude to a power, from a grid, that gives the least output error; the
    scale goes into what makes the input, and then clipping is searched, but not for queries and keys. As published, the
    input of o_proj stays unscaled where heads share values.
    """
    found = capture(block, [group.layers[0] for group in source.groups], hidden, arguments)
    for inputs in source.groups:
        layers = [source.linear(block, name) for name in inputs.layers]
        hessian, size = found[inputs.layers[0]]
        before = block.get_submodule(PRECEDING[inputs.layers[0]])
        weight = torch.cat([layer.weight for layer in layers]).float()
        least, scale = math.inf, torch.ones_like(size)
        foldable = len(before.weight) == len(size)
        for ratio in RATIOS if foldable else []:
            candidate = size.clamp(min=1e-4) ** ratio
            candidate /= (candidate.max() * candidate.min()).sqrt()
            scaled, turned = weight * candidate, hessian / candidate / candidate[:, None]
            error = output_error(scaled, round_clipped(scaled, turned, bits, group, levels, [1.0]).weight(), turned)
            if error < least:
                least, scale = error, candidate
        turned = hessian / scale / scale[:, None]
        for name, layer in zip(inputs.layers, layers, strict=True):
            shares = SHARES[:1] if name.endswith(("q_proj", "k_proj")) else SHARES
            _install(layer, round_clipped(layer.weight.float() * scale, turned, bits, group, levels, shares).weight())
        # rows of a layer that is quantized already stay on its levels: their scales change
        for tensor in before.parameters() if foldable else []:
            tensor.data = (tensor / scale.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)


# ---- OmniQuant


def omniquant_block(
    source: SourceModel,
    bits: int,
    group: int,
    levels: str,
    steps: int,
    block: nn.Module,
    index: int,
    hidden: torch.Tensor,
    arguments: dict[str, Any],
    targets: torch.Tensor,
) -> None:
    """Learned clipping of one decoder block: OmniQuant (arXiv 2308.13137) as it is published for weights alone.

    The shares of every group's range are sigmoids, trained with AdamW, 2,048 tokens a step, so that the block gives
    what the 16-bit one gives on 16-bit inputs. `minmax` starts as published, `midrise` from searched scales. Published
    are 2,560 steps for 2 bits; the default is about what other methods take that train blocks.
    """
    block.requires_grad_(False)
    weights, logits = {}, {}
    for name in [name for inputs in source.groups for name in inputs.layers]:
        weights[name] = source.linear(block, name).weight.float().unflatten(1, (-1, group))
        start = torch.full((2, *weights[name].shape[:2]), 4.0, device=hidden.device)
        if levels == "midrise":
            searched = search_scale(weights[name], bits, levels)[0].float()
            start[1] = (searched / clipped_range(weights[name], bits, 1, 1, levels)[0]).clamp(max=0.99).logit()
        logits[name] = start.requires_grad_(True)
    optimizer = torch.optim.AdamW(logits.values(), lr=CLIPPING_RATE, weight_decay=0)
    batch = max(1, TOKENS_A_STEP // hidden.shape[1])
    for step in range(steps):
        rows = batch_of(step, batch, len(hidden), index)
        with torch.enable_grad():
            replaced = {}
            for name, weight in weights.items():
                scale, zero = clipped_range(weight, bits, *logits[name].sigmoid(), levels)
                centre = (2**bits - 1) / 2 if zero is None else zero.unsqueeze(-1)
                rounded = scale.unsqueeze(-1) * (_codes(weight, scale, zero, bits) - centre)
                replaced[name + ".weight"] = rounded.flatten(1)
            with torch.autocast(hidden.device.type, torch.bfloat16):
                output = torch.func.functional_call(block, replaced, (hidden[rows],), arguments)
            output = output[0] if isinstance(output, tuple) else output
            F.mse_loss(output.float(), targets[rows].float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights.items():
        scale, zero = clipped_range(weight, bits, *logits[name].detach().sigmoid(), levels)
        _install(source.linear(block, name), _nearest(weight, scale, zero, bits).weight())


# ---- SpinQuant


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


def turn(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate every row, in blocks as wide as the rotation: [..., n] by [b, b], b dividing n."""
    return (x.unflatten(-1, (-1, len(rotation))) @ rotation.T).flatten(-2)


class Basis(nn.Module):
    """Where a weight is quantized: W′ = L W Rᵀ.

    Args:
        inner: R of the input, float32 [b, b] with b dividing K.
        outer: L of the output, or None.
        unit: step of the best mid-rise quantizer of a group of unit Gaussians, for learning.
        bits: bits per code.
        group: columns that share a scale.
    """

    def __init__(self, inner: torch.Tensor, outer: torch.Tensor | None, unit: float, bits: int, group: int):
        super().__init__()
        self.inner, self.outer = inner, outer
        self.unit, self.bits, self.group = unit, bits, group

    def turn(self, w: torch.Tensor) -> torch.Tensor:
        """W′ of float32 [N, K]."""
        w = turn(w, self.inner)
        return w if self.outer is None else turn(w.T, self.outer).T

    def back(self, w: torch.Tensor) -> torch.Tensor:
        """W of W′, float32 [N, K]."""
        w = turn(w, self.inner.T)
        return w if self.outer is None else turn(w.T, self.outer.T).T

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        """What the layer computes with once quantized; straight-through."""
        top = (2**self.bits - 1) / 2
        grouped = self.turn(w).float().unflatten(1, (-1, self.group))
        step = self.unit * grouped.square().mean(-1, keepdim=True).clamp(min=1e-20).sqrt()
        level = grouped / step
        return self.back((step * (_round(level.clamp(-top, top) + top) - top)).flatten(1))


class Rotations:
    """SpinQuant's rotations: R₁ of the residual stream, R₂ of every block's heads, and the fixed R₄ before down_proj.

    All but R₄ are folded into weights; R₄ is a Hadamard transform at run time. Nothing is stored for them.

    Args:
        source: the 16-bit model.
        bits: bits per code.
        group: columns that share a scale.
        seed: of the signs of R₁.
    """

    def __init__(self, source: SourceModel, bits: int, group: int, seed: int = 0):
        config = source.config
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (config.hidden_size,), generator=generator) * 2.0 - 1
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.learned = {"residual": hadamard(config.hidden_size) * signs}
        self.learned |= {f"heads.{index}": hadamard(head) for index in range(source.num_blocks)}
        self.learned = {name: matrix.to(source.device) for name, matrix in self.learned.items()}
        self.down = hadamard(config.intermediate_size).to(source.device)
        gaussian = torch.randn(4096, 1, group, generator=generator)
        self.settings = float(search_scale(gaussian, bits, "midrise")[0].float().mean()), bits, group

    def basis(self, index: int, name: str) -> Basis:
        """Where layer `name` of block `index` is quantized."""
        residual, heads = self.learned["residual"], self.learned[f"heads.{index}"]
        inner, outer = {
            "v_proj": (residual, heads),
            "o_proj": (heads, residual),
            "down_proj": (self.down, residual),
        }.get(name.rsplit(".", 1)[-1], (residual, None))
        return Basis(inner, outer, *self.settings)

    def learn(self, source: SourceModel, tokens: torch.Tensor, steps: int) -> list[float]:
        """Cayley SGD on the next-token loss of the model with rounded weights, whole and in float32.

        SpinQuant (arXiv 2405.16406) learns with rounded activations and 16-bit weights; with activations that stay at
        16 bits the weights have to be rounded, and are, to the nearest level.

        Args:
            tokens: int64 [samples, seqlen].
            steps: of TOKENS_A_STEP tokens.

        Returns:
            the loss at every step.
        """
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).to(source.device)
        model.requires_grad_(False)
        for rotation in self.learned.values():
            rotation.requires_grad_(True)
        for index, block in enumerate(model.model.layers):
            fold_norms(source, block)
            for name in [name for inputs in source.groups for name in inputs.layers]:
                parametrize.register_parametrization(
                    source.linear(block, name), "weight", self.basis(index, name), unsafe=True
                )
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(steps):
            rows = torch.randperm(len(tokens), generator=generator)[: max(1, TOKENS_A_STEP // tokens.shape[1])]
            batch = tokens[rows].to(source.device)
            with torch.autocast(source.device.type, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            rate = CAYLEY_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            for rotation in self.learned.values():
                cayley_step(rotation, rate)
            losses.append(loss.item())
            print(f"rotations, step {step + 1} of {steps}: loss {losses[-1]:.4f}", flush=True)
        for rotation in self.learned.values():
            rotation.requires_grad_(False)
        return losses


@torch.no_grad()
def cayley_step(rotation: torch.Tensor, rate: float) -> None:
    """A step of SGD along the orthogonal matrices (Li et al., arXiv 2002.01113), at most 1/‖A‖ long.

    R ← (I − α/2 A)⁻¹ (I + α/2 A) R with A the skew part of −G Rᵀ; the gradient is then cleared.
    """
    skew = rotation @ rotation.grad.T
    skew = (skew - skew.T) / 2
    half = min(rate, 1 / (float(torch.linalg.matrix_norm(skew, 1)) + 1e-8)) / 2 * skew
    one = torch.eye(len(rotation), device=rotation.device)
    rotation.copy_(torch.linalg.solve(one - half, (one + half) @ rotation))
    rotation.grad = None


@torch.no_grad()
def fold_norms(source: SourceModel, block: nn.Module) -> None:
    """Move the weights of a block's norms into the layers behind them, for a rotation to pass the norms."""
    for inputs in source.groups:
        norm = block.get_submodule(PRECEDING[inputs.layers[0]])
        if not isinstance(norm, nn.Linear):
            for name in inputs.layers:
                source.linear(block, name).weight.mul_(norm.weight)
            norm.weight.fill_(1)


def spinquant_block(
    source: SourceModel, rotations: Rotations, block: nn.Module, index, hidden, arguments, _targets
) -> None:
    """GPTQ of one decoder block in the bases that its rotations make, and back to the model's own."""
    fold_norms(source, block)
    for inputs in source.groups:
        hessian, _ = capture(block, [inputs.layers[0]], hidden, arguments)[inputs.layers[0]]
        for name in inputs.layers:
            layer, basis = source.linear(block, name), rotations.basis(index, name)
            turned = turn(turn(hessian, basis.inner).T, basis.inner)
            quantized = round_gptq(basis.turn(layer.weight.float()), turned, basis.bits, basis.group, "midrise")
            _install(layer, basis.back(quantized.weight()))


# ---- commands


def _run(
    name: str,
    model: Path,
    out: Path,
    tokens: Path,
    bits: int,
    group: int,
    levels: str,
    method: Callable,
    with_targets: bool = False,
    end_to_end: bool = False,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, data = SourceModel(str(model), device), load_file(tokens)
    rows, train_rows = data["tokens"], data["train_tokens"]
    staging = out.with_name(out.name + ".partial")
    resumed = staging.exists()
    staging.mkdir(parents=True, exist_ok=True)
    quantize = method(source, train_rows, staging)
    stream(source, rows, staging, quantize, with_targets)
    seen = train_rows if end_to_end else rows
    write_facts(staging, name, seen, bits, group, asym=levels == "minmax", resumed=resumed)
    staging.rename(out)


@app.command()
def tokens(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    dataset: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "c4",
    samples: int = 128,
    train_samples: int = 640,
    seqlen: int = 512,
    seed: int = 0,
) -> None:
    """Write the tokens on which `bq-calibrate` with the same settings calibrates, for every peer.

    `tokens`, for rounding and block-wise training, are the first `samples` of `train_tokens`, for end-to-end training.
    """
    tokenizer = SourceModel(str(model), torch.device("cpu")).tokenizer()
    rows = calibration_tokens(tokenizer, dataset, max(samples, train_samples), seqlen, seed)
    write_tensors(out, {"tokens": rows[:samples].clone(), "train_tokens": rows[:train_samples].clone()})


@app.command()
def awq(
    model: Model, out: Out, tokens: Tokens, bits: Bits = 2, group_size: GroupSize = 64, levels: Levels = "midrise"
) -> None:
    """AWQ: searched scales of the input channels, folded into what comes before, and searched clipping."""

    def method(source, _rows, _staging):
        return partial(awq_block, source, bits, group_size, levels)

    _run("AWQ", model, out, tokens, bits, group_size, levels, method)


@app.command()
def omniquant(
    model: Model,
    out: Out,
    tokens: Tokens,
    bits: Bits = 2,
    group_size: GroupSize = 64,
    levels: Levels = "midrise",
    steps: Annotated[int, typer.Option(help="Steps a block.")] = 200,
) -> None:
    """OmniQuant's learned clipping."""

    def method(source, _rows, _staging):
        return partial(omniquant_block, source, bits, group_size, levels, steps)

    _run("OmniQuant", model, out, tokens, bits, group_size, levels, method, with_targets=True)


@app.command()
def spinquant(
    model: Model,
    out: Out,
    tokens: Tokens,
    bits: Bits = 2,
    group_size: GroupSize = 64,
    steps: Annotated[int, typer.Option(help="Steps of learning; 0 is QuaRot, a random Hadamard matrix.")] = 100,
) -> None:
    """SpinQuant's learned rotations, then GPTQ."""

    def method(source, train_rows, staging):
        rotations, saved = Rotations(source, bits, group_size), staging / "rotations" / "learned.safetensors"
        if steps and not saved.exists():
            saved.parent.mkdir(exist_ok=True)
            losses = rotations.learn(source, train_rows, steps)
            write_tensors(saved, rotations.learned | {"losses": torch.tensor(losses)})
        if steps:
            rotations.learned = load_file(saved, str(source.device))
        return partial(spinquant_block, source, rotations)

    _run("SpinQuant", model, out, tokens, bits, group_size, "midrise", method, end_to_end=bool(steps))


if __name__ == "__main__":
    app()
