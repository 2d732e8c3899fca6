"""int8 activations of a prefill: the kernels against plain torch, and where they are used."""

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import activations, ops, reference, tiles, triton_gemm_int8, triton_rotate_int8
from bq_kernels.activations import DECODE_ROWS
from bq_kernels.format import midrise_zero
from bq_kernels.gpu import nearest_capability
from bq_kernels.prepared import prepare_weights, prepared_linear

from .layers import (
    BRAIN,
    FLOAT,
    HALF,
    assert_within,
    exact_levels,
    random_layer,
    random_tables,
    strided,
)

EPS = torch.finfo(FLOAT).eps
HALF_STEP = 0.5 + 3 * activations.LARGEST_INT8 * EPS  # a code's error, with three roundings before it


def side_by_side(codes, scales):
    """Codes and scales as one tensor, float32 [M, K + K/unit]: the fixture hands one tensor back."""
    return torch.cat([codes.float(), scales.T], dim=1)


def rotate_kernel(x, cos_sin, mix, unit):
    x = x.float() if x.dtype == BRAIN and not x.is_cuda else x
    return side_by_side(*triton_rotate_int8.rotate_to_int8(x, cos_sin, mix, unit))


def rotated_both(call, x, tables, unit):
    """int8 codes [M, K] and scales [K/unit, M] of the kernel and of plain torch."""
    for found in (call(rotate_kernel, x, *tables, unit), side_by_side(*activations.rotate_to_int8(x, *tables, unit))):
        codes, scales = found.split([x.shape[1], x.shape[1] // unit], dim=1)
        yield codes.to(torch.int8), scales.T.contiguous()


def check_rotate(call, x, block, unit):
    """Both sides are within half a scale of Q x, and every unit's largest magnitude is met but for float32."""
    features = x.shape[1]
    tables = random_tables(features // block, block) if block else (None, None)
    want = (reference.apply_rotation(x.float(), *tables) if block else x.float()).double()
    roundings = 2 * (3 * tables[0].shape[2] + tables[1].shape[-1] + 1) if block else 0
    norm = x.double().norm(dim=1).view(-1, 1, 1)
    want = want.unflatten(1, (-1, unit))
    largest = want.abs().amax(2, keepdim=True)
    for codes, scales in rotated_both(call, x, tables, unit):
        assert (codes.shape, scales.shape) == (x.shape, (features // unit, len(x)))
        codes, scales = codes.double().view_as(want), scales.double().T[..., None]
        assert codes.abs().max() <= activations.LARGEST_INT8
        assert ((scales * activations.LARGEST_INT8 - largest).abs() <= roundings * EPS * norm + 2 * EPS * largest).all()
        off = (codes * scales - want).abs()
        assert (off <= HALF_STEP * scales + roundings * EPS * norm).all()


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize(
    ("rows", "features", "block", "unit"),
    [
        (1, 32, None, 32),
        (5, 192, None, 64),
        (5, 192, 64, 64),
        (5, 256, 128, 32),  # several units in a block
        (19, 384, 32, 128),  # several blocks in a unit
        (3, 192, 96, 32),
        (3, 192, 96, 64),  # a unit in two blocks, neither of them a power of two
        (3, 96, 3, 32),
        (2, 576, 576, 64),
        (33, 128, 128, 128),
        (7, 160, 32, 32),
        (3, 96, 1, 32),
    ],
)
def test_rotate_to_int8(call, rows, features, block, unit, dtype):
    check_rotate(call, torch.randn(rows, features).to(dtype), block, unit)


WIDE = [(8192, 8192, 128), (11008, 11008, 64), (17408, 512, 128), (17408, 1088, 32)]
WIDE.append(pytest.param(17408, 17408, 64, marks=pytest.mark.slow))


@pytest.mark.parametrize(("features", "block", "unit"), WIDE)
def test_rotate_wide_tokens(call, features, block, unit):
    check_rotate(call, torch.randn(2, features).half(), block, unit)


@pytest.mark.parametrize("factor", [0.0, 1e-7, 1e-3, 6e4])
def test_rotate_extremes(call, factor):
    check_rotate(call, (torch.randn(4, 192).clamp(-1, 1) * factor).half(), 64, 32)


def test_an_outlier_costs_only_its_unit(call):
    x = torch.rand(3, 128).half()
    x[1, 70] = 1000
    for _, scales in rotated_both(call, x, (None, None), 32):
        assert (scales > 2 / activations.LARGEST_INT8).nonzero().tolist() == [[2, 1]]


def test_rotate_strided(call):
    for x in strided(192, HALF):
        if x.dim() == 2:
            check_rotate(call, x, 96, 32)
            check_rotate(call, x, 96, 64)


def test_tokens_that_are_not_finite(call):
    """A token with NaN or infinity ends in numbers that are not finite; the others do not change."""
    x, tables = torch.randn(4, 128).half(), random_tables(2, 64)
    x[1, 5], x[2, 127] = float("nan"), float("inf")
    for float_zero in (False, True):
        packed = random_layer(9, 128, 2, 32, float_zero)[3]
        for codes, scales in rotated_both(call, x, tables, 32):
            # a rotation block is two units
            finite = [[True, False, True, True]] * 2 + [[True, True, False, True]] * 2
            assert scales.isfinite().tolist() == finite
            arguments = codes, scales, *packed, None, 9, FLOAT
            for y in (call(gemm_kernel, *arguments), tiles.int8_linear(*arguments)):
                assert y[[0, 3]].isfinite().all() and not y[1:3].isfinite().any()


def gemm_kernel(x, *arguments):
    """The launcher. Triton's interpreter multiplies the bit patterns of bfloat16: there it stores float32."""
    *layer, dtype = arguments
    given = FLOAT if dtype == BRAIN and not x.is_cuda else dtype
    return triton_gemm_int8.int8_linear(x, *layer, given).to(dtype)


def check_gemm(call, rows, out_features, in_features, bits, group, float_zero, dtype=HALF, bias=False):
    codes, scales, zeros, packed = random_layer(out_features, in_features, bits, group, float_zero)
    x = torch.randint(-127, 128, (rows, in_features), dtype=torch.int8)
    unit = tiles.unit_of(group)
    x_scales = torch.rand(in_features // unit, rows) / 127
    bias = torch.randn(out_features).to(dtype) if bias else None
    centre = midrise_zero(bits)
    step, zero = exact_levels(scales, zeros, in_features, bits)
    exact = x.double() * x_scales.double().T.repeat_interleave(unit, dim=1)
    want = exact @ (step * (codes - zero)).T
    # int32 sums are exact; what is left are float32 roundings, at most one per term
    terms = exact.abs() @ (step * ((codes - centre).abs() + (zero - centre).abs())).T
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    arguments = x, x_scales, *packed, bias, out_features, dtype
    for found in (call(gemm_kernel, *arguments), tiles.int8_linear(*arguments)):
        assert (found.dtype, found.shape) == (dtype, (rows, out_features))
        assert_within(found, want, (in_features + 8) * EPS * terms)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gemm(call, bits, float_zero, dtype):
    check_gemm(call, 5, 70, 192, bits, 64, float_zero, dtype, bias=True)


@pytest.mark.parametrize(
    ("rows", "out_features", "in_features", "group"),
    [
        (1, 1, 32, 32),
        (70, 33, 576, 96),
        (130, 129, 256, 128),
        (3, 64, 512, 256),
        (9, 65, 160, 160),
        (3, 33, 384, 192),
        (300, 3, 384, 384),  # more tokens than a program takes, one group a row
    ],
)
def test_gemm_shapes(call, rows, out_features, in_features, group):
    check_gemm(call, rows, out_features, in_features, 3, group, True)


@pytest.mark.parametrize("block", [64, 96, None])
def test_prefill_rounds_and_decode_does_not(call, block):
    """The operator and plain torch on stored words: int8 from one row more than DECODE_ROWS, and only if asked."""
    out_features, in_features = 9, 192
    words = torch.randint(-(2**31), 2**31, (out_features, in_features * 2 // 32), dtype=torch.int32)
    scales = torch.rand(out_features, 3).half()
    angles = torch.rand(in_features // block, reference.num_angles(block)) if block else None
    tiled, plain = (
        prepare_weights(words, scales, None, angles, block or 1, in_features, tiled=t) for t in (True, False)
    )
    tables = tiled.cos_sin, tiled.mix
    x = torch.randn(2, DECODE_ROWS // 2 + 1, in_features).half()
    few = x[0]
    arguments = *tiled[:3], None, out_features, *tables
    codes, x_scales = activations.rotate_to_int8(x.flatten(0, 1), *tables, 64)
    want = tiles.int8_linear(codes, x_scales, *arguments[:5], HALF).view(2, -1, out_features)
    exact = tiles.tiled_linear(x, *arguments)
    assert (want - exact).abs().max() > 0.04
    # a code may fall to the other side of a rounding: one step of x in a few columns
    tolerance = {"rtol": 2e-3, "atol": float(x_scales.max() * scales.max() * 4)}
    for got in (
        call(ops.packed_linear, x, *arguments, 8),
        tiles.tiled_linear(x, *arguments, 8),
        prepared_linear(x, plain, None, out_features, 8),
    ):
        torch.testing.assert_close(got, want, **tolerance)
    as_rounded = {"rtol": 2e-3, "atol": 0.02}  # to 16 bits; less than what rounding to int8 changes
    for bits, rows in ((16, x), (8, few)):
        exact = tiles.tiled_linear(rows, *arguments)
        torch.testing.assert_close(call(ops.packed_linear, rows, *arguments, bits), exact, **as_rounded)
        torch.testing.assert_close(prepared_linear(rows, plain, None, out_features, bits), exact, **as_rounded)


def test_tight_launches():
    """Kinds that registers would not hold otherwise take smaller programs, at most."""
    launches = triton_gemm_int8.LAUNCHES
    for (architecture, bits, unit), change in triton_gemm_int8.TIGHT.items():
        config = triton_gemm_int8.launch_config(architecture, bits, unit)
        assert config.items() >= change.items() and config["num_stages"] == config["STAGES"]
        assert all(config[name] <= value for name, value in launches[architecture].items())
    assert triton_gemm_int8.launch_config("sm86", 2, 128).items() >= launches["sm80"].items()


def test_every_capability_has_a_launch():
    names = ("sm80", "sm89", "sm90", "sm120", "gfx942", "")
    assert {nearest_capability(name) for name in names} == set(triton_gemm_int8.LAUNCHES)
