import math

import pytest
import torch
from bq_kernels import ops, reference
from bq_kernels.format import num_angles
from bq_kernels.packing import pack
from bq_kernels.tiles import tile, tiled_linear
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.skipif(
    ops.interpreted(), reason="the operators are the reference only without TRITON_INTERPRET"
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def rotation_arguments(dtype, shape=(3, 5), blocks=2, block_size=48):
    angles = (torch.rand(blocks, num_angles(block_size)) * 2 - 1) * math.pi
    return torch.randn(*shape, blocks * block_size).to(dtype), *reference.givens_tables(angles, block_size)


def linear_arguments(dtype, shape=(3, 5), bits=2, zeros=True, bias=True, rotation=True):
    scales = torch.rand(7, 3).half()
    packed = tile(pack(torch.randint(2**bits, (7, 96)), bits), scales, scales if zeros else None, 96)
    x, *tables = rotation_arguments(dtype, shape)
    return (x, *packed, torch.randn(7).to(dtype) if bias else None, 7, *(tables if rotation else (None, None)))


@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("shape", [(), (3, 5), (0,)])
def test_rotate(block_size, shape):
    torch.library.opcheck(torch.ops.bq.rotate.default, rotation_arguments(torch.float32, shape, 2, block_size))
    for dtype in DTYPES:
        arguments = rotation_arguments(dtype, shape, 2, block_size)
        assert torch.equal(ops.rotate(*arguments), reference.apply_rotation(*arguments))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("zeros", "bias", "shape"), [(True, True, (3, 5)), (False, False, (1,)), (True, False, (0,))])
def test_packed_linear(bits, zeros, bias, shape):
    torch.library.opcheck(torch.ops.bq.packed_linear.default, linear_arguments(torch.float16, shape, bits, zeros, bias))
    plain = linear_arguments(torch.float16, shape, bits, zeros, bias, rotation=False)
    torch.library.opcheck(torch.ops.bq.packed_linear.default, plain)
    for dtype in DTYPES:
        arguments = linear_arguments(dtype, shape, bits, zeros, bias)
        assert torch.equal(ops.packed_linear(*arguments), tiled_linear(*arguments))


def test_strided_inputs():
    x, *tables = rotation_arguments(torch.float16, (5, 3))
    torch.library.opcheck(torch.ops.bq.rotate.default, (x.transpose(0, 1), *tables))
    x, *tables = linear_arguments(torch.float16, (5, 3))
    torch.library.opcheck(torch.ops.bq.packed_linear.default, (x.transpose(0, 1), *tables))


def test_fake_tensors():
    rotation, linear = rotation_arguments(torch.bfloat16), linear_arguments(torch.bfloat16)
    with FakeTensorMode() as mode:
        x, *tables = map(mode.from_tensor, rotation)
        y = ops.rotate(x.transpose(0, 1), *tables)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((5, 3, 96), torch.bfloat16, True)
        y = ops.packed_linear(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in linear))
        assert (y.shape, y.dtype) == ((3, 5, 7), torch.bfloat16)


def test_compile_without_graph_breaks():
    _, *tables = rotation_arguments(torch.float32)
    _, *layer_tensors = linear_arguments(torch.float32)

    def layer(x):
        return ops.packed_linear(ops.rotate(x * 2, *tables), *layer_tensors).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 9):
        x = torch.randn(rows, 96)
        torch.testing.assert_close(compiled(x), layer(x))
