"""The decode kernel on mma.sync, run from its compiled PTX (ptxsim.py): inline PTX cannot be interpreted.

x is arranged by the torch reference here; test_triton.py holds the kernel that arranges it to that reference, in the
interpreter, and runs both kernels where there is a GPU.
"""

import math
import random

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import operands, ops, reference, triton_linear, triton_mma
from bq_kernels.format import midrise_zero
from bq_kernels.gpu import Gpu
from bq_kernels.tiles import tiled_linear
from bq_kernels.triton_linear import Launch

from .aot import record_launches
from .layers import BRAIN, FLOAT, HALF, assert_within, exact_levels, random_layer, random_tables
from .ptxsim import simulate

pytestmark = pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")


def mma(outputs=32, warps=4, stages=2, exact=False):
    return Launch(16, "mma", outputs=outputs, warps=warps, stages=stages, exact=exact)


def arrange_by_reference(x, cos_sin, bits, unit, exact, gpu, norm):
    x = x.float()
    if cos_sin is not None:
        x = reference.apply_rotation(x, cos_sin, torch.ones(cos_sin.shape[0], 1, 1))
    return operands.arrange(x, bits, unit, exact)


def simulated(monkeypatch, x, packed, bias, out_features, tables=(None, None), launch=None, target="sm90"):
    """packed_linear by the machine code of a target, on tensors on the CPU; outputs that it leaves out are NaN."""
    with monkeypatch.context() as patch:
        patch.setattr(triton_linear, "rotate_and_arrange", arrange_by_reference)
        kernels = [(triton_mma, "_mma_kernel")]
        arguments = x, *packed, bias, out_features, *tables, launch or mma()
        [launch], out = record_launches(patch, target, kernels, triton_linear, "packed_linear", *arguments)
    out.fill_(math.nan)
    simulate(launch, target, launch.tensors()[:2])
    return out


def check(monkeypatch, x, out_features, bits, group, float_zero, *, bias=None, block=None, launch=None, target="sm90"):
    in_features, dtype = x.shape[-1], x.dtype
    codes, scales, zeros, packed = random_layer(out_features, in_features, bits, group, float_zero)
    tables = random_tables(in_features // block, block) if block else (None, None)
    got = simulated(monkeypatch, x, packed, bias, out_features, tables, launch, target)
    assert (got.dtype, got.shape) == (dtype, (*x.shape[:-1], out_features))
    step, zero = exact_levels(scales, zeros, in_features, bits)
    rotated = (reference.apply_rotation(x.float(), *tables) if block else x).double()
    want = rotated @ (step * (codes - zero)).T
    terms = rotated.abs() @ (step * (codes + zero)).T
    # as in test_triton.py, and x is rounded to float16 behind a rotation, before it only where it has lower bits
    roundings = (in_features + 8) * torch.finfo(FLOAT).eps + (torch.finfo(HALF).eps / 2 if block else 2**-30)
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    assert_within(got, want, roundings * terms)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits(monkeypatch, bits, exact):
    """Both halves of the rows of x, odd outputs, columns that fill no tile, a rotation, and warps with unequal work."""
    dtype = HALF if exact else BRAIN
    x, bias = torch.randn(11, 832).to(dtype), torch.randn(70).to(dtype)
    check(monkeypatch, x, 70, bits, 64, bits != 2, bias=bias, block=64, launch=mma(exact=exact))


@pytest.mark.parametrize(("in_features", "group", "float_zero"), [(256, 128, True), (288, 96, True), (384, 384, False)])
def test_groups(monkeypatch, in_features, group, float_zero):
    check(monkeypatch, torch.randn(1, in_features).half(), 33, 2, group, float_zero)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [16, 32, 48, 64])
@pytest.mark.parametrize(("warps", "stages"), [(1, 2), (4, 1), (4, 2), (8, 2), (16, 1)])
def test_launches(monkeypatch, outputs, warps, stages):
    launch = mma(outputs, warps, stages, random.choice((False, True)))
    rows, bits = random.choice((1, 2, 8, 9, 16)), random.choice((2, 3, 4))
    check(monkeypatch, torch.randn(rows, 1408).half(), 96, bits, 128, bool(rows % 2), launch=launch)


@pytest.mark.slow
def test_real_width(monkeypatch):
    check(monkeypatch, torch.randn(1, 8192).half(), 32, 2, 128, False, block=128, launch=mma(64, 8))
    check(monkeypatch, torch.randn(16, 11008).to(BRAIN), 32, 2, 128, True, block=256, launch=mma(48, 8, 1))


def test_without_dependent_launch(monkeypatch):
    check(monkeypatch, torch.randn(2, 640).half(), 40, 2, 128, False, block=128, target="sm80")


@pytest.mark.parametrize(
    ("dtype", "factor"), [(HALF, 65504.0), (BRAIN, 1e38), pytest.param(BRAIN, 1e-30, marks=pytest.mark.slow)]
)
def test_extreme_inputs(monkeypatch, dtype, factor):
    """The largest and smallest numbers beside each other, and columns of zeros."""
    x = (torch.rand(2, 256) * 2 - 1) * factor
    x[0, 3], x[0, 64:128], x[1, :32] = factor, 0, x[1, :32] * 1e-3
    x = x.to(dtype)
    _, _, _, packed = random_layer(16, 256, 2, 32, False, 2.0**-12)
    got, want = simulated(monkeypatch, x, packed, None, 16), tiled_linear(x, *packed, None, 16)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=2.0**-24 if dtype == HALF else 0)


def test_x_that_is_not_finite_gives_no_number(monkeypatch):
    x = torch.randn(2, 128).half()
    x[0, 5] = random.choice((math.inf, -math.inf, math.nan))
    _, _, _, packed = random_layer(16, 128, 2, 32, False)
    got = simulated(monkeypatch, x, packed, None, 16)
    assert not got[0].isfinite().any() and got[1].isfinite().all()


def test_strided_rows(monkeypatch):
    wide = torch.randn(6, 3 * 192).half()
    check(monkeypatch, wide[::2, 192:384], 20, 4, 64, False, block=64)


# ---- the layout, in plain torch


@pytest.mark.parametrize("width", [2, 4])
def test_fields_keep_to_exact_numbers(width):
    """Every field of a word is found at its place behind its rotation, below bit 11, where a half is q·2ᵖ⁻²⁴."""
    for field in range(16 // width):
        rotation, position, swapped = operands.field_place(width, field)
        assert position >= 2 and position + max(width, 3) <= 11
        for half in range(2):
            word = 1 << (16 * half + width * field)
            rotated = (word >> rotation | word << (32 - rotation)) & 0xFFFFFFFF
            assert rotated == 1 << (16 * (half ^ swapped) + position)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("exact", [False, True])
def test_arranged_products_are_those_of_x(bits, exact):
    """Operands times codes in place, zeros and powers of two undone: Σ (q − z)·x of every unit."""
    x, codes = (torch.randn(3, 320) * 1000).bfloat16(), torch.randint(2**bits, (384,)).float()
    arranged, sums = operands.arrange(x, bits, 64, exact)
    positions, order = operands._columns(bits)
    plain = arranged.reshape(3, -1, 128)[..., order].double()
    weight = (codes.reshape(-1, 128) * torch.exp2(positions - 24.0)).double()
    if exact:
        weight = (codes.reshape(-1, 128) - midrise_zero(bits)).double() * 2.0**-operands.EXACT_EXPONENT
    products = (plain * weight).reshape(3, -1, 64).sum(-1)
    zero = 0.25  # with `exact` codes are centred already
    products += (zero - (midrise_zero(bits) if exact else 0)) * sums[..., 0].T[:3].double()
    back = 2.0 ** (operands.EXACT_EXPONENT if exact else operands.EXPONENT)
    got = (products * sums[..., 1].T[:3]).sum(-1) * back
    want = x.double() @ (codes[:320].double() - zero)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-2)


def test_runs_where_its_instructions_are():
    names = {"sm75": False, "sm80": True, "sm90": True, "sm120": True, "gfx942": False, "": False}
    assert {name: triton_mma.runs_on(Gpu("", name, 1, False)) for name in names} == names


@pytest.mark.parametrize(
    ("rows", "bits", "group", "warps", "strips", "registers"),
    [
        (8, 2, 128, 8, 4, 128),
        (8, 2, 64, 8, 4, None),
        (8, 4, 128, 8, 4, None),
        (16, 4, 128, 8, 2, None),
        (8, 4, 64, 16, 2, None),
    ],
)
def test_registers_that_suffice(rows, bits, group, warps, strips, registers):
    """Room for a second program only where none spills, and fewer strips where one alone would."""
    config = triton_mma.launch_config(rows, bits, group, 8192, False, 64, warps, 2, 2, False)
    assert (config["STRIPS"], config.get("maxnreg")) == (strips, registers)
