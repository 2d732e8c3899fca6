"""RMSNorm inside the packed linear: the kernels and plain torch against float64."""

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import (
    activations,
    operands,
    ops,
    reference,
    tiles,
    triton_arrange,
    triton_linear,
    triton_norm,
    triton_rotate,
)
from bq_kernels.gpu import gpu_of
from bq_kernels.triton_linear import Launch
from bq_kernels.triton_norm import FUSED_ROWS

from .layers import (
    BRAIN,
    FLOAT,
    HALF,
    assert_within,
    decode,
    exact_levels,
    gemm,
    random_layer,
    random_tables,
    strided,
)

EPS = torch.finfo(FLOAT).eps
# relative, of h before it is rounded: half that of the mean, whose terms are added in a tree (at most 64 roundings on
# the way of one), and a few for the square root and the products
NORM_ERROR = (64 / 2 + 8) * EPS


def exact_norm(x, residual, weight, epsilon):
    """h and t in float64."""
    total = x.double() if residual is None else x.double() + residual.double()
    return weight.double() * total / (total.pow(2).mean(-1, keepdim=True) + epsilon).sqrt(), total


def block_norms(h, block):
    return h.unflatten(-1, (-1, block)).norm(dim=-1).repeat_interleave(block, dim=-1)


def rotation_error(h, tables, block):
    """What float32 may be off in Q h, with the error of h itself."""
    roundings = 2 * (3 * tables[0].shape[2] + tables[1].shape[-1] + 1)
    return (roundings * EPS + NORM_ERROR) * block_norms(h, block)


def both(x, *arguments):
    """Q h and t of the kernel side by side: the fixture hands one tensor back."""
    x = x.float() if x.dtype == BRAIN and not x.is_cuda else x  # Triton's interpreter multiplies its bit patterns
    out, total = triton_norm.rms_norm(x, *arguments)
    return torch.stack([out, out if total is None else total])


def check_norm(call, x, residual, weight, block, epsilon=1e-5):
    tables = random_tables(x.shape[-1] // block, block) if block else ()
    out, total = call(both, x, residual, weight, epsilon, *tables).to(x.dtype)
    h, _ = exact_norm(x, residual, weight, epsilon)
    want = reference.apply_rotation(h, *tables) if block else h
    bound = rotation_error(h, tables, block) if block else NORM_ERROR * h.abs()
    assert_within(out, want, bound)
    plain, plain_total = reference.rms_norm(x, residual, weight, epsilon)
    # rounded to the dtype of the weight, the product once more, then to that of x
    assert_within(plain, h, (NORM_ERROR + torch.finfo(weight.dtype).eps) * h.abs())
    if residual is None:
        assert plain_total is None
    else:
        assert torch.equal(total, plain_total)
        assert torch.equal(plain_total, (x.float() + residual.float()).to(x.dtype))


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize(
    ("rows", "features", "block"),
    [
        (3, 576, 64),  # nine blocks, in a program of sixteen
        (2, 576, 576),
        (1, 1536, 512),
        (5, 192, 96),
        (1, 192, 192),
        (2, 2112, 64),  # two programs per row
        (4, 6, 3),
        (3, 70, None),
        (2, 96, 1),
    ],
)
def test_norm(call, rows, features, block, dtype):
    weight_dtype = FLOAT if rows == 2 else dtype  # Gemma's is 1 + the stored one, in float32
    weight = 1 + torch.randn(features).to(weight_dtype) / 4
    for residual in (None, torch.randn(rows, features).to(dtype) * 3):
        check_norm(call, torch.randn(rows, features).to(dtype), residual, weight, block)


WIDE = [(1536, 1536), (5120, 5120), (11008, 11008), (8192, 128)]
WIDE = [(2048, 2048), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in WIDE)]


@pytest.mark.parametrize(("features", "block"), WIDE)
def test_norm_of_wide_rows(call, features, block):
    """In two passes where blocks are wide, with any number of rows."""
    for rows in (1, triton_rotate.FEW_ROWS + 1):
        x, residual = torch.randn(2, rows, features).half()
        check_norm(call, x, residual, torch.rand(features).half(), block)


def test_norm_of_strided_inputs(call):
    for x in strided(192, HALF):
        residual = torch.randn(*x.shape[:-1], 384).half()[..., ::2]
        check_norm(call, x, residual, torch.rand(384).half()[::2], 64)


@pytest.mark.parametrize("factor", [0.0, 1e-7, 2e4])
def test_norm_of_extreme_inputs(call, factor):
    """t² is far beyond float16; rows of zeros stay zeros."""
    x, residual = (torch.randn(2, 3, 192).clamp(-1, 1) * factor).half()
    check_norm(call, x, residual, torch.ones(192).half(), 64)


def arranged(x, residual, weight, epsilon, cos_sin, bits, unit, exact):
    """Operands and sums of the rows of x, and t, as one row of float32."""
    norm = triton_norm.norm_of(x, residual, weight, epsilon)
    parts = triton_arrange.rotate_and_arrange(x, cos_sin, bits, unit, exact, gpu_of(x), norm)
    sums = parts[1][:, : x.shape[0]]
    return torch.cat([parts[0].float().flatten(), sums.flatten(), norm.total.float().flatten()])


@pytest.mark.parametrize(
    ("rows", "features", "block", "bits", "unit", "exact"),
    [(1, 192, 64, 2, 64, False), (5, 1152, 128, 3, 128, True), (2, 2048, 1024, 4, 32, False)],
)
def test_arranged_norm(call, rows, features, block, bits, unit, exact):
    x, residual = torch.randn(2, rows, features)
    weight, tables = torch.rand(features), random_tables(features // block, block)
    got = call(arranged, x, residual, weight, 1e-5, tables[0], bits, unit, exact)
    h, total = reference.rms_norm(x, residual, weight, 1e-5)
    wanted, sums = operands.arrange(reference.apply_rotation(h, *tables), bits, unit, exact)
    parts = got.split([wanted.numel(), sums[:, :rows].numel(), total.numel()])
    # operands are of the order of 2¹¹ times a factor of up to 8, behind a float32 rotation whose sums cancel
    atol = 2.0**14 * 16 * torch.finfo(FLOAT).eps
    torch.testing.assert_close(parts[0].view_as(wanted), wanted.float(), rtol=2.0**-10, atol=atol)
    torch.testing.assert_close(parts[1].view(-1, rows, 2)[..., 1], sums[:, :rows, 1])
    assert torch.equal(parts[2].view_as(total), total)


def linear(x, *arguments):
    """y and t of the launcher, with a choice of launch that the operator does not have, in one row of float32."""
    given = x.float() if x.dtype == BRAIN and not x.is_cuda else x
    results = [t for t in triton_linear.norm_linear(given, *arguments) if t is not None]
    return torch.cat([t.to(x.dtype).float().flatten() for t in results])


def exact_linear(x, residual, weight, layer, group, bits, tables, activation_bits=16):
    """The packed linear behind the norm in float64, without its bias, and by how much rounding may be off."""
    codes, scales, zeros, _ = layer
    features, dtype = x.shape[-1], x.dtype
    block = features // len(tables[0])
    h, _ = exact_norm(x, residual, weight, 1e-5)
    rotated = reference.apply_rotation(h, *tables)
    step, zero = exact_levels(scales, zeros, features, bits)
    dense = step * (codes - zero)
    # Q h is rounded to the dtype, weights and zeros may be; a norm apart rounds h twice, spread over the block by Q
    unit, magnitude = torch.finfo(dtype).eps, (dense.abs() + step).T
    inputs = rotation_error(h, tables, block) + unit * (2 * rotated.abs() + block_norms(h, block))
    if activation_bits == 8:
        columns = tiles.unit_of(group)
        largest = (rotated.abs() + inputs).unflatten(-1, (-1, columns)).amax(-1).repeat_interleave(columns, -1)
        inputs = inputs + largest / activations.LARGEST_INT8 / 2
    return rotated @ dense.T, inputs @ magnitude + (features + 8) * EPS * (rotated.abs() @ (2**bits * magnitude))


def check_linear(call, x, residual, launch, block, bits=2, group=64, out_features=70):
    features, dtype = x.shape[-1], x.dtype
    layer = random_layer(out_features, features, bits, group, bits == 3)
    weight, tables = torch.rand(features).to(dtype) + 0.5, random_tables(features // block, block)
    bias = torch.randn(out_features).to(dtype)
    want, bound = exact_linear(x, residual, weight, layer, group, bits, tables)
    want, bound = want + bias.double(), bound + (features + 8) * EPS * bias.double().abs()
    arguments = *layer[3], bias, out_features, *tables
    got = call(linear, x, residual, weight, 1e-5, *arguments, launch)
    y, total = got.to(dtype).tensor_split([want.numel()])
    assert_within(y.view_as(want), want, bound)
    plain, plain_total = tiles.norm_linear(x, residual, weight, 1e-5, *arguments)
    assert_within(plain, want, bound)
    assert torch.equal(total, total[:0] if residual is None else plain_total.flatten())


LAUNCHES = [decode(), decode(fuse=False), gemm(), Launch(None, "dense"), Launch(None, "dense", fuse=True)]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.kernel}{launch.fuse}")
def test_linear(call, launch):
    """One row, which the decode kernel normalizes itself, and several; blocks within a slice and beyond one."""
    for rows, block, bits, dtype in ((1, 64, 2, HALF), (3, 192, 3, BRAIN), (2, 64, 4, FLOAT)):
        x, residual = torch.randn(2, rows, 192).to(dtype)
        check_linear(call, x, None if bits == 4 else residual, launch, block, bits)


def test_decode_slices(call):
    """Several slices of the row, each held by several programs: one of them writes the sum."""
    for block in (32, 256):
        x, residual = torch.randn(2, 1, 768).half()
        check_linear(call, x, residual, decode(256, programs=64), block)


def test_many_rows(call):
    x, residual = torch.randn(2, FUSED_ROWS + 1, 192).half()
    check_linear(call, x, residual, gemm(32), 64)


def operator(*arguments):
    y, total = ops.norm_linear(*arguments)
    return torch.cat([y.flatten(), (y.new_empty(0) if total is None else total).flatten()])


@pytest.mark.parametrize("rows", [0, 2, pytest.param(activations.DECODE_ROWS + 1, marks=pytest.mark.slow)])
def test_operator(call, rows):
    """The operator runs the kernels, rounds a prefill to int8 if asked, and gives no sum without a residual."""
    layer, tables = random_layer(9, 128, 2, 32, True), random_tables(2, 64)
    x, residual = torch.randn(2, rows, 128).half()
    weight = torch.rand(128).half()
    arguments = weight, 1e-5, *layer[3], None, 9, *tables
    for added in (residual, None):
        (precise, total), (rounded, _) = (tiles.norm_linear(x, added, *arguments, bits) for bits in (16, 8))
        for bits, plain in ((16, precise), (8, rounded)):
            got, sums = call(operator, x, added, *arguments, bits).tensor_split([plain.numel()])
            got, to_int8 = got.view_as(plain), activations.rounds_activations(rows, bits)
            if rows:
                want, bound = exact_linear(x, added, weight, layer, 32, 2, tables, 8 if to_int8 else 16)
                assert_within(got, want, bound)
                assert_within(plain, want, bound)
            if not to_int8:  # two roundings of h to float16
                torch.testing.assert_close(got, plain, rtol=2e-3, atol=0.05)
            else:
                # most codes are the same, and both are as far from what is not rounded
                assert (got - rounded).float().norm() < (got - precise).float().norm()
            assert torch.equal(sums, sums[:0] if added is None else total.flatten())
