"""How end-to-end training fits into memory, decided before it begins."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from bq_kernels.format import BITS

from . import parallel
from .block import Block
from .errors import UserError
from .model import SourceModel
from .optimizer import has_torchao
from .recipes import Recipe

SHARE = 0.85  # of the free memory that a run may take unless --memory-budget says otherwise
STORED_STATES = 0.25  # of the budget that the teacher's states may take
LOGITS = 2**31  # bytes around the loss on a GPU: logits of both models and their gradient; a sixteenth on a CPU
PROCESS = int(6e8)  # Python, torch and its libraries
PER_FEATURE = 6  # bytes that autograd keeps per input and output feature of a linear layer and per token
# bytes per weight: latent code, gradient, two moments; the gradient is freed at once where one pass is one step
CODES = {32: (4, 4, 8), 8: (2, 2, 2.04)}
PER_GROUP = 20  # bytes of a scale: initial value, ratio, gradient, two moments


@dataclass(frozen=True)
class TrainingPlan:
    """The choices that bring a training into a budget of memory.

    Attributes:
        samples_per_step: of the optimizer.
        processes: among which the samples of a step are divided.
        micro_batch: samples per pass and process; gradients of several passes are added up.
        recompute: whether activations inside decoder layers are computed twice, not kept.
        optimizer_bits: 32 or 8, see `Optimizer`.
        stores_teacher: whether the 16-bit model's states are computed once and kept; else the model is in memory.
        compile: whether decoder layers are compiled.
        memory_bytes: about what training takes, per process.
    """

    samples_per_step: int
    processes: int
    micro_batch: int
    recompute: bool
    optimizer_bits: int
    stores_teacher: bool
    compile: bool
    memory_bytes: int

    @property
    def one_pass(self) -> bool:
        """Whether a step is one pass."""
        return self.micro_batch * self.processes >= self.samples_per_step

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as workspace and report hold them."""
        return dataclasses.asdict(self)


def free_memory(device: torch.device) -> int:
    """Bytes that each process may take on its device when nobody names a budget."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    return int(SHARE * psutil.virtual_memory().available / parallel.size())


def training_plan(source: SourceModel, recipe: Recipe, budget: int) -> TrainingPlan:
    """The fastest way to train within a budget: as few passes per step as fit, activations kept if they can be.

    Args:
        source: the 16-bit model.
        recipe: settings of the run.
        budget: bytes, of each process.

    Raises:
        UserError: if nothing fits, or the samples of a step cannot be divided among the processes.
    """
    per_step, processes = recipe.samples_per_step, parallel.size()
    if per_step % processes:
        raise UserError(
            f"--tokens-per-step {recipe.tokens_per_step}: {per_step} sequences of {recipe.seqlen} tokens cannot be "
            f"divided among {processes} processes; use a multiple of {processes * recipe.seqlen}"
        )
    share, hidden = per_step // processes, source.text_config.hidden_size
    states = recipe.text_samples * recipe.seqlen * hidden * source.dtype.itemsize
    stored = states <= STORED_STATES * budget
    compiled = recipe.compile == "on" or (recipe.compile == "auto" and source.device.type == "cuda")
    passes = [n for n in range(1, share + 1) if share % n == 0]
    least = None
    for bits, recompute, count in itertools.product(_optimizer_bits(recipe), (False, True), passes):
        plan = TrainingPlan(per_step, processes, share // count, recompute, bits, stored, compiled, 0)
        needed = _memory(source, recipe, plan, states)
        least = min(needed, least or needed)
        if needed <= budget:
            return dataclasses.replace(plan, memory_bytes=needed)
    raise UserError(
        f"end-to-end training needs {least / 1e9:.1f} GB, {budget / 1e9:.1f} GB may be taken: "
        + ("use --optimizer-bits 8, " if recipe.train_codes and recipe.optimizer_bits == 32 else "")
        + ("install torchao for moments in 8 bits, " if recipe.train_codes and not has_torchao() else "")
        + ("use --no-train-codes, " if recipe.train_codes else "")
        + "lower --seqlen, or raise --memory-budget"
    )


def _optimizer_bits(recipe: Recipe) -> tuple[int, ...]:
    """Bits of the moments of codes that a run may take, the better first.

    Raises:
        UserError: if torchao is asked for and not installed.
    """
    if recipe.optimizer_bits == 8 and recipe.train_codes and not has_torchao():
        raise UserError("--optimizer-bits 8 needs torchao; install it with pip")
    if recipe.optimizer_bits is not None:
        return (recipe.optimizer_bits,)
    return (32, 8) if recipe.train_codes and has_torchao() else (32,)


def _features_per_token(block: Block, source: SourceModel) -> float:
    """Inputs and outputs of the linear layers that a token meets in a decoder layer: of experts, only its own."""
    return sum(
        source.share_of_tokens(group)
        * sum(layer.in_features + layer.out_features for layer in block.linears(group).values())
        for group in block.groups
    )


def _memory(source: SourceModel, recipe: Recipe, plan: TrainingPlan, states: int) -> int:
    """Bytes that training takes at its peak, about."""
    kinds = source.kinds
    weights = max(block.weights() for block, _ in kinds)
    whole_weights = sum(block.weights() * count for block, count in kinds)
    group = recipe.group_size if recipe.group_size > 0 else source.text_config.hidden_size
    per_weight = PER_GROUP / group
    latent, gradient, moments = CODES[plan.optimizer_bits]
    gathered = 0
    if recipe.train_codes:
        per_weight += (latent + moments + (0 if plan.one_pass else gradient)) / plan.processes
        if plan.processes > 1:  # the codes of a layer at work and the next, gradients before and while they are summed
            gathered = weights * (2 * latent + gradient + 4)
    else:
        per_weight += recipe.bits / 8
    item = source.training_dtype.itemsize
    # while a layer is at work: its weight rounded, in training dtype and float32, and its gradient
    at_work = weights * (4 + item + (gradient if recipe.train_codes else 4))
    kept_weights = item * whole_weights if recipe.train_codes and not plan.recompute else 0
    tokens = plan.micro_batch * recipe.seqlen
    # of one layer at a time, or of all
    features = (_features_per_token(block, source) * (1 if plan.recompute else count) for block, count in kinds)
    features = max(features) if plan.recompute else sum(features)
    activations = tokens * int(PER_FEATURE * features + 4 * source.text_config.hidden_size * source.num_blocks)
    original = source.vocabulary * source.text_config.hidden_size * (4 + item)  # embedding and LM head
    teacher = 0 if plan.stores_teacher else source.dtype.itemsize * whole_weights + original
    logits = LOGITS if source.device.type == "cuda" else LOGITS // 16
    whole = int(per_weight * whole_weights) + kept_weights
    tables = _tables(source, recipe)
    return PROCESS + whole + gathered + at_work + activations + tables + teacher + logits + states * plan.stores_teacher


def _tables(source: SourceModel, recipe: Recipe) -> int:
    """Bytes of the student's embedding and LM head and of the 16-bit head beside them."""
    weights, item = source.vocabulary * source.text_config.hidden_size, source.training_dtype.itemsize
    group = recipe.group_size if recipe.group_size > 0 else source.text_config.hidden_size
    packed = {bits: bits / 8 + PER_GROUP / group for bits in BITS}
    per_weight = item + packed.get(recipe.embedding_bits, 4)
    if recipe.head_bits in packed:  # unpacked, its gradient, and their product
        per_weight += 3 * item + packed[recipe.head_bits] * (len(source.embedding_names) - 1)
    return int(per_weight * weights)
