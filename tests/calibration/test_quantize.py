import itertools

import pytest
import torch
from bq_calibration import quantize
from bq_calibration.quantize import (
    Quantized,
    corrected,
    damped,
    output_error,
    refine,
    round_gptq,
    round_nearest,
    search_scale,
)
from bq_kernels.reference import dequantize


def correlated_inputs(tokens: int, features: int) -> torch.Tensor:
    return torch.randn(tokens, features) @ torch.randn(features, features) / features**0.5


@pytest.mark.parametrize(("zero_point", "published"), [("midrise", 0.112), ("float", 0.102)])
def test_searched_scale_reaches_the_known_gaussian_error(zero_point, published):
    """Mean squared error of 2-bit groups of 64 of a unit Gaussian; a min-max scale has 0.207."""
    w = torch.randn(2048, 64)
    error = (round_nearest(w, 2, 64, zero_point).weight() - w).square().mean()
    assert error == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_point", ["midrise", "float"])
@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_stored_tensors_decode_to_the_rounded_weight(bits, zero_point, rounding):
    w, x = torch.randn(12, 96) * 0.02, correlated_inputs(300, 96)
    hessian = x.T @ x
    q = round_nearest(w, bits, 32, zero_point) if rounding == "rtn" else round_gptq(w, hessian, bits, 32, zero_point)
    stored = q.tensors()
    decoded = dequantize(stored["qweight"], stored["scales"], stored.get("zeros"), 96)
    assert torch.equal(decoded, q.weight())
    assert (stored["scales"] > 0).all()


@pytest.mark.parametrize("zero_point", ["midrise", "float"])
def test_gptq_beats_nearest_rounding_on_correlated_inputs(zero_point):
    w, x = torch.randn(32, 128), correlated_inputs(2000, 128)
    hessian = x.T @ x / len(x)
    nearest = output_error(w, round_nearest(w, 2, 64, zero_point).weight(), hessian)
    gptq = output_error(w, round_gptq(w, hessian, 2, 64, zero_point).weight(), hessian)
    assert gptq < 0.8 * nearest


def test_gptq_with_uncorrelated_inputs_is_nearest_rounding():
    w = torch.randn(16, 64)
    gptq = round_gptq(w, torch.eye(64), 2, 32, "midrise")
    nearest = round_nearest(w, 2, 32, "midrise")
    assert torch.equal(gptq.codes, nearest.codes)
    assert torch.equal(gptq.scales, nearest.scales)


def test_relative_output_error_is_that_of_the_tokens():
    w, x = torch.randn(8, 32), torch.randn(500, 32)
    rounded = w + 0.1 * torch.randn_like(w)
    direct = ((x @ (rounded - w).T).square().sum() / (x @ w.T).square().sum()).item()
    assert output_error(w, rounded, x.T @ x) == pytest.approx(direct, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_correction_takes_back_an_error_that_the_inputs_tell(share, monkeypatch):
    """Where x = A x16, W A⁻¹ gives W x16 exactly; a share of the way there leaves the rest of the error."""
    monkeypatch.setattr(quantize, "CORRECTION_DAMPING", 1e-6)
    w, x16 = torch.randn(8, 32), torch.randn(2000, 32)  # well conditioned: damping is a share of the mean diagonal
    error = torch.eye(32) + 0.02 * torch.randn(32, 32)
    x = x16 @ error.T
    found = corrected(w, x.T @ x / len(x), (x16 - x).T @ x / len(x), share)
    expected = (1 - share) * w + share * w @ torch.linalg.inv(error)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert share or torch.equal(found, w)


def test_correction_ignores_errors_that_the_inputs_do_not_tell():
    w, x = torch.randn(8, 32), correlated_inputs(20_000, 32)
    drift = torch.randn_like(x).T @ x / len(x)
    assert (corrected(w, x.T @ x / len(x), drift, 1.0) - w).norm() < 0.1 * w.norm()


@pytest.mark.parametrize("zero_point", ["midrise", "float"])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 3e4])
def test_extreme_groups_have_finite_scales(zero_point, scale):
    w = torch.randn(4, 2, 32) * scale
    scales, zeros = search_scale(w, 2, zero_point)
    assert torch.isfinite(scales).all() and (scales > 0).all()
    assert zeros is None or torch.isfinite(zeros).all()


def test_singular_hessian_is_survived():
    x = torch.randn(5, 64)  # fewer tokens than features
    q = round_gptq(torch.randn(8, 64), x.T @ x, 2, 32, "midrise")
    assert torch.isfinite(q.weight()).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero_point", ["midrise", "float"])
def test_refining_lowers_the_output_error(bits, zero_point):
    w, x = torch.randn(48, 128), correlated_inputs(2000, 128)
    hessian = x.T @ x / len(x)
    rounded = round_gptq(w, hessian, bits, 32, zero_point)
    errors = [output_error(w, refine(rounded, w, hessian, n).weight(), hessian) for n in range(4)]
    assert errors[1] < 0.97 * errors[0]
    # a step that float16 scales would make a loss is not taken; 1e-5 for sums in float32
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors[1:]))


@pytest.mark.parametrize("zero_point", ["midrise", "float"])
def test_refining_ends_where_no_code_and_no_scale_can_gain(zero_point):
    w, x = torch.randn(6, 48), correlated_inputs(2000, 48)
    hessian = x.T @ x / len(x)
    q = refine(round_gptq(w, hessian, 2, 16, zero_point), w, hessian, 200)

    def errors(codes, scales):
        e = w - Quantized(codes, scales, q.zeros, 2).weight()
        return ((e @ damped(hessian)) * e).sum(1)

    best = errors(q.codes, q.scales)
    for column in range(48):
        for step in (-1, 1):
            codes = q.codes.clone().int()
            codes[:, column] = (codes[:, column] + step).clamp(0, 3)
            assert (errors(codes.byte(), q.scales) >= best * (1 - 1e-4)).all()
    for group in range(3):
        for factor in (0.99, 1.01):
            scales = q.scales.clone()
            scales[:, group] *= factor
            assert (errors(q.codes, scales) >= best * (1 - 1e-4)).all()


@pytest.mark.parametrize("group", [32, 96])
def test_gptq_is_that_of_the_inverse_hessian(group):
    """Codes and scales of the published loop, H⁻¹ and all, in float64."""
    w, x = torch.randn(24, 96), correlated_inputs(2000, 96)
    hessian = x.T @ x / len(x)
    inverse = torch.linalg.inv(damped(hessian).double())
    factor, columns = torch.linalg.cholesky(inverse, upper=True), w.double().clone()
    q = round_gptq(w, hessian, 2, group, "midrise")
    for j in range(96):
        n = j // group
        if j % group == 0:
            importance = factor.diagonal()[j : j + group].square().reciprocal()[None].float()
            scales, _ = search_scale(columns[:, None, j : j + group].float(), 2, "midrise", importance)
            torch.testing.assert_close(q.scales[:, n], scales[:, 0], rtol=2e-3, atol=0)
        scale = q.scales[:, n].double()
        code = (columns[:, j] / scale + 1.5).round().clamp(0, 3)
        near_tie = ((columns[:, j] / scale + 1.5) % 1 - 0.5).abs() < 1e-3  # float32 may round either way
        assert ((code == q.codes[:, j]) | near_tie).all()
        error = (columns[:, j] - scale * (q.codes[:, j].double() - 1.5)) / factor[j, j]
        columns[:, j:] -= error[:, None] * factor[j, j:]


@pytest.mark.parametrize("zero_point", ["midrise", "float"])
def test_columns_are_rounded_a_panel_at_a_time(zero_point, monkeypatch):
    w, x = torch.randn(32, 64), correlated_inputs(500, 64)
    hessian = x.T @ x / len(x)

    def rounded():
        return refine(round_gptq(w, hessian, 2, 32, zero_point), w, hessian, 1)

    whole = rounded()
    monkeypatch.setattr(quantize, "_PANEL", 5)  # not a divisor of the group
    parts = rounded()
    assert (parts.codes == whole.codes).float().mean() > 0.99  # but for ties that float32 decides
    assert output_error(w, parts.weight(), hessian) == pytest.approx(output_error(w, whole.weight(), hessian), rel=1e-3)
