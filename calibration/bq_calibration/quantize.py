"""Rounding of a weight to 2–4 bits in a given basis: searched scales, round-to-nearest and GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bq_kernels import reference
from bq_kernels.format import LARGEST_SCALE, SMALLEST_SCALE, largest_code, midrise_zero
from bq_kernels.packing import pack
from bq_kernels.reference import levels

DAMPING = 0.01  # share of the mean diagonal added to a Hessian before it is factored (GPTQ's percdamp)
CORRECTION_DAMPING = 0.1  # the same where weights are corrected: their error has more noise
_CLIP_GRID = [0.30 + 0.05 * n for n in range(15)]
_ZERO_SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5)
_PANEL = 16  # columns of a group that are rounded before their moves reach the others
_PASSES = 2  # over the codes and the scale of a group, before the next group's turn


@dataclass
class Quantized:
    """A rounded weight: codes uint8 [N, K]; scales and zeros float16 [N, K/group], zeros None for mid-rise."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int

    def weight(self) -> torch.Tensor:
        """W′ = s·(q − z), float32 [N, K]."""
        group = self.codes.shape[1] // self.scales.shape[1]
        return levels(self.codes.float().unflatten(1, (-1, group)), self.scales, self.zeros, self.bits).flatten(1)

    def rows(self, start: int, stop: int) -> Quantized:
        """The part that belongs to output features [start, stop)."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Quantized(self.codes[start:stop], self.scales[start:stop], zeros, self.bits)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the checkpoint format, on the CPU and contiguous."""
        stored = {"qweight": pack(self.codes, self.bits), "scales": self.scales}
        if self.zeros is not None:
            stored["zeros"] = self.zeros
        return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


def _nearest(w, scales, zeros, bits):
    zero = reference.zero_point(zeros, bits)
    return (w / scales.float().unsqueeze(-1) + zero).round().clamp(0, largest_code(bits))


def search_scale(
    w: torch.Tensor, bits: int, zero_point: str, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and float zero) of every group that give the least weighted squared error under nearest rounding.

    A grid over the clipping range, then least squares for the scale (and zero) with the codes held, four times. Min-max
    scales lose a factor of about two in error at 2 bits.

    Args:
        w: float32 [N, groups, group].
        bits: bits per code.
        zero_point: `midrise` or `float`.
        importance: float32 [groups, group] weights of the squared errors, or None for equal ones.

    Returns:
        scales float16 [N, groups]; zeros float16 [N, groups], or None for mid-rise.
    """
    top, middle = largest_code(bits), midrise_zero(bits)
    h = torch.ones(1, *w.shape[1:], device=w.device) if importance is None else importance[None]
    if zero_point == "midrise":
        reach = w.abs().amax(-1)
    else:
        low, high = w.amin(-1), w.amax(-1)
    best = w.new_full(w.shape[:2], torch.inf)
    scales, zeros = torch.ones_like(best).half(), None if zero_point == "midrise" else torch.zeros_like(best).half()

    def keep_better(scale, zero):
        nonlocal best, scales, zeros
        scale = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
        zero = None if zero is None else zero.clamp(-1e4, 1e4).half()
        error = (h * (levels(_nearest(w, scale, zero, bits), scale, zero, bits) - w).square()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        zeros = None if zero is None else torch.where(better, zero, zeros)

    for clip in _CLIP_GRID:
        if zero_point == "midrise":
            keep_better(clip * reach * 2 / top, None)
        else:
            scale = clip * (high - low) / top
            centre = middle - (high + low) / 2 / scale.clamp(min=SMALLEST_SCALE)
            for shift in _ZERO_SHIFTS:
                keep_better(scale, centre + shift)
    for _ in range(4):
        codes = _nearest(w, scales, zeros, bits)
        if zero_point == "midrise":
            centred = codes - middle
            keep_better((h * w * centred).sum(-1) / (h * centred * centred).sum(-1), None)
        else:
            total = h.sum(-1)
            mean_q, mean_w = (h * codes).sum(-1) / total, (h * w).sum(-1) / total
            dq = codes - mean_q.unsqueeze(-1)
            slope = (h * dq * w).sum(-1) / (h * dq * dq).sum(-1).clamp(min=1e-12)
            keep_better(slope, mean_q - mean_w / slope.clamp(min=SMALLEST_SCALE))
    return scales, zeros


def damped(hessian: torch.Tensor, share: float = DAMPING) -> torch.Tensor:
    """H + λI with λ a share of the mean diagonal, so that it can be factored; never exactly singular."""
    result = hessian.clone()
    result.diagonal().add_(hessian.diagonal().mean() * share + 1e-8)
    return result


def corrected(weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor, share: float) -> torch.Tensor:
    """The weight that gives, for the quantized model's inputs x, more nearly W x16: the target of rounding.

    Least squares for the inputs' error from earlier layers: W + share · W E[(x16 − x) xᵀ] (H + λI)⁻¹. It is the
    asymmetric calibration of GPTAQ (arXiv 2504.02692), solved ahead of rounding rather than within.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], mean of x xᵀ.
        drift: float32 [K, K], mean of (x16 − x) xᵀ.
        share: 0 to 1. The inputs of few tokens also show errors that are theirs alone, so all of it overfits.
    """
    return weight + share * weight @ torch.linalg.solve(damped(hessian, CORRECTION_DAMPING), drift.T).T


def round_nearest(w: torch.Tensor, bits: int, group: int, zero_point: str) -> Quantized:
    """Round to nearest with searched scales; `w` float32 [N, K]."""
    grouped = w.unflatten(1, (-1, group))
    scales, zeros = search_scale(grouped, bits, zero_point)
    return Quantized(_nearest(grouped, scales, zeros, bits).flatten(1).to(torch.uint8), scales, zeros, bits)


def round_gptq(w: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, zero_point: str) -> Quantized:
    """GPTQ (arXiv 2210.17323): columns in order, the error of each spread over those that follow.

    The scale of a group is searched when its first column is reached, on the weights as corrected so far, weighted by
    how much of a column's error the later columns cannot take up.

    Args:
        w: float32 [N, K], in the rotated basis.
        hessian: float32 [K, K], x xᵀ summed over tokens, in the same basis.
    """
    # H = RRᵀ with R upper triangular, the Cholesky factor of H read backwards. Errors e = w − ŵ cost ‖eR‖², and column
    # j of eR knows no column of w behind j. So the best values of a group, with those behind it free, make its columns
    # of eR zero: GPTQ as Babai's nearest plane (arXiv 2507.18553), without an inverse of H
    root = torch.linalg.cholesky(damped(hessian).flip(0, 1)).flip(0, 1)
    diagonal = torch.stack([root[i : i + group, i : i + group] for i in range(0, len(root), group)])
    inverse = torch.linalg.solve_triangular(diagonal, torch.eye(group, device=w.device), upper=True)
    pivots = diagonal.diagonal(dim1=1, dim2=2)
    couplings = (inverse * pivots[:, :, None]).mT.tril(-1)  # how a column's error moves the others of its group
    errors = torch.empty_like(w.T, memory_format=torch.contiguous_format)
    codes, top = torch.empty_like(errors, dtype=torch.uint8), largest_code(bits)
    all_scales, all_zeros = [], []
    for n, start in enumerate(range(0, len(errors), group)):
        part = slice(start, start + group)
        target = w.T[part] + inverse[n].T @ (root[:start, part].T @ errors[:start])
        scales, zeros = search_scale(target.T[:, None], bits, zero_point, pivots[n].square()[None])
        scale = scales[:, 0].float()
        zero = midrise_zero(bits) if zeros is None else zeros[:, 0].float()
        target.div_(scale).add_(zero)
        found = _round_in_turn(target, target, couplings[n], top)
        codes[part], errors[part] = found, w.T[part] - scale * (found - zero)
        all_scales.append(scales)
        if zeros is not None:
            all_zeros.append(zeros)
    return Quantized(
        codes.T.contiguous(), torch.cat(all_scales, 1), torch.cat(all_zeros, 1) if all_zeros else None, bits
    )


def _round_in_turn(target: torch.Tensor, before: torch.Tensor, coupling: torch.Tensor, top: int) -> torch.Tensor:
    """Round columns one after the other; each moves the targets of others before they are rounded.

    Args:
        target: float32 [columns, N] in units of a step; changed in place.
        before: from where a column moves to its code, of the same shape; `target` itself for GPTQ.
        coupling: float32 [columns, columns]; a move of column j adds coupling[i, j] times it to target i.
        top: the largest code.

    Returns:
        codes, float32 [columns, N].
    """
    codes, moves = torch.empty_like(target), torch.empty_like(target)
    for start in range(0, len(target), _PANEL):
        panel = slice(start, start + _PANEL)
        near, far = coupling[panel, panel].T.contiguous(), coupling[:, panel].clone()
        far[panel] = 0
        rows = zip(near, target[panel], before[panel], codes[panel], moves[panel], strict=True)
        for weights, wanted, old, code, move in rows:
            torch.round(wanted, out=code).clamp_(0, top)
            torch.sub(code, old, out=move)
            target[panel].addr_(weights, move)
        target.addmm_(far, moves[panel])  # later panels, and in the next pass earlier ones
    return codes


def refine(q: Quantized, w: torch.Tensor, hessian: torch.Tensor, sweeps: int) -> Quantized:
    """Lower the output error of a rounded weight: coordinate descent over the codes and scales, group by group.

    Every code of a group moves to its best value with all others held (as QuantEase, arXiv 2309.01885, does), column by
    column; then the scale of the group, together with a float zero, is the least-squares one with all else held; and
    both once more. Each step can only lower tr(E H Eᵀ).

    Args:
        q: the rounded weight to start from.
        w: float32 [N, K].
        hessian: float32 [K, K] in the same basis.
        sweeps: how often; 0 returns `q`.
    """
    if not sweeps:
        return q
    hessian, group = damped(hessian), w.shape[1] // q.scales.shape[1]
    codes, errors = q.codes.T.contiguous(), (w - q.weight()).T.contiguous()
    scales = q.scales.T.float().contiguous()
    zeros = torch.full_like(scales, midrise_zero(q.bits)) if q.zeros is None else q.zeros.T.float().contiguous()
    for _ in range(sweeps):
        for n in range(len(scales)):
            part = slice(n * group, (n + 1) * group)
            pull = hessian[part] @ errors  # −½ gradient by every weight of the group
            near, moved = hessian[part, part], codes[part].float()
            for _ in range(_PASSES):
                moved, pull = _descend(moved, scales[n], pull, near, largest_code(q.bits))
                scales[n], zeros[n], pull = _fit(moved, scales[n], zeros[n], pull, near, q)
            codes[part], errors[part] = moved, w.T[part] - scales[n] * (moved - zeros[n])
    zeros = None if q.zeros is None else zeros.T.half().contiguous()
    return Quantized(codes.T.contiguous(), scales.T.half().contiguous(), zeros, q.bits)


def _descend(
    codes: torch.Tensor, scale: torch.Tensor, pull: torch.Tensor, near: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a group [group, N] moved to their best values, and −½ of the gradient there."""
    curvature = near.diagonal()[:, None]
    unit = curvature * scale
    coupling = -near / curvature
    coupling.diagonal().zero_()
    best = codes + pull / unit  # every code's best value, which its own moves leave as it is
    codes = _round_in_turn(best, codes, coupling, top)
    return codes, (best - codes) * unit


def _fit(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, pull: torch.Tensor, near: torch.Tensor, q: Quantized
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and zero [N] of a group that are best for its codes [group, N], other groups held; and −½ of the gradient.

    A weight is scale · (code − middle) + offset: two coefficients, or one where levels are mid-rise.
    """
    middle = midrise_zero(q.bits)
    centred, reach = codes - middle, near.sum(1)
    spread = near @ centred
    curvature, slope = (centred * spread).sum(0), (centred * pull).sum(0)
    if q.zeros is None:
        cross, total, rise = torch.zeros_like(slope), 1.0, torch.zeros_like(slope)
    else:
        cross, total, rise = reach @ centred, reach.sum(), pull.sum(0)
    determinant = curvature * total - cross.square()
    offset = scale * (middle - zero)
    fitted = scale + (slope * total - rise * cross) / determinant
    usable = (fitted > 0.25 * scale) & (fitted < 4 * scale)  # else the system was near singular
    shifted = middle - (offset + (rise * curvature - slope * cross) / determinant) / fitted
    usable &= shifted.abs() < 1e4
    fitted = torch.where(usable, fitted, scale).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
    shifted = torch.where(usable, shifted, zero).half().float()
    # the change of the error from the old scale and offset to those that float16 holds
    ds, do = fitted - scale, fitted * (middle - shifted) - offset
    better = ds * (curvature * ds - 2 * slope) + do * (2 * cross * ds + total * do - 2 * rise) < 0
    ds, do = ds * better, do * better
    pull = pull - ds * spread - do * reach[:, None]
    return torch.where(better, fitted, scale), torch.where(better, shifted, zero), pull


def output_energy(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """tr(W H Wᵀ), the mean of ‖W x‖² over tokens, for float32 [N, K]; the same in every rotated basis.

    Value and gradient take one product with H together.
    """
    with torch.no_grad():
        half = weight @ hessian  # half of the gradient, for H is symmetric
    return (half * (2 * weight - weight.detach())).sum()


def output_error(w: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative output error ‖(W − Ŵ) x‖² / ‖W x‖² summed over the tokens behind the Hessian."""
    return float(output_energy(rounded - w, hessian) / output_energy(w, hessian))
