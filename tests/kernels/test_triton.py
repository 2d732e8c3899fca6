"""The Triton kernels against the reference: interpreted on the CPU, and on the GPU where there is one."""

import concurrent.futures
import itertools
import math
import multiprocessing

import pytest
import torch

pytest.importorskip("triton")

from bq_kernels import ops, reference, triton_linear, triton_rotate
from bq_kernels.format import num_angles
from bq_kernels.packing import pack

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
DEVICES = ["interpreter"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(scope="module", params=DEVICES)
def call(request):
    """Calls a function with CPU tensors where kernels run: in a process that interprets them, or on the GPU.

    Triton decides at import whether it interprets, and then compiles no more: hence a process of its own.
    """
    if request.param == "cuda":

        def on_gpu(function, *tensors):
            return function(*(None if t is None else t.cuda() for t in tensors)).cpu()

        yield on_gpu
        return
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(ops.interpreted).result()  # starts the process, which keeps this environment
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def assert_within(got, want, bound):
    """`got` is float64 `want`, off by at most `bound` in float32 arithmetic and then rounded once to its dtype."""
    info = torch.finfo(got.dtype)
    limit = bound + info.eps / 2 * (want.abs() + bound) + info.smallest_normal * info.eps
    excess = ((got.double() - want).abs() - limit).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, f"{got.flatten()[worst]} for {want.flatten()[worst]}, allowed ±{limit.flatten()[worst]}"


def random_tables(blocks, block_size):
    angles = (torch.rand(blocks, num_angles(block_size)) * 2 - 1) * math.pi
    return reference.givens_tables(angles, block_size)


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


@pytest.mark.parametrize("block_size", [1536, 4096, 5120, 8192, 11008, 13824, 14336, 16384])
def test_rotation_of_large_blocks(call, block_size):
    check_rotation(call, torch.randn(2, block_size).half(), block_size)


@pytest.mark.parametrize("factor", [1e-7, 1e-4, 6e4])
def test_rotation_of_extreme_inputs(call, factor):
    x = torch.randn(4, 192).clamp(-1, 1) * factor
    check_rotation(call, x, 64)
    check_rotation(call, (x / 16).half(), 96)  # below 65504 after it, above it while pairs add up in float16


def strided(features, dtype):
    """Inputs [..., features] that are not contiguous."""
    wide = torch.randn(6, 3 * features).to(dtype)
    yield wide[:, features : 2 * features]  # a slice of a fused projection: one row stride
    yield wide[::2, :features]
    yield wide[1:].flip(0)[:, -features:]
    yield torch.randn(2, 3, features).to(dtype).transpose(0, 1)  # rows without a common stride
    yield torch.randn(features, 5).to(dtype).T  # the last dimension is not contiguous
    yield torch.randn(1, features).to(dtype).expand(3, features)  # stride 0
    yield torch.randn(4, 2 * features).to(dtype)[:, ::2]


def test_rotation_of_strided_inputs(call):
    for x in strided(192, HALF):
        check_rotation(call, x, 96)


def random_layer(out_features, in_features, bits, group, float_zero, scale=1.0):
    codes = torch.randint(2**bits, (out_features, in_features))
    scales = (torch.rand(out_features, in_features // group) * scale).half()
    zeros = (torch.rand(out_features, in_features // group) * (2**bits - 1)).half() if float_zero else None
    return codes, pack(codes, bits), scales, zeros


def check_linear(call, x, out_features, bits, group, float_zero, bias=None, scale=1.0):
    in_features = x.shape[-1]
    codes, qweight, scales, zeros = random_layer(out_features, in_features, bits, group, float_zero, scale)
    got = call(ops.packed_linear, x, qweight, scales, zeros, bias)
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], out_features))
    zero = torch.tensor((2**bits - 1) / 2) if zeros is None else zeros.double().repeat_interleave(group, dim=1)
    step = scales.double().repeat_interleave(group, dim=1)
    want = x.double() @ (step * (codes - zero)).T
    # products are exact in float32 and a sum of K of them rounds at most K times what its terms add up to; q and z
    # count one by one, for a kernel may sum them apart. Twice that, for matrix units that truncate.
    terms = x.double().abs() @ (step * (codes + zero if float_zero else (codes - zero).abs())).T
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    assert_within(got, want, (in_features + 8) * torch.finfo(FLOAT).eps * terms)
    same = reference.packed_linear(x, qweight, scales, zeros, bias)
    assert_within(same, want, (in_features + 8) * torch.finfo(FLOAT).eps * terms)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "out_features"), [(1, 32), (5, 45)])
def test_linear(call, rows, out_features, bits, float_zero, dtype):
    bias = torch.randn(out_features).to(dtype)
    check_linear(call, torch.randn(rows, 128).to(dtype), out_features, bits, 64, float_zero, bias)


@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize(
    ("in_features", "group"),
    [(32, 32), (576, 64), (576, 96), (576, 576), (256, 128), (512, 256), (160, 160)],
)
def test_linear_groups(call, in_features, group, float_zero):
    for bits in (2, 3, 4):
        check_linear(call, torch.randn(3, in_features).half(), 33, bits, group, float_zero)


@pytest.mark.parametrize(("rows", "out_features"), [(17, 1), (31, 65), (64, 64), (65, 31), (130, 70)])
def test_linear_tiles(call, rows, out_features):
    for dtype, bits in ((HALF, 2), (BRAIN, 3), (FLOAT, 4)):
        check_linear(call, torch.randn(rows, 64).to(dtype), out_features, bits, 32, True)


@pytest.mark.parametrize(("scale", "factor"), [(1e-6, 1.0), (6e4, 1e-3), (6e4, 1e-7), (1.0, 500.0)])
@pytest.mark.parametrize("float_zero", [False, True])
def test_linear_of_extreme_scales(call, scale, factor, float_zero):
    check_linear(call, (torch.randn(3, 128) * factor).half(), 20, 2, 32, float_zero, scale=scale)
    check_linear(call, torch.randn(3, 128) * factor, 20, 3, 32, float_zero, scale=scale)


def test_linear_overflows_as_the_reference_does(call):
    _, qweight, scales, zeros = random_layer(8, 64, 2, 32, False)
    arguments = (torch.full((2, 64), 6e4).half(), qweight, (scales + 1000).half(), zeros, None)
    got, want = call(ops.packed_linear, *arguments), reference.packed_linear(*arguments)
    assert torch.isinf(want).any()
    torch.testing.assert_close(got[torch.isinf(want)], want[torch.isinf(want)])


def test_linear_of_strided_inputs_and_tables(call):
    for x in strided(96, HALF):
        check_linear(call, x, 9, 2, 32, True)
    _, qweight, scales, zeros = random_layer(16, 64, 2, 32, True)
    x, bias = torch.randn(2, 64), torch.randn(16)
    whole = call(ops.packed_linear, x, qweight, scales, zeros, bias)
    part = call(ops.packed_linear, x, qweight[::2], scales[::2], zeros[::2], bias[::2])
    assert torch.equal(part, whole[:, ::2])


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)])
def test_no_rows(call, shape):
    x = torch.empty(shape, dtype=HALF)
    assert call(ops.rotate, x, *random_tables(1, 64)).shape == shape
    _, qweight, scales, zeros = random_layer(8, 64, 2, 32, False)
    assert call(ops.packed_linear, x, qweight, scales, zeros, None).shape == (*shape[:-1], 8)


def test_refuses_groups_of_part_words(call):
    qweight, scales = torch.zeros(8, 4, dtype=torch.int32), torch.ones(8, 4, dtype=HALF)
    with pytest.raises(ValueError, match="multiple of 32 columns, not 16"):
        call(ops.packed_linear, torch.randn(1, 64), qweight, scales, None, None)


def test_operators_run_the_kernels(call):
    x, tables = torch.randn(3, 128).half(), random_tables(2, 64)
    assert torch.equal(call(ops.rotate, x, *tables), call(triton_rotate.apply_rotation, x, *tables))
    layer = random_layer(8, 128, 2, 32, True)[1:]
    assert torch.equal(call(ops.packed_linear, x, *layer), call(triton_linear.packed_linear, x, *layer))


def test_launch_configs():
    for rows, exponent, odd in itertools.product((1, 2, 17, 4096), range(15), (1, 3, 9, 43)):
        if odd << exponent <= 16384:
            config = triton_rotate.launch_config(rows, odd << exponent)
            assert config["RUNS"] << config["LAYERS"] == odd << exponent
            assert config["RUNS_PADDED"] * config["ROWS"] << config["LAYERS"] <= 32768
            assert config["num_warps"] in (1, 2, 4, 8, 16)
    for rows, group, dtype in itertools.product((1, 16, 17, 33, 4096), (32, 64, 96, 576, 4096), (HALF, FLOAT)):
        config = triton_linear.launch_config(rows, 2, group, dtype)
        assert group % config["BLOCK_K"] == 0
        assert config["BLOCK_K"] >= 32
