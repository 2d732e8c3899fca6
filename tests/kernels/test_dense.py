"""Dequantization with the rotation folded back, and the dense path that multiplies with it."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import reference, tiles, triton_dequantize, triton_linear
from bq_kernels.packing import pack
from bq_kernels.triton_linear import Launch, folds_rotation

from .layers import BRAIN, FLOAT, HALF, assert_within, linear, random_tables

FOLDED = Launch(None, "dense", fuse=True)


def kernel(*arguments):
    """The launcher. Triton's interpreter multiplies the bit patterns of bfloat16: there it stores float32."""
    *packed, dtype, cos_sin, mix = arguments
    interpreted = dtype == BRAIN and not packed[0].is_cuda
    return triton_dequantize.dequantize(*packed, FLOAT if interpreted else dtype, cos_sin, mix).to(dtype)


def random_case(out_features, in_features, bits, group, float_zero, block):
    """A layer's tiles, scales and zeros, its tables, W′ Q in float64, and by how much float32 may be off."""
    scales = torch.rand(out_features, in_features // group).half()
    zeros = (torch.rand(out_features, in_features // group) * (2**bits - 1)).half() if float_zero else None
    qweight = pack(torch.randint(2**bits, (out_features, in_features)), bits)
    weight = reference.dequantize(qweight, scales, zeros, in_features)
    tables = random_tables(in_features // block, block) if block else (None, None)
    want = reference.undo_rotation(weight, *tables) if block else weight
    # as in check_rotation: 3 roundings per layer, m for the runs, of the block's norm; and the reference errs as much
    roundings = 3 * tables[0].shape[2] + tables[1].shape[-1] + 1 if block else 1
    norm = weight.double().unflatten(-1, (-1, block or 1)).norm(dim=-1).repeat_interleave(block or 1, dim=-1)
    bound = 2 * roundings * torch.finfo(FLOAT).eps * norm
    return tiles.tile(qweight, scales, zeros, in_features), tables, want.double(), bound


def check_dequantize(call, out_features, in_features, bits, group, float_zero, block, dtypes=(HALF,)):
    packed, tables, want, bound = random_case(out_features, in_features, bits, group, float_zero, block)
    for dtype in dtypes:
        arguments = *packed, in_features, out_features, dtype, *tables
        for got in (call(kernel, *arguments), tiles.dequantize(*arguments)):
            assert (got.dtype, got.shape) == (dtype, want.shape)
            assert_within(got, want, bound)


@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [None, 64, 96])
def test_dtypes(call, bits, float_zero, block):
    """W′, W′ Q in tiles and W′ Q by rows, with a last tile that is not full."""
    check_dequantize(call, 70, 192, bits, 64, float_zero, block, (HALF, BRAIN, FLOAT))


@pytest.mark.parametrize(
    ("in_features", "group", "block"),
    [
        (32, 32, 1),
        (32, 32, 2),
        (96, 32, 3),
        (256, 32, 128),
        (576, 96, 64),
        (576, 64, 576),
        (160, 160, 32),
        (384, 192, 128),
        (512, 128, 256),
        (1024, 1024, 1024),
    ],
)
def test_groups_and_blocks(call, in_features, group, block):
    check_dequantize(call, 33, in_features, 3, group, True, block)


@pytest.mark.parametrize("block", [1536, 8192, 11008, pytest.param(13824, marks=pytest.mark.slow)])
def test_full_width(call, block):
    check_dequantize(call, 3, block, 2, 128, False, block)


@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("block", [64, 96, 192])
def test_linear(call, block, dtype):
    """x [M, K] as it is, times W′ Q: as the backend `dense` on a CPU computes."""
    rows, out_features, in_features = 70, 33, 192
    packed, tables, weight, bound = random_case(out_features, in_features, 2, 64, True, block)
    x, bias = torch.randn(2, rows // 2, in_features).to(dtype), torch.randn(out_features).to(dtype)
    got = call(linear, x, *packed, bias, out_features, *tables, FOLDED)
    want = x.double() @ weight.T + bias.double()
    size = x.double().abs()
    eps = torch.finfo(dtype).eps / 2 + (in_features + 8) * torch.finfo(FLOAT).eps
    assert_within(got, want, size @ (eps * weight.abs() + bound).T + torch.finfo(FLOAT).eps * bias.double().abs())


def test_side_that_rotates():
    """Blocks in a tile are folded wherever the line says so, wider ones where x has the more rows."""
    inside, wide = (random_tables(2, block) for block in (64, 96))
    for rows, fuse in itertools.product((10, 100, 1000), (False, True)):
        launch = Launch(None, "dense", fuse=fuse)
        assert folds_rotation(launch, rows, 100, *inside) == fuse
        assert folds_rotation(launch, rows, 100, *wide) == (fuse and rows >= 100)
    assert not folds_rotation(Launch(1, "decode", fuse=True), 1000, 100, *inside)


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_shipped_prefill_rotates_x(target):
    """No line folds before a GPU has timed it."""
    assert triton_linear.launches("", target)[-1] == Launch(None, "dense")
