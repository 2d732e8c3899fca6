"""The look-up of an embedding's rows, and the product with as many outputs as a vocabulary has."""

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import (
    ops,
    reference,
    tiles,
    triton_decode,
    triton_embedding,
    triton_gemm,
    triton_linear,
    triton_mma,
)
from bq_kernels.format import num_angles, split_block
from bq_kernels.packing import pack
from bq_kernels.prepared import prepare_weights, prepared_embedding
from bq_kernels.triton_linear import Launch
from torch._subclasses.fake_tensor import FakeTensorMode

from .aot import TARGETS, inspect, record, record_launches
from .layers import BRAIN, FLOAT, HALF, assert_within, linear
from .test_compile import meta, on_targets
from .test_dense import random_case


def kernel(ids, *arguments):
    """The launcher. Triton's interpreter multiplies the bit patterns of bfloat16: there it stores float32."""
    *packed, dtype, cos_sin, mix = arguments
    interpreted = dtype == BRAIN and not packed[0].is_cuda
    return triton_embedding.packed_embedding(ids, *packed, FLOAT if interpreted else dtype, cos_sin, mix).to(dtype)


def check_embedding(call, ids, tokens, features, bits, group, float_zero, block, dtypes=(HALF,)):
    packed, tables, want, bound = random_case(tokens, features, bits, group, float_zero, block)
    for dtype in dtypes:
        arguments = ids, *packed, features, dtype, *tables
        for got in (call(kernel, *arguments), tiles.tiled_embedding(*arguments)):
            assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, (*ids.shape, features), True)
            assert_within(got, want[ids], bound[ids])


@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("block", [None, 64, 96])
def test_rows(call, bits, float_zero, block):
    """Without a rotation, with several blocks in a program, and with one; a last tile that is not full."""
    ids = torch.cat([torch.tensor([0, 63, 64, 69, 69]), torch.randint(70, (20,))])
    check_embedding(call, ids, 70, 192, bits, 64, float_zero, block, (HALF, BRAIN, FLOAT))


@pytest.mark.parametrize(
    ("features", "group", "block"),
    [
        (32, 32, 1),
        (32, 32, 2),
        (96, 32, 3),
        (256, 32, 128),
        (576, 64, 576),
        (160, 160, 32),
        (384, 192, 128),
        (512, 128, 256),
        (1536, 128, 1536),
        (2048, 2048, 2048),
    ],
)
def test_groups_and_blocks(call, features, group, block):
    check_embedding(call, torch.randint(33, (9,)), 33, features, 3, group, True, block)


@pytest.mark.parametrize("block", [4096, 8192, 11008, pytest.param(13824, marks=pytest.mark.slow)])
def test_full_width(call, block):
    check_embedding(call, torch.tensor([2, 0]), 3, block, 2, 128, False, block)


def test_shapes_of_ids(call):
    """Any shape, int32 as well, not contiguous, and none at all."""
    grid = torch.randint(70, (6, 8))
    for ids in (grid, grid.int(), grid.T, grid[::2, 1::3], grid[0, 0]):
        check_embedding(call, ids, 70, 64, 2, 32, False, 32)
    packed, tables, _, _ = random_case(70, 64, 2, 32, False, 32)
    assert call(kernel, grid[:0], *packed, 64, HALF, *tables).shape == (0, 8, 64)


def test_ids_that_are_no_rows(call):
    packed, tables, want, _ = random_case(70, 192, 2, 64, True, 64)
    found = call(kernel, torch.tensor([3, -1, 128, 1 << 40, 69]), *packed, 192, FLOAT, *tables)
    assert found[1:4].isnan().all()
    torch.testing.assert_close(found[[0, 4]].double(), want[[3, 69]], atol=1e-4, rtol=1e-4)
    with pytest.raises(IndexError):
        tiles.tiled_embedding(torch.tensor([128]), *packed, 192, FLOAT, *tables)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
def test_prepared(tiled, rotates):
    """One layout serves the look-up and the product."""
    scales, zeros = torch.rand(70, 6).half(), torch.rand(70, 6).half()
    stored = pack(torch.randint(4, (70, 192)), 2), scales, zeros
    angles = torch.randn(2, num_angles(96)) if rotates else None
    weights = prepare_weights(*stored, angles, 96, 192, tiled=tiled)
    ids, want = torch.randint(70, (2, 5)), reference.dense_weight(*stored, angles, 96, 192)
    got = prepared_embedding(ids, weights, 192, BRAIN)
    assert got.dtype == BRAIN
    torch.testing.assert_close(got, want[ids].bfloat16(), atol=1e-5, rtol=2e-2)


@pytest.mark.skipif(ops.interpreted(), reason="the operator is the reference only without TRITON_INTERPRET")
@pytest.mark.parametrize("rotates", [False, True])
def test_operator(rotates):
    packed, tables, _, _ = random_case(70, 192, 3, 64, True, 96 if rotates else None)
    for ids in (torch.randint(70, (2, 5)), torch.zeros(0, dtype=torch.int64)):
        arguments = ids, *packed, 192, HALF, *tables
        torch.library.opcheck(torch.ops.bq.packed_embedding.default, arguments)
        assert torch.equal(ops.packed_embedding(*arguments), tiles.tiled_embedding(*arguments))
    with FakeTensorMode() as mode:
        fake = (
            mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
            for t in (torch.zeros(3, 4).long(), *arguments[1:])
        )
        out = ops.packed_embedding(*fake)
        assert (out.shape, out.dtype) == ((3, 4, 192), HALF)


# ---- as many outputs as a vocabulary has

VOCABULARIES = [(32_000, 4096), (128_256, 4096), (151_936, 2048), (256_000, 8192)]
MOST_INT32, MOST_GRID = 2**31 - 1, (2**31 - 1, 65_535, 65_535)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("out_features", "in_features"), VOCABULARIES)
def test_launches_of_a_large_head(out_features, in_features, target, monkeypatch):
    """Grids, counters and 32-bit offsets stay in range, and temporary memory well below that of 16-bit weights."""
    mma = Launch(16, "mma", outputs=32, warps=8, stages=2)
    kernels = [(triton_decode, "_decode_kernel"), (triton_gemm, "_gemm_kernel"), (triton_mma, "_mma_kernel")]
    packed = (
        meta(-(-out_features // 64), in_features // 128, 512, dtype=torch.int32),
        meta(in_features // 32, -(-out_features // 64) * 64),
    )
    cases = [(rows, None) for rows in (1, 4, 16, 64, 256)]
    for rows, line in cases + [(16, mma)] * target.startswith("sm"):
        x = meta(rows, in_features)
        if line:  # what runs in front of it does not depend on the outputs
            monkeypatch.setattr(triton_linear, "rotate_and_arrange", lambda x, *rest: (x, meta(1)))
        arguments = x, *packed, packed[1], None, out_features, None, None, line
        launches, out = record_launches(monkeypatch, target, kernels, triton_linear, "packed_linear", *arguments)
        assert out.shape == (rows, out_features)
        for launch in launches:
            assert all(0 < size <= most for size, most in zip(launch.grid, MOST_GRID, strict=False))
            assert max(tensor.numel() for tensor in launch.tensors() if tensor.dim() < 3) <= MOST_INT32
            temporary = [t.nbytes for t in launch.tensors() if t.dim() == 1]  # partial sums, counters
            assert sum(temporary) <= out_features * in_features * 2 / 8
            if launch.config.get("SLICES", 1) > 1:
                assert launch.grid[1] <= triton_linear.COUNTERS
            if launch.config.get("SPLIT_K", 1) > 1:
                assert launch.grid[0] * launch.grid[1] <= triton_linear.COUNTERS


@pytest.mark.parametrize(("block_size", "fits"), [(128, True), (4096, False)])
def test_grids_that_dequantize_a_large_head(block_size, fits, monkeypatch):
    """`_dequantize_rows_kernel` has a program per row where blocks are wide: more than the second axis takes."""
    from bq_kernels import triton_dequantize

    k = block_size.bit_length() - 1
    tables = meta(4096 // block_size, 2, k, block_size // 2, dtype=FLOAT), meta(4096 // block_size, 1, 1, dtype=FLOAT)
    packed = meta(4000, 32, 512, dtype=torch.int32), meta(32, 256_000), None
    name = "_dequantize_kernel" if fits else "_dequantize_rows_kernel"
    arguments = *packed, 4096, 256_000, HALF, *tables
    [launch], _ = record_launches(
        monkeypatch, "sm90", [(triton_dequantize, name)], triton_dequantize, "dequantize", *arguments
    )
    assert all(size <= most for size, most in zip(launch.grid, MOST_GRID, strict=False))


def dense_in_parts(*arguments):
    """`packed_linear` as for a vocabulary that is dequantized in parts of two tiles; runs where kernels do."""
    triton_linear.MOST_DENSE = 2 * 64 * arguments[0].shape[1]
    return linear(*arguments)


@pytest.mark.parametrize("out_features", [300, 256, 70])
def test_dense_in_parts(call, out_features):
    packed, tables, weight, bound = random_case(out_features, 192, 2, 64, True, 96)
    x, bias = torch.randn(33, 192), torch.randn(out_features)
    eps = (192 + 8) * torch.finfo(FLOAT).eps
    for some_bias in (bias, None):
        got = call(dense_in_parts, x, *packed, some_bias, out_features, *tables, Launch(None, "dense", fuse=True))
        offset = 0 if some_bias is None else some_bias.double()
        size = x.double().abs() @ (eps * weight.abs() + bound).T
        assert_within(got, x.double() @ weight.T + offset, size + torch.finfo(FLOAT).eps * bias.double().abs())


@pytest.mark.parametrize(
    ("bits", "group", "float_zero", "block_size", "tokens", "dtype", "target"),
    on_targets(
        (2, 128, False, None, 1, HALF),
        (2, 64, False, 64, 1, HALF),
        (4, 64, True, 64, 4096, BRAIN),
        (3, 32, False, 576, 64, HALF),
        (4, 128, False, 4096, 4096, BRAIN),
        (2, 128, True, 11008, 8, HALF),
    ),
)
@pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")
def test_compiles(bits, group, float_zero, block_size, tokens, dtype, target, monkeypatch, tmp_path):
    features, tables = 4096, (None, None)
    if block_size:
        k, m = split_block(block_size)
        features = features if m == 1 else block_size
        blocks = features // block_size
        tables = meta(blocks, 2, k, block_size // 2, dtype=FLOAT), meta(blocks, m, m, dtype=FLOAT)
    scales = meta(features // group, 32_000)
    tiled = meta(500, -(-features // 128), 256 * bits, dtype=torch.int32), scales, scales if float_zero else None
    arguments = meta(tokens, dtype=torch.int64), *tiled, features, dtype, *tables
    module = triton_embedding
    [launch] = record(monkeypatch, target, module, "_embedding_kernel", module, "packed_embedding", *arguments)
    inspect(*launch, target, tmp_path)
