"""The packed linear of experts: the kernel against float64 products, its sorting of rows, its machine code."""

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from bq_kernels import ops, reference, tiles, triton_grouped
from bq_kernels.format import midrise_zero

from .aot import TARGETS, inspect, record
from .layers import (
    BRAIN,
    FLOAT,
    HALF,
    assert_within,
    exact_levels,
    random_layer,
    random_tables,
)


def random_experts(count, *layer):
    """Codes, scales and zeros of all experts, and what the kernel takes."""
    codes, scales, zeros, packed = zip(*(random_layer(*layer) for _ in range(count)), strict=True)
    stacked = [None if part[0] is None else torch.stack(part) for part in zip(*packed, strict=True)]
    return codes, scales, zeros, stacked


def check_grouped(call, x, experts, count, out_features, bits, group, float_zero, block=None):
    in_features, dtype = x.shape[-1], x.dtype
    codes, scales, zeros, packed = random_experts(count, out_features, in_features, bits, group, float_zero)
    tables = random_tables(in_features // block, block) if block else (None, None)
    got = call(ops.grouped_linear, x, experts, *packed, out_features, *tables)
    assert (got.dtype, got.shape) == (dtype, (*experts.shape, out_features))
    rotated = (reference.apply_rotation(x, *tables) if block else x).double()
    want, terms = torch.zeros(got.shape).double(), torch.zeros(got.shape).double()
    for expert in range(count):
        step, zero = exact_levels(scales[expert], zeros[expert], in_features, bits)
        row, place = (experts == expert).nonzero(as_tuple=True)
        want[row, place] = rotated[row] @ (step * (codes[expert] - zero)).T
        centre = midrise_zero(bits)
        sizes = step * ((codes[expert] - centre).abs() + (zero - centre).abs())
        terms[row, place] = rotated[row].abs() @ sizes.T
    # as for the GEMM kernel in test_triton.py
    roundings = (in_features + 8) * torch.finfo(FLOAT).eps
    if block:
        roundings += torch.finfo(dtype).eps
    if float_zero:
        roundings += torch.finfo(dtype).eps
    assert_within(got, want, 2 * roundings * terms)


def routed(rows, fanout, count):
    """Experts of every row, all different, some rows with fewer and one expert without rows."""
    experts = torch.rand(rows, count - 1).argsort(-1)[:, :fanout] + 1
    experts[torch.rand(rows, fanout) < 0.1] = -1
    return experts


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(
    ("bits", "group", "float_zero", "block"), [(2, 64, False, 64), (3, 32, True, None), (4, 128, True, 128)]
)
def test_formats(call, bits, group, float_zero, block, dtype):
    check_grouped(call, torch.randn(7, 256).to(dtype), routed(7, 2, 5), 5, 70, bits, group, float_zero, block)


@pytest.mark.parametrize(
    ("rows", "fanout", "count", "out_features", "in_features", "group"),
    [(1, 1, 2, 64, 128, 128), (1, 4, 16, 33, 96, 96), (40, 2, 3, 130, 192, 64), (90, 1, 2, 65, 160, 32)],
)
def test_shapes(call, rows, fanout, count, out_features, in_features, group):
    x = torch.randn(rows, in_features).half()
    check_grouped(call, x, routed(rows, fanout, count), count, out_features, 2, group, False)


def test_strided_inputs_and_types_of_indices(call):
    wide = torch.randn(6, 3 * 128).half()
    for x in (wide[:, 128:256], wide[::2, :128], wide[:, ::3]):
        experts = routed(len(x), 2, 4)
        for numbers in (experts, experts.int(), experts.T.contiguous().T):
            check_grouped(call, x, numbers, 4, 64, 2, 64, False)


def test_no_rows(call):
    _, _, _, packed = random_experts(3, 64, 128, 2, 64, False)
    experts = torch.zeros(0, 2, dtype=torch.int64)
    assert call(ops.grouped_linear, torch.zeros(0, 128).half(), experts, *packed, 64, None, None).shape == (0, 2, 64)


@pytest.mark.parametrize("block", [1, 16, 32])
def test_blocks_hold_every_row_once(block):
    for _ in range(20):
        rows, count = random.randint(1, 100), random.randint(1, 9)
        experts = torch.randint(-1, count, (rows,))
        table, of_block = triton_grouped.blocks_of_experts(experts, count, block)
        assert table.shape == (len(of_block), block) and table.dtype == of_block.dtype == torch.int32
        placed = table[table >= 0].tolist()
        assert sorted(placed) == (experts >= 0).nonzero()[:, 0].tolist()
        for numbers, expert in zip(table, of_block.tolist(), strict=True):
            own = numbers[numbers >= 0].long()
            assert (experts[own] == expert).all() and (expert >= 0 or not len(own))


@pytest.mark.skipif(ops.interpreted(), reason="the operator is the reference only without TRITON_INTERPRET")
def test_operator():
    _, _, _, packed = random_experts(4, 70, 192, 3, 64, True)
    arguments = torch.randn(5, 192).half(), routed(5, 2, 4), *packed, 70, *random_tables(2, 96)
    torch.library.opcheck(torch.ops.bq.grouped_linear.default, arguments)
    assert torch.equal(ops.grouped_linear(*arguments), tiles.grouped_linear(*arguments))
    with FakeTensorMode() as mode:
        out = ops.grouped_linear(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments))
        assert (out.shape, out.dtype) == ((5, 2, 70), HALF)


def kinds():
    """Kinds of weight and rows of Qwen3-30B-A3B's experts; one on Hopper is not slow."""
    for kind in (
        (2, 128, False, HALF, 8),
        (2, 64, True, BRAIN, 256),
        (3, 64, False, HALF, 1024),
        (4, 32, True, HALF, 8),
    ):
        for target in TARGETS:
            slow = target != "sm90" or kind[-1] != 8 or kind[0] != 2
            yield pytest.param(*kind, target, marks=[pytest.mark.slow] * slow)


@pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")
@pytest.mark.parametrize(("bits", "group", "float_zero", "dtype", "rows", "target"), kinds())
def test_machine_code(bits, group, float_zero, dtype, rows, target, monkeypatch, tmp_path):
    """No spills, on the matrix unit."""
    count, out_features, in_features = 128, 1536, 2048

    def meta(*shape, dtype=HALF):
        return torch.empty(*shape, dtype=dtype, device="meta")

    shape = count, in_features // group, out_features
    packed = meta(count, out_features // 64, in_features // 128, 256 * bits, dtype=torch.int32), meta(*shape)
    arguments = (
        meta(rows, in_features, dtype=dtype),
        meta(rows, 8, dtype=torch.int64),
        *packed,
        meta(*shape) if float_zero else None,
        out_features,
    )
    module = triton_grouped
    [launch] = record(monkeypatch, target, module, "_grouped_kernel", module, "grouped_linear", *arguments)
    report = inspect(*launch, target, tmp_path)
    if target == "sm90":
        assert report.count("HGMMA", "HMMA") > 0 and report.count("LDL", "STL") == 0
