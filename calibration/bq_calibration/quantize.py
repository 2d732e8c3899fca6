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
_MOST_FLOATS = 2**28  # in memory at a time while scales are solved for


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
    diagonal = hessian.diagonal().mean() * share + 1e-8
    return hessian + diagonal * torch.eye(len(hessian), device=hessian.device)


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
    # upper factor U of H⁻¹ = UᵀU; row j holds how column j's error moves to the columns after it. H = RRᵀ with R upper
    # triangular, the Cholesky factor of H read backwards, so U = R⁻¹: H itself is never inverted
    root = torch.linalg.cholesky(damped(hessian).flip(0, 1)).flip(0, 1)
    factor = torch.linalg.solve_triangular(root, torch.eye(len(root), device=w.device), upper=True)
    pivot = factor.diagonal()
    columns = w.T.clone()
    codes, top = torch.empty_like(columns, dtype=torch.uint8), largest_code(bits)
    all_scales, all_zeros = [], []
    for start in range(0, len(columns), group):
        stop = start + group
        part, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        importance = pivot[start:stop].square().reciprocal()[None]
        scales, zeros = search_scale(part.T[:, None], bits, zero_point, importance)
        scale = scales[:, 0].float()
        zero = midrise_zero(bits) if zeros is None else zeros[:, 0].float()
        for j in range(group):
            code = (part[j] / scale + zero).round_().clamp_(0, top)
            codes[start + j] = code
            errors[j] = (part[j] - scale * (code - zero)) / pivot[start + j]
            part[j + 1 :] -= factor[start + j, start + j + 1 : stop, None] * errors[j]
        columns[stop:] -= factor[start:stop, stop:].T @ errors
        all_scales.append(scales)
        if zeros is not None:
            all_zeros.append(zeros)
    return Quantized(
        codes.T.contiguous(), torch.cat(all_scales, 1), torch.cat(all_zeros, 1) if all_zeros else None, bits
    )


def refine(q: Quantized, w: torch.Tensor, hessian: torch.Tensor, sweeps: int) -> Quantized:
    """Lower the output error of a rounded weight: coordinate descent over the codes, then least squares for the scales.

    Every code moves to its best value with all others held (as QuantEase, arXiv 2309.01885, does), column by column;
    then the scales of a row, together with its float zeros, solve their normal equations with the codes held. Each
    step can only lower tr(E H Eᵀ), but for the rounding of scales to float16.

    Args:
        q: the rounded weight to start from.
        w: float32 [N, K].
        hessian: float32 [K, K] in the same basis.
        sweeps: how often; 0 returns `q`.
    """
    hessian = damped(hessian)
    for _ in range(sweeps):
        q = _descend_codes(q, w, hessian)
        q = _solve_scales(q, w, hessian)
    return q


def _descend_codes(q: Quantized, w: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    group = w.shape[1] // q.scales.shape[1]
    codes, rounded, top = q.codes.T.contiguous(), q.weight().T.contiguous(), largest_code(q.bits)
    pull = hessian @ (w.T - rounded)  # −½ gradient by every weight
    for start in range(0, w.shape[1], group):
        part = slice(start, start + group)
        scale = q.scales[:, start // group].float()
        zero = midrise_zero(q.bits) if q.zeros is None else q.zeros[:, start // group].float()
        local, near, before = pull[part].clone(), hessian[part, part], rounded[part].clone()
        for j in range(group):
            target = rounded[start + j] + local[j] / near[j, j]
            code = (target / scale + zero).round_().clamp_(0, top)
            value = scale * (code - zero)
            local -= near[:, j, None] * (value - rounded[start + j])
            codes[start + j], rounded[start + j] = code, value
        pull -= hessian[:, part] @ (rounded[part] - before)
    return Quantized(codes.T.contiguous(), q.scales, q.zeros, q.bits)


def _solve_scales(q: Quantized, w: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    rows = max(1, _MOST_FLOATS // (q.scales.shape[1] * w.shape[1]))
    starts = range(0, len(w), rows)
    parts = [_solve_rows(q.rows(start, start + rows), w[start : start + rows], hessian) for start in starts]
    zeros = None if q.zeros is None else torch.cat([part.zeros for part in parts])
    return Quantized(q.codes, torch.cat([part.scales for part in parts]), zeros, q.bits)


def _solve_rows(q: Quantized, w: torch.Tensor, hessian: torch.Tensor) -> Quantized:
    (rows, columns), groups = w.shape, q.scales.shape[1]
    group, middle = columns // groups, midrise_zero(q.bits)
    codes = q.codes.float().view(rows, groups, group)
    # a row is Σ over groups of coefficient · basis: centred codes by s, and with float zeros ones by −s·(z − middle)
    bases = [codes - middle] if q.zeros is None else [codes - middle, torch.ones_like(codes)]
    blocks = hessian.view(groups, group, columns)
    projected = [torch.einsum("ngi,gik->ngk", basis, blocks) for basis in bases]  # basis · H, [N, groups, K]
    normal = torch.cat(
        [
            torch.cat([torch.einsum("ngkj,nkj->ngk", p.unflatten(2, (groups, group)), b) for b in bases], 2)
            for p in projected
        ],
        1,
    )
    target = torch.cat([torch.einsum("ngk,nk->ng", p, w) for p in projected], 1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-30
    solution = torch.linalg.solve(normal + ridge * torch.eye(normal.shape[1], device=w.device), target)
    scales = solution[:, :groups]
    usable = (scales > 0.25 * q.scales.float()) & (scales < 4 * q.scales.float())  # else the system was near singular
    new_scales = torch.where(usable, scales, q.scales.float()).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
    new_zeros = q.zeros
    if q.zeros is not None:
        zeros = middle - solution[:, groups:] / scales
        usable &= zeros.abs() < 1e4
        new_scales = torch.where(usable, new_scales, q.scales)
        new_zeros = torch.where(usable, zeros, q.zeros.float()).half()
    # of the error sᵀ·normal·s − 2·sᵀ·target + const, the change from old to new coefficients; no product with H again
    new, old = (_coefficients(*pair, middle) for pair in ((new_scales, new_zeros), (q.scales, q.zeros)))
    change = ((new - old) * (torch.einsum("nij,nj->ni", normal, new + old) - 2 * target)).sum(1, keepdim=True)
    better = change < 0
    zeros = None if q.zeros is None else torch.where(better, new_zeros, q.zeros)
    return Quantized(q.codes, torch.where(better, new_scales, q.scales), zeros, q.bits)


def _coefficients(scales: torch.Tensor, zeros: torch.Tensor | None, middle: float) -> torch.Tensor:
    """What multiplies centred codes, and with float zeros the ones, in every group of a row: [N, groups or twice]."""
    scales = scales.float()
    return scales if zeros is None else torch.cat([scales, scales * (middle - zeros.float())], 1)


def output_error(w: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Relative output error ‖(W − Ŵ) x‖² / ‖W x‖² summed over the tokens behind the Hessian."""
    delta = rounded - w
    return float(((delta @ hessian) * delta).sum() / ((w @ hessian) * w).sum())
