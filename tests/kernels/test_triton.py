"""The Triton kernels against the reference: interpreted on the CPU, and on the GPU where there is one."""

import itertools
import json
import math
import random

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import operands, ops, reference, triton_arrange, triton_decode, triton_linear, triton_rotate
from bq_kernels.format import midrise_zero
from bq_kernels.gpu import Gpu, gpu_of
from bq_kernels.tiles import tiled_linear
from bq_kernels.triton_linear import Launch

from .layers import (
    BRAIN,
    FLOAT,
    HALF,
    assert_within,
    decode,
    exact_levels,
    gemm,
    linear,
    random_layer,
    random_tables,
    strided,
)


def check_rotation(call, x, block_size):
    cos_sin, mix = random_tables(x.shape[-1] // block_size, block_size)
    got = call(ops.rotate, x, cos_sin, mix)
    assert (got.dtype, got.shape, got.is_contiguous()) == (x.dtype, x.shape, True)
    # A stage adds at most 3 roundings of what the pair holds, the mix m of the block's norm, and norms are kept; the
    # reference, float32 as well, errs as much
    want = reference.apply_rotation(x.float(), cos_sin, mix).double()
    roundings = 3 * cos_sin.shape[2] + mix.shape[-1] + 1
    norm = x.double().unflatten(-1, (-1, block_size)).norm(dim=-1).repeat_interleave(block_size, dim=-1)
    assert_within(got, want, 2 * roundings * torch.finfo(FLOAT).eps * norm)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((3, 5), 1),
        ((7, 6), 3),
        ((1, 8), 2),
        ((33, 128), 64),
        ((1, 192), 64),
        ((192,), 64),
        ((2, 3, 96), 48),
        ((3, 1024), 512),
        ((5, 576), 576),
        ((2, 576), 64),
        ((3, 86), 43),
    ],
)
def test_rotation(call, shape, block_size, dtype):
    check_rotation(call, torch.randn(shape).to(dtype), block_size)


LARGE = [1536, 4096, 5120, 8192, 11008, 13824, 14336, 16384, pytest.param(17408, marks=pytest.mark.slow)]


@pytest.mark.parametrize("block_size", LARGE)
def test_rotation_of_large_blocks(call, block_size):
    check_rotation(call, torch.randn(2, block_size).half(), block_size)
    check_rotation(call, torch.randn(triton_rotate.FEW_ROWS + 1, block_size).half(), block_size)


@pytest.mark.parametrize("factor", [1e-7, 1e-4, 6e4])
def test_rotation_of_extreme_inputs(call, factor):
    x = torch.randn(4, 192).clamp(-1, 1) * factor
    check_rotation(call, x, 64)
    check_rotation(call, (x / 16).half(), 96)  # below 65504 after it, above it while pairs add up in float16


def test_rotation_of_strided_inputs(call):
    for x in strided(192, HALF):
        check_rotation(call, x, 96)


def arranged(x, cos_sin, bits, unit, exact):
    """Operands, then sums, of the rows of x as one row of float32."""
    parts = triton_arrange.rotate_and_arrange(x, cos_sin, bits, unit, exact, gpu_of(x))
    return torch.cat([parts[0].float().flatten(), parts[1][:, : x.shape[0]].flatten()])


@pytest.mark.parametrize(
    ("rows", "in_features", "block", "bits", "unit", "exact"),
    [
        (1, 256, 128, 2, 128, False),
        (3, 192, 64, 3, 64, False),
        (5, 576, 1, 4, 32, True),
        (16, 1024, 512, 2, 128, False),
        (9, 160, 32, 4, 32, False),
        (2, 1024, 1024, 3, 128, True),
    ],
)
def test_arrange(call, rows, in_features, block, bits, unit, exact):
    """Rows of very different sizes, a unit of zeros, a part of a tile."""
    x = torch.randn(rows, in_features) * torch.tensor([1.0, 1e-20, 1e4, 1e30, 1e-6])[torch.arange(rows) % 5, None]
    x[0, :unit] = 0
    cos_sin, mix = random_tables(in_features // block, block)
    got = call(arranged, x, cos_sin if block > 1 else None, bits, unit, exact)
    want = operands.arrange(reference.apply_rotation(x, cos_sin, mix), bits, unit, exact)
    arranged_x, sums = got.split([want[0].numel(), got.numel() - want[0].numel()])
    # once rounded, to where float32 is off by little
    torch.testing.assert_close(arranged_x.view_as(want[0]), want[0].float(), rtol=2.0**-10, atol=2.0**-10)
    sums, want_sums = sums.view(-1, rows, 2), want[1][:, :rows]
    assert torch.equal(sums[..., 1], want_sums[..., 1])
    torch.testing.assert_close(sums[..., 0], want_sums[..., 0], rtol=1e-3, atol=unit * 2.0**-18)


def check_linear(call, x, out_features, bits, group, float_zero, bias=None, scale=1.0, launch=None, block=None):
    in_features, dtype = x.shape[-1], x.dtype
    codes, scales, zeros, packed = random_layer(out_features, in_features, bits, group, float_zero, scale)
    tables = random_tables(in_features // block, block) if block else (None, None)
    got = call(linear, x, *packed, bias, out_features, *tables, launch)
    assert (got.dtype, got.shape) == (dtype, (*x.shape[:-1], out_features))
    centre = midrise_zero(bits)
    step, zero = exact_levels(scales, zeros, in_features, bits)
    rotated = (reference.apply_rotation(x, *tables) if block else x).double()
    want = rotated @ (step * (codes - zero)).T
    # products are exact in float32 and a sum of K of them rounds at most K times what its terms add up to; q and z
    # count one by one, for the kernels sum them apart. Twice that, for matrix units that truncate.
    terms = rotated.abs() @ (step * ((codes - centre).abs() + (zero - centre).abs())).T
    roundings = (in_features + 8) * torch.finfo(FLOAT).eps
    if block:  # a rotated input may fall to the other side of a rounding
        roundings += torch.finfo(dtype).eps
    if launch and launch.kernel == "dense":  # weights are rounded to the dtype
        roundings += torch.finfo(dtype).eps / 2
    if launch and launch.kernel == "gemm" and float_zero:  # so are zeros, and what is left of a code without them
        roundings += torch.finfo(dtype).eps
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    assert_within(got, want, roundings * terms)
    assert_within(tiled_linear(x, *packed, bias, out_features, *tables), want, roundings * terms)


DENSE = Launch(None, "dense")


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("launch", [decode(), gemm(), DENSE], ids=lambda launch: launch.kernel)
def test_linear(call, launch, bits, float_zero, dtype):
    bias = torch.randn(70).to(dtype)
    check_linear(call, torch.randn(5, 192).to(dtype), 70, bits, 64, float_zero, bias, launch=launch)


@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("launch", [decode(128), gemm(), DENSE], ids=lambda launch: launch.kernel)
@pytest.mark.parametrize(
    ("in_features", "group"),
    [(32, 32), (576, 64), (576, 96), (576, 576), (256, 128), (512, 256), (160, 160), (384, 192)],
)
def test_groups(call, in_features, group, launch, float_zero):
    bits = random.choice((2, 3, 4))
    check_linear(call, torch.randn(3, in_features).half(), 33, bits, group, float_zero, launch=launch)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("slice_columns", [128, pytest.param(512, marks=pytest.mark.slow)])
def test_decode_rows(call, rows, slice_columns):
    """Slices that reach past K, one tile and several tiles per program."""
    programs, dtype = (1, HALF) if rows % 2 else (64, BRAIN)
    launch = decode(slice_columns, programs=programs)
    check_linear(call, torch.randn(rows, 640).to(dtype), 200, 2, 128, rows % 2 == 0, launch=launch)


@pytest.mark.parametrize("block", [2, 32, 128, 256])
def test_decode_rotates(call, block):
    for rows in (1, 6):
        x = torch.randn(rows, 768).half()
        check_linear(call, x, 65, 2, 64, rows == 6, launch=decode(), block=block)


@pytest.mark.parametrize("launch", [decode(), decode(fuse=False), gemm(), DENSE])
def test_rotation_before_linear(call, launch):
    """Blocks that are odd, wider than a slice, or that the launch leaves to the rotation kernel."""
    for rows, block in ((1, 96), (3, 384), (2, 128)):
        check_linear(call, torch.randn(rows, 384).half(), 65, 2, 64, False, launch=launch, block=block)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "out_features"), [(17, 1), (31, 65), (64, 64), (65, 31), (130, 70)])
@pytest.mark.parametrize("launch", [gemm(32), gemm(32, 2), gemm(64, 2), gemm(128)])
def test_gemm_tiles(call, rows, out_features, launch):
    for dtype, bits in ((HALF, 2), (BRAIN, 3)):
        check_linear(call, torch.randn(rows, 160).to(dtype), out_features, bits, 32, True, launch=launch)


@pytest.mark.parametrize("programs", [8, 20, 64])
def test_gemm_split(call, programs):
    """Programs that share the columns evenly and unevenly."""
    for tiles in (1, 2):
        x = torch.randn(17, 1120).half()
        check_linear(call, x, 70, 2, 32, True, launch=gemm(32, tiles, programs))


MMA = [Launch(None, "mma", outputs=outputs, warps=8, exact=exact) for outputs in (16, 64) for exact in (False, True)]


@pytest.mark.parametrize("launch", MMA if torch.cuda.is_available() else MMA[:1])
def test_mma(call, launch):
    """On a GPU with the kernel's instructions; elsewhere a launch that names it goes to the other decode kernel."""
    for bits, dtype in ((2, HALF), (3, BRAIN)):
        bias = torch.randn(70).to(dtype)
        check_linear(call, torch.randn(9, 448).to(dtype), 70, bits, 64, bits == 3, bias, launch=launch, block=64)


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 65, 257])
def test_linear_by_number_of_rows(call, rows):
    bias = torch.randn(70).half()
    launch = triton_linear.choose(Gpu("", "", 1, False), rows)
    check_linear(call, torch.randn(rows, 256).half(), 70, 2, 128, False, bias, launch=launch, block=128)


@pytest.mark.parametrize(("scale", "factor"), [(1e-6, 1.0), (6e4, 1e-3), (6e4, 1e-7), (1.0, 500.0)])
@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("launch", [decode(), gemm()], ids=lambda launch: launch.kernel)
def test_linear_of_extreme_scales(call, launch, scale, factor, float_zero):
    check_linear(call, (torch.randn(3, 128) * factor).half(), 20, 2, 32, float_zero, scale=scale, launch=launch)
    check_linear(call, torch.randn(3, 128) * factor, 20, 3, 32, float_zero, scale=scale, launch=launch)


@pytest.mark.parametrize("launch", [decode(), gemm(), DENSE], ids=lambda launch: launch.kernel)
def test_linear_overflows_as_the_reference_does(call, launch):
    _, _, _, (tiles, scales, zeros) = random_layer(8, 64, 2, 32, False)
    arguments = (torch.full((2, 64), 6e4).half(), tiles, (scales + 1000).half(), zeros, None, 8)
    got, want = call(linear, *arguments, None, None, launch), tiled_linear(*arguments)
    assert torch.isinf(want).any()
    torch.testing.assert_close(got[torch.isinf(want)], want[torch.isinf(want)])


@pytest.mark.parametrize("launch", [decode(), gemm(), DENSE], ids=lambda launch: launch.kernel)
def test_linear_of_strided_inputs(call, launch):
    for x in strided(96, HALF):
        check_linear(call, x, 9, 2, 32, True, launch=launch)


def test_linear_repeats_to_the_bit(call):
    """Programs that share a sum add it up in the same order every time."""
    _, _, _, packed = random_layer(130, 1024, 2, 128, False)
    x = torch.randn(4, 1024).half()
    for launch in (decode(128), gemm(programs=64)):
        first, second = (call(linear, x, *packed, None, 130, None, None, launch) for _ in "12")
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_no_rows(call, shape):
    x = torch.empty(shape, dtype=HALF)
    assert call(ops.rotate, x, *random_tables(1, 64)).shape == shape
    _, _, _, packed = random_layer(8, 64, 2, 32, False)
    assert call(ops.packed_linear, x, *packed, None, 8).shape == (*shape[:-1], 8)


def test_refuses_groups_of_part_words(call):
    packed = torch.zeros(1, 1, 512, dtype=torch.int32), torch.ones(4, 64, dtype=HALF), None
    with pytest.raises(ValueError, match="multiple of 32 columns, not 16"):
        call(ops.packed_linear, torch.randn(1, 64), *packed, None, 8)


def test_operators_run_the_kernels(call):
    x, tables = torch.randn(3, 128).half(), random_tables(2, 64)
    assert torch.equal(call(ops.rotate, x, *tables), call(triton_rotate.apply_rotation, x, *tables))
    layer = (*random_layer(8, 128, 2, 32, True)[3], None, 8, *tables)
    assert torch.equal(call(ops.packed_linear, x, *layer), call(triton_linear.packed_linear, x, *layer))


def test_rotation_launches():
    for rows, exponent, odd in itertools.product((1, 2, 17, 4096), range(15), (1, 3, 9, 43)):
        block = odd << exponent
        if block <= 32768:
            configs = triton_rotate.launch_configs(rows, block)
            assert sum(config["NUM_LAYERS"] for config in configs) == exponent
            for config in configs:
                assert block % (config["HEIGHT"] * config["COLUMNS"]) == 0
                assert config["PADDED_HEIGHT"] * config["COLUMNS"] * config["BLOCK_M"] <= triton_rotate.WIDEST_TILE
                assert config["num_warps"] in (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("wanted", "bits", "group_size", "float_zero", "kept"),
    [
        (1024, 2, 128, False, 1024),
        (1024, 3, 128, False, 1024),
        (1024, 4, 128, False, 512),  # words of two tiles
        (1024, 2, 128, True, 512),  # zeros beside the scales
        (1024, 2, 64, False, 512),
        (1024, 4, 32, True, 128),
        (128, 2, 128, False, 128),
    ],
)
def test_decode_keeps_what_registers_hold(wanted, bits, group_size, float_zero, kept):
    assert triton_decode.kept_columns(wanted, bits, group_size, float_zero) == kept


def test_launch_table():
    """Every entry has a line for any number of rows, and no line of decode is for more rows than it can take."""
    for entry in json.loads(triton_linear.LAUNCH_TABLE.read_text()):
        lines = triton_linear.launches(entry.removesuffix(triton_linear.NOT_MEASURED), "")
        limits = [math.inf if line.max_rows is None else line.max_rows for line in lines]
        assert limits == sorted(set(limits)) and limits[-1] == math.inf
        few = triton_linear.MOST_DECODE_ROWS
        assert all(line.max_rows <= few for line in lines if line.kernel in ("decode", "mma"))
        assert {line.kernel for line in lines} <= {"decode", "mma", "gemm", "dense"}


@pytest.mark.parametrize(
    ("architecture", "entry"),
    [
        ("sm80", "sm80"),
        ("sm86", "sm80"),
        ("sm89", "sm80"),
        ("sm90", "sm90"),
        ("sm100", "sm90"),
        ("sm103", "sm90"),
        ("sm120", "sm80"),
        ("gfx90a", "gfx942"),
        ("gfx942", "gfx942"),
        ("", "sm90"),
    ],
)
def test_launch_table_by_capability(architecture, entry):
    table = {key.split(",")[0]: lines for key, lines in json.loads(triton_linear.LAUNCH_TABLE.read_text()).items()}
    lines = tuple(Launch(**line) for line in table[entry])
    assert triton_linear.launches("a GPU that nobody has tuned", architecture) == lines


def test_launch_table_by_name(tmp_path, monkeypatch):
    """An entry that tuning wrote for one GPU goes before that of its capability."""
    path = tmp_path / "launch.json"
    path.write_text(json.dumps({"Some GPU": [{"max_rows": None, "kernel": "dense"}], "sm90": []}))
    monkeypatch.setattr(triton_linear, "LAUNCH_TABLE", path)
    triton_linear.launches.cache_clear()
    assert triton_linear.launches("Some GPU", "sm90") == (Launch(None, "dense"),)
    triton_linear.launches.cache_clear()
