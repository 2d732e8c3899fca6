"""End-to-end training of a rounded model: the loss is KL(16-bit ‖ quantized) over the next token.

Every other stage looks at a layer or a block at a time. With codes trained as well it takes 18 bytes a weight; codes
that are frozen stay packed, and scales take 20 bytes a group: 0.6 bytes a weight at 2 bits and groups of 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bq_kernels.format import QuantConfig
from rich.progress import Progress
from safetensors.torch import load_file

from .checkpoint import write_tensors
from .model import SourceModel, TensorStore, block_output
from .student import Student
from .train import batch_of, train

TOKENS_A_STEP = 2048
# peak learning rates of Adam; those of codes are in steps of the quantizer
RATES = {"codes": 5e-3, "factors": 5e-3, "zeros": 5e-3, "angles": 2e-3, "norms": 5e-4}
_ROWS = 256  # tokens whose logits are in memory at a time


@torch.no_grad()
def teacher_states(source: SourceModel, tokens: torch.Tensor, saved: Path, progress: Progress) -> torch.Tensor:
    """What enters the LM head of the 16-bit model, [samples, seqlen, hidden]; kept in the file `saved`."""
    if saved.exists():
        return load_file(saved)["states"]
    hidden, arguments = source.embed(tokens)
    batch = max(1, TOKENS_A_STEP // tokens.shape[1])
    task = progress.add_task("16-bit model", total=source.num_blocks)
    for index in range(source.num_blocks):
        with source.block(index) as block:
            for start in range(0, len(hidden), batch):
                rows = slice(start, start + batch)
                hidden[rows] = block_output(block, hidden[rows], arguments[index])
        progress.advance(task)
    with source.final_norm() as norm:
        hidden = norm(hidden)
    progress.remove_task(task)
    write_tensors(saved, {"states": hidden})
    return hidden


def divergence(student: Student, found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean KL(16-bit ‖ quantized) in nats a token, and its gradient.

    Args:
        found: states of the quantized model, [..., hidden].
        wanted: those of the 16-bit model.

    Returns:
        the divergence, and its gradient with respect to `found`. It is taken here, a few rows at a time, because the
        logits of a step would be gigabytes.
    """
    total, count = 0.0, found[..., 0].numel()
    gradients = []
    pairs = zip(found.detach().flatten(0, -2).split(_ROWS), wanted.flatten(0, -2).split(_ROWS), strict=True)
    for row, target in pairs:
        row.requires_grad_()
        with torch.no_grad():
            target = student.logits(target).log_softmax(-1)
        loss = F.kl_div(student.logits(row).log_softmax(-1), target, reduction="sum", log_target=True) / count
        gradients.append(torch.autograd.grad(loss, row)[0])
        total += loss.item()
    return total, torch.cat(gradients).view(found.shape)


@torch.no_grad()
def held_out(student: Student, tokens: torch.Tensor, states: torch.Tensor) -> float:
    """Mean KL(16-bit ‖ quantized) in nats a token on samples that training has not seen."""
    total = 0.0
    for row, wanted in zip(tokens.to(student.source.device), states.to(student.source.device), strict=True):
        found = student.logits(student.states(row[None])[0]).log_softmax(-1)
        target = student.logits(wanted).log_softmax(-1)
        total += F.kl_div(found, target, reduction="batchmean", log_target=True).item()
    return total / len(tokens)


def distill(
    source: SourceModel,
    config: QuantConfig,
    packed: TensorStore,
    tokens: torch.Tensor,
    states: torch.Tensor,
    steps: int,
    train_codes: bool,
    seed: int,
    saved: Path,
    progress: Progress,
    rates: dict[str, float] = RATES,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train scales, zeros, angles and norms, and the codes too if asked.

    Goes on from the file `saved`, which is written every few minutes, to the same bytes.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        packed: tensors of the quantized layers, and of norms that training has changed.
        tokens: int64 [samples, seqlen].
        states: of the 16-bit model on `tokens`.
        steps: of TOKENS_A_STEP tokens each.
        train_codes: whether codes move.
        seed: of the order of the samples.
        saved: safetensors file for what a later run goes on from.
        rates: peak Adam learning rates by kind of parameter.

    Returns:
        what the checkpoint holds now in place of `packed`, and for the report the loss at every step.
    """
    student = Student(source, config, packed, train_codes)
    batch = max(1, TOKENS_A_STEP // tokens.shape[1])

    def step_loss(step: int) -> float:
        rows = batch_of(step, batch, len(tokens), seed)
        found = student.states(tokens[rows].to(source.device))
        loss, gradient = divergence(student, found, states[rows].to(source.device))
        found.backward(gradient.to(found.dtype))
        return loss

    title = "end-to-end training" + (" with codes" if train_codes else "")
    losses = train(student.parameters(), rates, steps, step_loss, student.hold, saved, progress, title)
    trained = {kind: rates[kind] for kind, found in student.parameters().items() if found}
    report = {"learning_rates": trained, "tokens_a_step": batch * tokens.shape[1], "losses": losses}
    return student.tensors(), report
