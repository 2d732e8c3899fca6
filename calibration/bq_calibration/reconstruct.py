"""Block-wise training: a quantized decoder block learns to give what the 16-bit model gives at the same place.

After EfficientQAT (arXiv 2407.11062), its Block-AP: codes through a straight-through quantizer, scales and zeros; here
the angles of the rotations and the norms as well. One block is in memory at a time, at 18 bytes a weight.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from bq_kernels.format import QuantConfig
from rich.progress import Progress
from torch import nn

from .model import SourceModel, block_output
from .student import Trainable
from .train import batch_of, train

TOKENS_A_STEP = 512
RATES = {"codes": 1e-2, "factors": 1e-2, "zeros": 1e-2, "angles": 5e-3, "norms": 5e-4}


def block_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Relative squared error plus mean 1 − cosine, [..., hidden] each.

    A few tokens have outputs hundreds of times as large as the others' and make up the squared error nearly alone; the
    cosine looks at all tokens alike.
    """
    found, wanted = found.float(), wanted.float()
    squared = (found - wanted).square().sum() / wanted.square().sum()
    return squared + (1 - F.cosine_similarity(found, wanted, dim=-1)).mean()


def reconstruct(
    source: SourceModel,
    config: QuantConfig,
    block: nn.Module,
    index: int,
    tensors: dict[str, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    arguments: dict[str, Any],
    steps: int,
    seed: int,
    progress: Progress,
    rates: dict[str, float] = RATES,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train one block: codes, scales, zeros, angles, norms.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        block: decoder block `index`; left as it is.
        index: its place.
        tensors: the block's part of the checkpoint so far.
        inputs: what the quantized model sends into the block, [samples, seqlen, hidden].
        targets: what the 16-bit model gives behind it, so that what went wrong before is corrected too.
        arguments: further arguments of the block's forward.
        steps: of the optimizer, TOKENS_A_STEP tokens each.
        seed: of the order of the samples.
        progress: shows a bar.
        rates: peak Adam learning rates by kind of parameter.

    Returns:
        the block's part of the checkpoint, trained norms included, and the loss at every step.
    """
    trainable = Trainable(source, config, train_codes=True)
    trained = copy.deepcopy(block).float().requires_grad_(False)
    trainable.replace_linears(trained, index, tensors)
    trainable.replace_norms(trained, source.block_prefix(index))
    batch = max(1, TOKENS_A_STEP // inputs.shape[1])

    def step_loss(step: int) -> float:
        rows = batch_of(step, batch, len(inputs), seed)
        with torch.autocast(source.device.type, torch.bfloat16):
            output = block_output(trained, inputs[rows].float(), arguments)
        loss = block_loss(output, targets[rows])
        loss.backward()
        return loss.item()

    losses = train(trainable.parameters(), rates, steps, step_loss, trainable.hold, None, progress, f"block {index}")
    return trainable.tensors(), losses
