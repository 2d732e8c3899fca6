"""Learning the angles of one butterfly rotation: two objectives, the paper's optimisers, starts and regulariser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from bq_kernels.format import midrise_zero, num_angles
from bq_kernels.reference import apply_rotation, givens_tables, hadamard_angles, undo_rotation

from .quantize import damped, output_energy

# learning stops when that many steps, by objective, have lowered the loss by less than 1 %
PATIENCE, MIN_GAIN = {"output": 50, "gptq": 5}, 0.01
MOST_ROWS = 256  # rows of the weight in a step; a quarter as many tokens in the uniformity term
DENSE_BLOCK = 128  # up to this size a block is trained as a dense matrix
# step and mean squared error of the best uniform quantizer of a unit Gaussian, by bits (Max, 1960)
_GAUSSIAN_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
_GAUSSIAN_NOISE = {2: 0.1188, 3: 0.03744, 4: 0.01154}


@dataclass
class RotationProblem:
    """The weights that share an input, and that input: all that a rotation is learned on.

    Attributes:
        weight: float32 [N, K], the layers stacked.
        hessian: float32 [K, K], mean over tokens of x xᵀ.
        inputs: float32 [tokens, K], a sample of the inputs for the uniformity term.
        block_size: features that one block of the butterfly mixes.
        bits: bits per code.
        group_size: columns that share a scale.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    inputs: torch.Tensor
    block_size: int
    bits: int
    group_size: int

    @cached_property
    def output_energy(self) -> torch.Tensor:
        """Mean of ‖W x‖² over tokens; losses are relative to it."""
        return output_energy(self.weight, self.hessian)


def initial_angles(kind: str, features: int, block_size: int, generator: torch.Generator) -> torch.Tensor:
    """Angles to start from, float32 [features/block_size, num_angles]: `identity`, `hadamard` or `random`."""
    shape = (features // block_size, num_angles(block_size))
    if kind == "identity":
        return torch.zeros(shape)
    if kind == "hadamard":
        return hadamard_angles(features, block_size)
    return (2 * torch.rand(shape, generator=generator) - 1) * math.pi


class ButterflyRotation:
    """A butterfly at one set of angles, made for training: tables are built once, small blocks are dense matrices.

    Args:
        angles: float32 [K/b, num_angles].
        block_size: b; up to DENSE_BLOCK one batched matrix product does what autograd would do stage by stage.
    """

    def __init__(self, angles: torch.Tensor, block_size: int):
        self.tables = givens_tables(angles, block_size)
        self.transposed = None  # Qᵀ of every block, [blocks, b, b]
        if block_size <= DENSE_BLOCK:
            units = torch.eye(block_size, device=angles.device).repeat(1, len(angles))
            rotated = apply_rotation(units, *self.tables)
            self.transposed = rotated.unflatten(1, (len(angles), block_size)).transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Q x for every row of [rows, K], any float dtype."""
        if self.transposed is None:
            return apply_rotation(x, *self.tables)
        return _by_block(x, self.transposed.to(x.dtype))

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Qᵀ x for every row of float32 [rows, K]."""
        if self.transposed is None:
            return undo_rotation(x, *self.tables)
        return _by_block(x, self.transposed.mT)

    def rotate_hessian(self, hessian: torch.Tensor) -> torch.Tensor:
        """Q H Qᵀ of float32 [K, K]."""
        return self.forward(self.forward(hessian).T)


def _by_block(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    return (x.unflatten(1, matrices.shape[:2]).transpose(0, 1) @ matrices).transpose(0, 1).flatten(1)


def output_loss(problem: RotationProblem, rotation: ButterflyRotation) -> torch.Tensor:
    """The paper's loss ‖W x − W′_q Q x‖², relative to ‖W x‖², through a straight-through quantizer.

    Written with the Hessian it is tr(E H Eᵀ), E = W − W′_q Q: the same number for all calibration tokens at once. The
    quantizer's step is the best one for a Gaussian of the group's size, which is differentiable.
    """
    rotated = rotation.forward(problem.weight)
    grouped = rotated.unflatten(1, (-1, problem.group_size))
    step = grouped.square().mean(-1, keepdim=True).clamp(min=1e-20).sqrt() * _GAUSSIAN_STEP[problem.bits]
    centre = midrise_zero(problem.bits)
    level = grouped / step
    hard = (level + centre).round().clamp(0, 2 * centre) - centre
    soft = level.clamp(-centre, centre)
    quantized = (step * (soft + (hard - soft).detach())).flatten(1)
    error = problem.weight - rotation.inverse(quantized)
    return output_energy(error, problem.hessian) / problem.output_energy


def gptq_loss(problem: RotationProblem, rotation: ButterflyRotation) -> torch.Tensor:
    """Output error to expect of GPTQ, relative to ‖W x‖²: Σⱼ Dⱼ σ²ⱼ.

    Dⱼ, from H′ = L D Lᵀ, is the part of column j's error that the columns after it cannot take up; σ²ⱼ is the error of
    a Gaussian with the size of the column's group under the best mid-rise quantizer.
    """
    rotated = rotation.forward(problem.weight)
    energy = (
        rotated.square().unflatten(1, (-1, problem.group_size)).sum(0).mean(-1).repeat_interleave(problem.group_size)
    )
    rotated_hessian = rotation.rotate_hessian(damped(problem.hessian))
    with torch.no_grad():
        factor = torch.linalg.cholesky(((rotated_hessian + rotated_hessian.T) / 2).flip(0, 1))
        pivots = factor.diagonal().square()
        # row j of L⁻¹ is the v that minimises vᵀ H′ v = Dⱼ under vⱼ = 1, so its own derivative does not count:
        # Σ eⱼ Dⱼ has the gradient of ⟨G, H′⟩ with G = L⁻ᵀ diag(e) L⁻¹ held, much cheaper than back through the factor
        unit = torch.linalg.solve_triangular(
            factor / factor.diagonal(), torch.eye(len(factor), device=factor.device), upper=False
        )
        held = (unit.T @ (energy.flip(0)[:, None] * unit)).flip(0, 1)
        pivots = pivots.flip(0)
    expected = (held * rotated_hessian).sum() + ((energy - energy.detach()) * pivots).sum()
    return _GAUSSIAN_NOISE[problem.bits] * expected / problem.output_energy


def uniformity(problem: RotationProblem, rotation: ButterflyRotation) -> torch.Tensor:
    """The paper's regulariser: KL divergence from uniform of the rotated activations' occupancy of 2^bits bins.

    Activations are scaled to [−1, 1] token by token and counted softly (each into its two nearest bins).
    """
    bins = 2**problem.bits
    y = rotation.forward(problem.inputs)
    y = y / y.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    position = (y + 1) / 2 * (bins - 1)
    share = torch.stack([(1 - (position - b).abs()).clamp(min=0).mean() for b in range(bins)])
    return (share * (share.clamp(min=1e-12) * bins).log()).sum()


OBJECTIVES: dict[str, Callable[[RotationProblem, ButterflyRotation], torch.Tensor]] = {
    "output": output_loss,
    "gptq": gptq_loss,
}


def learn_rotation(
    problem: RotationProblem,
    angles: torch.Tensor,
    objective: str,
    optimizer: str,
    lr: float,
    steps: int,
    uniformity_weight: float,
) -> tuple[torch.Tensor, list[float]]:
    """Train angles from where they stand.

    Args:
        angles: float32 [K/b, num_angles].
        objective: `output` (the paper's) or `gptq`.
        optimizer: `adam`, or `sgd` with a cosine schedule.
        steps: most steps; stops earlier when the objective's PATIENCE of steps gained less than MIN_GAIN.
        uniformity_weight: λ of the uniformity term; 0 leaves it out.

    Returns:
        the best angles seen, rounded to float16 as they will be stored, and the loss at every step.
    """
    angles = angles.to(problem.weight.device).clone().requires_grad_(True)
    if optimizer == "adam":
        stepper = torch.optim.Adam([angles], lr=lr)
    else:
        stepper = torch.optim.SGD([angles], lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, max(steps, 1)) if optimizer == "sgd" else None
    losses: list[float] = []
    patience = PATIENCE[objective]
    best = angles.detach().clone()
    for step in range(steps + 1):
        rotation = ButterflyRotation(angles, problem.block_size)
        loss = OBJECTIVES[objective](problem, rotation)
        if uniformity_weight:
            loss = loss + uniformity_weight * uniformity(problem, rotation)
        losses.append(loss.item())
        if losses[-1] <= min(losses):
            best = angles.detach().clone()
        converged = step >= patience and min(losses[-patience:]) > min(losses[:-patience]) * (1 - MIN_GAIN)
        if step == steps or converged:
            break
        stepper.zero_grad()
        (loss / losses[0]).backward()  # the same learning rate then suits every layer
        stepper.step()
        if schedule:
            schedule.step()
    return best.half(), losses
