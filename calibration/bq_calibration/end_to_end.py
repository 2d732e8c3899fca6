"""End-to-end training of a rounded model: the loss is KL(16-bit ‖ quantized) over the next token.

Every other stage looks at one layer or one block at a time. Codes may move here too, as latent codes behind a
straight-through quantizer; frozen ones stay packed.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import QuantConfig
from rich.progress import Progress

from . import parallel
from .model import SourceModel
from .next_token_loss import divergence
from .optimizer import Optimizer, latent_dtype
from .recipes import Recipe
from .sampling import batch_of
from .schedule import Schedule
from .store import TensorStore
from .student import Student
from .teacher import ResidentTeacher, StoredTeacher, normed, teacher_states
from .train import Curve, Training
from .training_plan import TrainingPlan, training_plan
from .workspace import STABLE, TEACHER, Workspace

logger = logging.getLogger(__name__)
# peak Adam learning rates by kind of parameter, as shares of the recipe's; codes have one of their own
RATES = {"scales": 1.0, "zeros": 1.0, "tables": 0.1, "angles": 0.4, "norms": 0.1}
CURVE = "training.jsonl"  # a line per step
MEASUREMENTS = 10  # of the divergence on held-out text, spread over a training
RISE = 1.03  # of that divergence over its lowest value so far: rates at their peak make it vary by 1 %
TOO_FAST = "lower --train-lr or --code-lr, or raise --tokens-per-step"


@dataclass(frozen=True)
class TrainingText:
    """The text of a training.

    Attributes:
        tokens: int [samples, seqlen].
        held_out: as many samples are not trained on: the first where samples come as they stand, so that a longer text
            has the same; else the last.
        shuffled: whether samples come in a new order in every epoch; else as they stand.
    """

    tokens: torch.Tensor
    held_out: int
    shuffled: bool

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        """Numbers of the samples of one step, int64 [size]."""
        count = len(self.tokens) - self.held_out
        if self.shuffled:
            return batch_of(step, size, count, seed)
        return torch.arange(step * size, (step + 1) * size) % count + self.held_out

    def held_out_samples(self) -> torch.Tensor:
        """Numbers of the samples that are not trained on, int64 [held_out]."""
        return torch.arange(self.held_out) + (len(self.tokens) - self.held_out if self.shuffled else 0)


def keep_states(
    source: SourceModel, recipe: Recipe, hidden: torch.Tensor, workspace: Workspace, memory_budget: int
) -> None:
    """Keep the 16-bit model's states for `train_end_to_end`, which computes them otherwise.

    Args:
        source: the 16-bit model.
        recipe: settings of the run.
        hidden: states behind the last layer, of all samples of the text, [samples, seqlen, hidden]; used up.
        workspace: keeps them.
        memory_budget: bytes that training may take.
    """
    if training_plan(source, recipe, memory_budget).stores_teacher:
        workspace.tensors(TEACHER, lambda: {"states": normed(source, hidden)})


def train_end_to_end(
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    text: TrainingText,
    workspace: Workspace,
    packed: TensorStore,
    memory_budget: int,
    progress: Progress,
) -> tuple[TensorStore, list[dict[str, Any]]]:
    """The end-to-end stage of a recipe.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        recipe: settings of the run.
        text: to train on.
        workspace: keeps the result.
        packed: tensors of the rounded layers, embedding and LM head.
        memory_budget: bytes that training may take, in each process.
        progress: shows a bar.

    Returns:
        the tensors that stand in place of `packed` now, and a report per stage, the rounded model's first.
    """
    if not recipe.train_tokens:
        return packed, []

    def fitting(recipe: Recipe) -> TrainingPlan:
        return training_plan(source, recipe, memory_budget)

    # once for all processes that an interrupted run goes on with, and for a longer run: the saved state depends on it
    bits = workspace.json("optimizer_bits", lambda: fitting(recipe).optimizer_bits)
    recipe = dataclasses.replace(recipe, optimizer_bits=bits)
    plan = TrainingPlan(
        **workspace.json(
            f"plan/{parallel.size()}",  # an interrupted run may go on with more processes, or fewer
            lambda: fitting(recipe).to_dict(),
        )
    )
    if plan.stores_teacher:
        kept = workspace.tensors(TEACHER, lambda: {"states": teacher_states(source, text.tokens, progress)})
        teacher = StoredTeacher(kept["states"], source.device)
    else:
        teacher = ResidentTeacher(source, text.tokens)

    def rounded() -> dict[str, Any]:
        report = {"stage": "rounded"}
        if text.held_out:
            report["held_out_divergence"] = held_out(Student(source, config, packed), text, teacher)
        return report

    stages = [workspace.json("rounded", rounded, together=True)]
    saved = workspace.path / "train.state", workspace.path / STABLE
    before = stages[0].get("held_out_divergence", math.inf)
    curve = Curve(workspace.path / CURVE if parallel.is_first() else None, before=before)
    report = workspace.step(
        "train/model", lambda: train_model(source, config, recipe, packed, text, teacher, plan, saved, curve, progress)
    )
    if parallel.is_first():
        shutil.rmtree(saved[0], ignore_errors=True)
    after = report.get("held_out_divergence", 0.0)
    if after > before:
        facts = before, after, TOO_FAST
        logger.warning("end-to-end training has made the model worse: held-out KL %.3g before, %.3g now; %s", *facts)
    return TensorStore(workspace.path / "train"), [*stages, {"stage": "train"} | report]


@torch.no_grad()
def held_out(student: Student, text: TrainingText, teacher: StoredTeacher | ResidentTeacher, batch: int = 1) -> float:
    """Mean KL(16-bit ‖ quantized) in nats per token on samples that training does not see.

    Args:
        batch: samples at a time and process; always as many, so that compiled layers need not be compiled again, and
            that no process waits for one that has none left.
    """
    total = torch.zeros((), device=student.source.device)
    for numbers in text.held_out_samples().split(batch * parallel.size()):
        rows = numbers[parallel.rank() :: parallel.size()]
        filled = torch.cat((rows, numbers[:1].expand(batch - len(rows))))
        states = student.states(text.tokens[filled].to(student.source.device, torch.int64))
        if len(rows):
            total += divergence(student, states[: len(rows)], teacher.states(rows))
    return parallel.total(total).item() / (text.held_out * text.tokens.shape[1])


def _measured(
    student: Student, text: TrainingText, teacher: StoredTeacher | ResidentTeacher, plan: TrainingPlan, curve: Curve
) -> float:
    """The divergence on held-out text; a warning where it has been lower."""
    found = held_out(student, text, teacher, plan.micro_batch)
    if found > RISE * curve.lowest():
        logger.warning("held-out KL has risen from %.3g to %.3g; if it stays: %s", curve.lowest(), found, TOO_FAST)
    return found


def _make_student(
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    packed: TensorStore,
    text: TrainingText,
    plan: TrainingPlan,
) -> Student:
    latent = latent_dtype(plan.optimizer_bits)
    student = Student(source, config, packed, recipe.train_codes, latent, plan.recompute)
    if plan.compile and not student.compile(text.tokens[: plan.micro_batch].to(source.device, torch.int64)):
        del student
        gc.collect()  # before there is another: its layers refer to each other in circles
        student = Student(source, config, packed, recipe.train_codes, latent, plan.recompute)
    return student


def train_model(
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    packed: TensorStore,
    text: TrainingText,
    teacher: StoredTeacher | ResidentTeacher,
    plan: TrainingPlan,
    saved: tuple[Path | None, Path | None],
    curve: Curve,
    progress: Progress,
    rates: dict[str, float] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train scales, zeros, angles and norms, and the codes too if the recipe says so.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        recipe: settings of the run.
        packed: tensors of all that is packed, and of norms that training has changed.
        text: to train on.
        teacher: gives the 16-bit model's states.
        plan: how it fits into memory.
        saved: folders of `Training`: `saved` and `stable`.
        curve: takes the losses.
        progress: shows a bar.
        rates: peak learning rates that differ from the recipe's, by kind of parameter.

    Returns:
        the tensors that the checkpoint holds now in place of `packed`, and for the report the course of the training.
    """
    rates = {kind: share * recipe.train_lr for kind, share in RATES.items()} | {"codes": recipe.code_lr} | (rates or {})
    student, size = _make_student(source, config, recipe, packed, text, plan), plan.samples_per_step
    tokens_per_step = size * text.tokens.shape[1]

    def step_loss(step: int) -> torch.Tensor:
        total = torch.zeros((), device=source.device)
        own = text.batch(step, size, recipe.seed)[parallel.rank() :: parallel.size()]
        for rows in own.split(plan.micro_batch):
            tokens = text.tokens[rows].to(source.device, torch.int64, non_blocking=True)
            loss = divergence(student, student.states(tokens), teacher.states(rows))
            (loss / tokens_per_step).backward()
            total += loss.detach()
        return parallel.total(total / tokens_per_step)

    steps = recipe.train_steps
    parameters = student.parameters()
    training = Training(
        optimizer=Optimizer(parameters, plan.optimizer_bits, in_backward=plan.one_pass),
        rates=rates,
        schedule=Schedule.of(recipe.schedule, steps),
        step_loss=step_loss,
        after_step=student.clamp_codes,
        seed=recipe.seed,
        title="end-to-end training" + (" with codes" if recipe.train_codes else ""),
        tokens_per_step=tokens_per_step,
        saved=saved[0],
        stable=saved[1] if recipe.schedule == "wsd" else None,
        curve=curve,
        measure=(lambda: _measured(student, text, teacher, plan, curve)) if text.held_out else None,
        measure_at=frozenset(round(steps * (i + 1) / MEASUREMENTS) for i in range(MEASUREMENTS)),
    )
    training.run(progress)
    report = {
        "learning_rates": {kind: rates[kind] for kind, tensors in parameters.items() if tensors},
        "tokens_per_step": tokens_per_step,
        "losses": curve.losses,
        "held_out_curve": curve.held_out,
        "embeddings": [name for name in source.embedding_names if config.packs(name)],
        "plan": plan.to_dict(),
    }
    if curve.held_out:
        report["held_out_divergence"] = curve.held_out[-1][1]
    return student.tensors(), report
