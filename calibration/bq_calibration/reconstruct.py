"""Block-wise quantization-aware training: a quantized decoder layer learns to give the 16-bit layer's output.

After EfficientQAT (arXiv 2407.11062), its Block-AP: codes through a straight-through quantizer, scales and zeros; here
the angles of the rotations and the norms as well. One layer is in memory at a time, at 18 bytes per weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from bq_kernels.format import QuantConfig
from rich.progress import Progress

from . import parallel
from .block import Block
from .model import SourceModel
from .optimizer import Optimizer
from .recipes import Recipe
from .sampling import batch_of, derive_seed
from .schedule import Schedule
from .student import Trainable
from .train import Training

TOKENS_PER_STEP = 512
RATES = {"codes": 1e-2, "scales": 1e-2, "zeros": 1e-2, "angles": 5e-3, "norms": 5e-4}


def block_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Relative squared error plus mean 1 − cosine, [..., hidden] each.

    A few tokens have outputs hundreds of times as large as the others' and make up the squared error nearly alone; the
    cosine looks at all tokens alike. Of several processes each gives its tokens' share: the sum is the loss.
    """
    output, target = output.float(), target.float()
    differences = 1 - F.cosine_similarity(output, target, dim=-1)
    energy, tokens = parallel.total(torch.stack((target.square().sum(), target.new_tensor(differences.numel()))))
    return (output - target).square().sum() / energy + differences.sum() / tokens


def train_block(
    source: SourceModel,
    config: QuantConfig,
    block: Block,
    tensors: dict[str, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    tokens: int,
    seed: int,
    progress: Progress,
    rates: dict[str, float] = RATES,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train codes, scales, zeros, angles and norms of one block.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        block: left as it is.
        tensors: the block's part of the checkpoint so far.
        inputs: hidden states that the quantized model sends into the block, this process's [samples, seqlen, hidden].
        targets: hidden states that the 16-bit model gives behind it, so that earlier errors are corrected too.
        tokens: to train on, TOKENS_PER_STEP per step of the optimizer, but at least a sample per process.
        seed: of the order of the samples.
        progress: shows a bar.
        rates: peak Adam learning rates by kind of parameter.

    Returns:
        the block's part of the checkpoint, trained norms included, and the loss at every step.
    """
    trainable = Trainable(source, config, train_codes=True)
    trained = block.clone()
    trained.module.float().requires_grad_(False)
    trainable.replace_linears(trained, tensors)
    trainable.replace_norms(trained.module, block.prefix)
    batch = max(1, TOKENS_PER_STEP // inputs.shape[1] // parallel.size())
    steps = -(-tokens // (batch * inputs.shape[1] * parallel.size()))

    def step_loss(step: int) -> torch.Tensor:
        rows = batch_of(step, batch, len(inputs), seed)
        with trainable.autocast():
            output = trained.forward(inputs[rows].float())
        loss = block_loss(output, targets[rows])
        loss.backward()
        return parallel.total(loss)

    training = Training(
        optimizer=Optimizer(trainable.parameters()),
        rates=rates,
        schedule=Schedule.of("cosine", steps),
        step_loss=step_loss,
        after_step=trainable.clamp_codes,
        seed=seed,
        title=f"block {block.index}",
    )
    losses = training.run(progress).losses
    return parallel.from_first(trainable.tensors), losses


def reconstruct(
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    block: Block,
    tensors: dict[str, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train a block that has been rounded, install the result, and measure the gain on the recipe's held-out samples.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        recipe: settings of the run.
        block: with its rounded weights installed.
        tensors: the block's part of the checkpoint so far.
        inputs: hidden states in front of the block, quantized model, this process's; the last, `held_out` in all
            processes together, are not trained on.
        targets: hidden states behind it, 16-bit model.
        progress: shows a bar.

    Returns:
        the block's part of the checkpoint, and for the report the losses.
    """
    count = parallel.share(recipe.read_windows)

    def held_out_loss() -> float:
        return parallel.total(block_loss(block.run(inputs[count:]), targets[count:])).item()

    before = held_out_loss() if recipe.held_out else None
    seed = derive_seed(recipe.seed, block.index)
    data = inputs[:count], targets[:count]
    tensors, losses = train_block(source, config, block, tensors, *data, recipe.block_tokens, seed, progress)
    block.install(tensors, config)
    report: dict[str, Any] = {"losses": losses}
    if before is not None:
        report["held_out_loss"] = [before, held_out_loss()]
    return tensors, report
