"""End-to-end training of a rounded model: the loss is KL(16-bit ‖ quantized) over the next token.

Every other stage looks at one layer or one block at a time. With codes trained as well it takes 18 bytes per weight;
frozen codes stay packed, and scales take 20 bytes per group: 0.6 bytes per weight at 2 bits and groups of 64.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bq_kernels.format import QuantConfig
from rich.progress import Progress

from .model import SourceModel
from .recipes import Recipe
from .sampling import batch_of
from .store import TensorStore
from .student import Student
from .train import train
from .workspace import Workspace

TOKENS_PER_STEP = 2048
# peak learning rates of Adam; those of codes are in steps of the quantizer
RATES = {"codes": 5e-3, "scales": 5e-3, "zeros": 5e-3, "angles": 2e-3, "norms": 5e-4}
_ROWS = 256  # tokens whose logits are in memory at a time


def train_end_to_end(
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    tokens: torch.Tensor,
    workspace: Workspace,
    blocks: str,
    progress: Progress,
) -> tuple[Path, list[dict[str, Any]]]:
    """The end-to-end stages of a recipe, one after the other.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        recipe: settings of the run.
        tokens: int64 [samples, seqlen]; the last `held_out` samples are not trained on.
        workspace: keeps every stage.
        blocks: name of its folder with the tensors of the rounded blocks.
        progress: shows a bar per stage.

    Returns:
        the folder with the last tensors, and a report per stage, the rounded model's first.
    """
    folder, stages = workspace.path / blocks, []
    if not recipe.trains_end_to_end:
        return folder, stages
    states = workspace.tensors("teacher", lambda: {"states": teacher_states(source, tokens, progress)})["states"]
    count = len(tokens) - recipe.held_out

    def measured(report: dict[str, Any]) -> dict[str, Any]:
        if recipe.held_out:
            student = Student(source, config, TensorStore(folder))
            report["held_out_divergence"] = held_out(student, tokens[count:], states[count:])
        return report

    def trained(stage: str, steps: int) -> dict[str, Any]:
        saved, packed = workspace.path / f"{stage}.training", TensorStore(folder)
        data, with_codes = (tokens[:count], states[:count]), stage == "finetune"
        report = workspace.step(
            f"{stage}/model",
            lambda: distill(source, config, packed, *data, steps, with_codes, recipe.seed, saved, progress),
        )
        saved.unlink(missing_ok=True)
        return report

    stages.append(workspace.json("rounded", lambda: measured({"stage": "rounded"})))
    for stage, steps in (("finetune", recipe.finetune), ("distill", recipe.distill)):
        if steps:
            report = {"stage": stage} | trained(stage, steps)
            folder = workspace.path / stage
            stages.append(workspace.json(f"{stage}/report", functools.partial(measured, report)))
    return folder, stages


@torch.no_grad()
def teacher_states(source: SourceModel, tokens: torch.Tensor, progress: Progress) -> torch.Tensor:
    """Hidden states in front of the LM head of the 16-bit model, [samples, seqlen, hidden]."""
    hidden = source.embed(tokens)
    task = progress.add_task("16-bit model", total=source.num_blocks)
    for index in range(source.num_blocks):
        with source.block(index) as block:
            block.run(hidden, out=hidden)
        progress.advance(task)
    with source.final_norm() as norm:
        hidden = norm(hidden)
    progress.remove_task(task)
    return hidden


def divergence(student: Student, output: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean KL(16-bit ‖ quantized) in nats per token, and its gradient.

    Args:
        output: states of the quantized model, [..., hidden].
        target: those of the 16-bit model.

    Returns:
        the divergence, and its gradient with respect to `output`. It is taken here, a few rows at a time, because the
        logits of a step would be gigabytes.
    """
    total, count = 0.0, output[..., 0].numel()
    gradients = []
    pairs = zip(output.detach().flatten(0, -2).split(_ROWS), target.flatten(0, -2).split(_ROWS), strict=True)
    for states, teacher in pairs:
        states.requires_grad_()
        with torch.no_grad():
            teacher = student.logits(teacher).log_softmax(-1)
        loss = F.kl_div(student.logits(states).log_softmax(-1), teacher, reduction="sum", log_target=True) / count
        gradients.append(torch.autograd.grad(loss, states)[0])
        total += loss.item()
    return total, torch.cat(gradients).view(output.shape)


@torch.no_grad()
def held_out(student: Student, tokens: torch.Tensor, states: torch.Tensor) -> float:
    """Mean KL(16-bit ‖ quantized) in nats per token on samples that training has not seen."""
    total = 0.0
    for row, teacher in zip(tokens.to(student.source.device), states.to(student.source.device), strict=True):
        output = student.logits(student.states(row[None])[0]).log_softmax(-1)
        target = student.logits(teacher).log_softmax(-1)
        total += F.kl_div(output, target, reduction="batchmean", log_target=True).item()
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
        steps: of TOKENS_PER_STEP tokens each.
        train_codes: whether codes move.
        seed: of the order of the samples.
        saved: safetensors file from which a later run goes on.
        rates: peak Adam learning rates by kind of parameter.

    Returns:
        the tensors that the checkpoint holds now in place of `packed`, and for the report the loss at every step.
    """
    student = Student(source, config, packed, train_codes)
    batch = max(1, TOKENS_PER_STEP // tokens.shape[1])

    def step_loss(step: int) -> float:
        rows = batch_of(step, batch, len(tokens), seed)
        output = student.states(tokens[rows].to(source.device))
        loss, gradient = divergence(student, output, states[rows].to(source.device))
        output.backward(gradient.to(output.dtype))
        return loss

    title = "end-to-end training" + (" with codes" if train_codes else "")
    losses = train(student.parameters(), rates, steps, step_loss, student.clamp_codes, saved, progress, title)
    trained = {kind: rates[kind] for kind, tensors in student.parameters().items() if tensors}
    report = {"learning_rates": trained, "tokens_per_step": batch * tokens.shape[1], "losses": losses}
    return student.tensors(), report
