"""Learns one rotation by one setting, rounds behind it, and measures the output error."""

from __future__ import annotations

import time
from typing import Any

import torch
from bq_calibration.quantize import output_error, round_gptq
from bq_calibration.rotation import (
    MOST_ROWS,
    OBJECTIVES,
    ButterflyRotation,
    RotationProblem,
    initial_angles,
    learn_rotation,
)
from bq_calibration.sampling import spread_rows

from benchmarks.baselines.cayley import cayley_step, cosine_rate
from benchmarks.rotation_ablations.layers import LayerStats
from benchmarks.rotation_ablations.settings import Setting

CAYLEY_RATES = (0.1, 1.0, 10.0)  # the best is shown


class MatrixRotation(ButterflyRotation):
    """A rotation by any orthogonal matrix per block, where a butterfly is one by angles.

    Args:
        matrices: float32 [blocks, b, b].
    """

    def __init__(self, matrices: torch.Tensor):
        self.transposed = matrices.mT


def learn_matrix(problem: RotationProblem, setting: Setting, rate: float) -> tuple[MatrixRotation, list[float]]:
    """Cayley SGD with a cosine schedule, from the butterfly that the setting starts with; with the loss at each step.

    Args:
        problem: weights and inputs.
        setting: of which init, steps and objective count.
        rate: peak learning rate.
    """
    features = problem.weight.shape[1]
    start = initial_angles(setting.init, features, problem.block_size, torch.Generator().manual_seed(0))
    first = ButterflyRotation(start, problem.block_size)
    units = torch.eye(problem.block_size).repeat(1, len(start))
    rotated = first.forward(units).unflatten(1, (len(start), -1))
    matrices = list(rotated.permute(1, 2, 0).contiguous().unbind())
    losses: list[float] = []
    for step in range(setting.steps + 1):
        for matrix in matrices:
            matrix.requires_grad_(True)
        loss = OBJECTIVES[setting.objective](problem, MatrixRotation(torch.stack(matrices)))
        losses.append(loss.item())
        if step == setting.steps:
            break
        (loss / losses[0]).backward()
        for matrix in matrices:
            cayley_step(matrix, cosine_rate(rate, step, setting.steps))
    return MatrixRotation(torch.stack(matrices).detach()), losses


def measure(layers: LayerStats, setting: Setting, bits: int, group_size: int) -> dict[str, Any]:
    """Learn, round by GPTQ, and measure.

    Returns:
        `error` on held-out windows relative to the output, `losses` at every step, `seconds` of one rotation, and the
        `rate` of Cayley SGD.
    """
    features = layers.weight.shape[1]
    hessian = layers.hessians[setting.samples or max(layers.hessians)]
    block_size = setting.block_size or features
    rows = spread_rows(layers.weight, MOST_ROWS)
    problem = RotationProblem(rows, hessian, layers.inputs, block_size, bits, group_size)
    started, rate = time.monotonic(), None
    if setting.matrix:
        runs = {rate: learn_matrix(problem, setting, rate) for rate in CAYLEY_RATES}
        rate = min(runs, key=lambda rate: runs[rate][1][-1])
        rotation, losses = runs[rate]
        seconds = (time.monotonic() - started) / len(runs)
    else:
        start = initial_angles(setting.init, features, block_size, torch.Generator().manual_seed(0))
        options = setting.objective, setting.optimizer, setting.lr, setting.steps, setting.uniformity
        angles, losses = learn_rotation(problem, start, *options)
        rotation, seconds = ButterflyRotation(angles.float(), block_size), time.monotonic() - started
    with torch.no_grad():
        rotated = rotation.forward(layers.weight)
        quantized = round_gptq(rotated, rotation.rotate_hessian(hessian), bits, group_size, "midrise")
        error = output_error(rotated, quantized.weight(), rotation.rotate_hessian(layers.held_out))
    return {"case": layers.name, "error": error, "losses": losses, "seconds": seconds, "rate": rate}
