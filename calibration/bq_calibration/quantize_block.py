"""One decoder layer of the 16-bit model to tensors of the checkpoint: learn a rotation, round, refine, report."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from bq_kernels.format import QuantConfig
from bq_kernels.reference import hadamard_angles, rotate
from rich.progress import Progress

from . import analysis, parallel
from .architecture import InputGroup
from .block import Block, Original, Routed
from .input_statistics import InputStatistics
from .quantize import Quantized, corrected, output_energy, refine, round_gptq, round_nearest
from .recipes import Recipe
from .rotation import MOST_ROWS, ButterflyRotation, RotationProblem, initial_angles, learn_rotation
from .sampling import derive_seed, spread_rows

logger = logging.getLogger(__name__)
# The Hessian of an expert counts tokens of all experts beside its own, as many as a quarter of its inputs: one of fewer
# tokens than inputs is singular, one of several times as many hardly changes
TOP_UP = 0.25


def quantize_block(
    block: Block,
    hidden: torch.Tensor,
    config: QuantConfig,
    recipe: Recipe,
    original: Original | None,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Quantize the linear layers of a block in the order in which data meets them, and install each group at once.

    So every group is rounded for the inputs that the quantized layers in front of it give.

    Args:
        block: its 16-bit weights are replaced.
        hidden: hidden states in front of it, quantized model, this process's [samples, seqlen, hidden].
        config: the checkpoint's format.
        recipe: settings of the run.
        original: the 16-bit block with its hidden states; None where the recipe has no correction.
        progress: shows a bar per group of experts.

    Returns:
        the block's part of the checkpoint by name, and a report per group of layers.

    Raises:
        UserError: if an input holds NaN or infinity.
    """
    tensors: dict[str, torch.Tensor] = {}
    reports, routed = [], None
    for place, group in enumerate(block.groups):
        seed = derive_seed(recipe.seed, block.index, place)
        if group.experts:
            routed = routed or block.routed(hidden, group)  # what experts read does not depend on their own layers
            found, report = _quantize_experts(block, group, routed, config, recipe, seed, progress)
        else:
            statistics = block.capture(hidden, group, original)
            found, report = parallel.from_first(
                functools.partial(_quantize_group, block, group, statistics, config, recipe, seed)
            )
        tensors |= found
        block.install(tensors, config, [group])
        reports.append(report)
    return tensors, reports


def _quantize_group(
    block: Block, group: InputGroup, statistics: InputStatistics, config: QuantConfig, recipe: Recipe, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The group's part of the checkpoint, and its report."""
    weight, hessian = block.weight(group), statistics.hessian
    if statistics.drift is not None:
        weight = corrected(weight, hessian, statistics.drift, recipe.correction)
    bits, block_size = config.bits_of(block.prefix + group.layers[0]), config.rotation.block(group.layers[0])
    angles, losses = find_angles(weight, hessian, statistics.sample, block_size, bits, config, recipe, seed)
    quantized, errors = _round_and_compare(group, weight, hessian, angles, bits, config, recipe)
    tensors = _stored_tensors(block, group, quantized, angles, config)
    facts = {"block": block.index, "layers": group.name, "in_features": weight.shape[1], "bits": bits}
    outliers = _input_report(statistics.sample, angles, block_size)
    return tensors, facts | errors | {"learning_curve": losses} | outliers


def _quantize_experts(
    block: Block,
    group: InputGroup,
    routed: Routed,
    config: QuantConfig,
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As `_quantize_group`: one rotation for the layers of all experts, and each expert rounded for its own tokens.

    An expert that few tokens reach is rounded for what all experts see, too (TOP_UP). Errors are means over experts.
    Statistics are computed twice, for the rotation and for the rounding, so that memory holds one expert's at a time.
    """
    parts, features = group.parts(), block.in_features(group)
    together = InputStatistics(features, routed.x.device)
    for part in parts:
        together.merge(block.capture_expert(routed, part))
    together.add_up()
    block.check_inputs(together, group)
    bits, block_size = config.bits_of(block.prefix + group.layers[0]), config.rotation.block(group.layers[0])
    hessian, sample = together.hessian, together.sample
    rows = torch.cat([spread_rows(block.weight(part), max(1, MOST_ROWS // len(parts))) for part in parts])
    learn = functools.partial(find_angles, rows, hessian, sample, block_size, bits, config, recipe, seed)
    angles, losses = parallel.from_first(learn)

    def round_expert(part: InputGroup, seen: InputStatistics) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        own = seen.topped_up(hessian, TOP_UP * features)
        quantized, errors = _round_and_compare(part, block.weight(part), own, angles, bits, config, recipe)
        return _stored_tensors(block, part, quantized, angles, config), errors

    tensors: dict[str, torch.Tensor] = {}
    errors, counts = [], []
    task = progress.add_task(f"experts of block {block.index}, {group.name}", total=len(parts))
    for part in parts:
        seen = block.capture_expert(routed, part)
        seen.add_up()
        counts.append(seen.tokens)
        found, error = parallel.from_first(functools.partial(round_expert, part, seen))
        tensors |= found
        errors.append(error)
        progress.advance(task)
    progress.remove_task(task)
    if few := sum(count < features for count in counts):
        logger.warning(
            "block %d, %s: %d of %d experts saw fewer tokens than they have inputs (%d; least %d), so their rounding "
            "leans on the tokens of all: more --samples help",
            *(block.index, group.name, few, len(counts), features, min(counts)),
        )
    facts = {"block": block.index, "layers": group.name, "in_features": features, "bits": bits, "expert_tokens": counts}
    outliers = _input_report(sample, angles, block_size)
    return tensors, facts | _mean_of(errors) | {"learning_curve": losses} | outliers


def _mean_of(errors: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries of `_round_and_compare` of several experts as one."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    kinds = errors[0]["relative_output_error"]
    return {
        "rotation_block": errors[0]["rotation_block"],
        "relative_output_error": {
            kind: mean([each["relative_output_error"][kind] for each in errors]) for kind in kinds
        },
        "refined_output_error": mean([each["refined_output_error"] for each in errors]),
    }


def round_weight(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, config: QuantConfig, recipe: Recipe
) -> Quantized:
    """Round float32 [N, K] in the basis in which it is given, as the recipe says."""
    group_size = config.group(weight.shape[1])
    if recipe.rounding == "gptq":
        return round_gptq(weight, hessian, bits, group_size, recipe.zero_point)
    return round_nearest(weight, bits, group_size, recipe.zero_point)


def rotated(
    weight: torch.Tensor, hessian: torch.Tensor, angles: torch.Tensor | None, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, K] and Hessian [K, K] in the basis of a rotation; `angles` None leaves them as they are."""
    if angles is None:
        return weight, hessian
    rotation = ButterflyRotation(angles.float(), block_size)
    return rotation.forward(weight), rotation.rotate_hessian(hessian)


def find_angles(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sample: torch.Tensor,
    block_size: int,
    bits: int,
    config: QuantConfig,
    recipe: Recipe,
    seed: int,
) -> tuple[torch.Tensor | None, list[float]]:
    """Angles of the rotation in front of a weight, None without one; and the losses of learning them.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], mean of x xᵀ.
        sample: float32 [tokens, K] of the inputs x.
        block_size: of the rotation.
        bits: per code.
        config: the checkpoint's format.
        recipe: settings of the run.
        seed: of random angles to start from.
    """
    features = weight.shape[1]
    if config.rotation.kind == "none":
        return None, []
    if config.rotation.kind == "hadamard":
        return hadamard_angles(features, block_size, weight.device), []
    problem = RotationProblem(
        spread_rows(weight, MOST_ROWS),
        hessian,
        spread_rows(sample, MOST_ROWS // 4),
        block_size,
        bits,
        config.group(features),
    )
    start = initial_angles(recipe.init, features, block_size, torch.Generator().manual_seed(seed))
    options = recipe.objective, recipe.optimizer, recipe.lr, recipe.steps, recipe.uniformity
    return learn_rotation(problem, start, *options)


def _round_and_compare(
    group: InputGroup,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    angles: torch.Tensor | None,
    bits: int,
    config: QuantConfig,
    recipe: Recipe,
) -> tuple[Quantized, dict[str, Any]]:
    """Round a weight behind its rotation; and for the report its error beside that of simpler rotations.

    Rows are rounded independently of each other, so a spread of them tells the error.
    """
    kind, block_size = config.rotation.kind, config.rotation.block(group.layers[0])
    others = {"none": None, "hadamard": hadamard_angles(weight.shape[1], block_size, weight.device)}
    errors, others = {}, others if recipe.compare else {}
    rows = spread_rows(weight, MOST_ROWS)
    energy = output_energy(rows, hessian)
    for name, simpler in others.items():
        if name != kind:
            turned, basis = rotated(rows, hessian, simpler, block_size)
            rounded = round_weight(turned, basis, bits, config, recipe).weight()
            errors[name] = float(output_energy(rounded - turned, basis) / energy)
    weight, hessian = rotated(weight, hessian, angles, block_size)
    rounded = round_weight(weight, hessian, bits, config, recipe)
    refined = refine(rounded, weight, hessian, recipe.refine)

    def error(quantized: Quantized) -> float:
        return float(output_energy(spread_rows(quantized.weight() - weight, MOST_ROWS), hessian) / energy)

    errors[kind] = error(rounded)
    order = ("none", "hadamard", "butterfly")
    return refined, {
        "rotation_block": block_size,
        "relative_output_error": {name: errors[name] for name in order if name in errors},
        "refined_output_error": error(refined),
    }


def _stored_tensors(
    block: Block, group: InputGroup, quantized: Quantized, angles: torch.Tensor | None, config: QuantConfig
) -> dict[str, torch.Tensor]:
    """The group's tensors of the checkpoint, by full name, checked against the format."""
    tensors, start = {}, 0
    for name, layer in block.linears(group).items():
        stored = quantized.rows(start, start + layer.out_features).tensors()
        if config.rotation.kind == "butterfly":
            stored["angles"] = angles.cpu()
        start += layer.out_features
        full_name = block.prefix + name
        for suffix, spec in config.tensors(full_name, layer.in_features, layer.out_features).items():
            spec.check(f"{full_name}.{suffix}", stored[suffix])
            tensors[f"{full_name}.{suffix}"] = stored[suffix].clone()
    return tensors


def _input_report(inputs: torch.Tensor, angles: torch.Tensor | None, block_size: int) -> dict[str, Any]:
    """Outliers of a sample of the inputs before and after rotation, and the rotation's coherence."""
    report: dict[str, Any] = {"inputs": {"before": analysis.outliers(inputs)}}
    if angles is not None:
        report["inputs"]["after"] = analysis.outliers(rotate(inputs, angles, block_size))
        report["coherence"] = analysis.coherence(angles, block_size)
        report["best_coherence"] = block_size**-0.5
    return report
