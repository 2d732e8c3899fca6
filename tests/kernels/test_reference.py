import math

import pytest
import torch
from bq_kernels import reference
from bq_kernels.format import num_angles
from bq_kernels.packing import pack

BLOCKS = [1, 2, 3, 8, 9, 12, 20, 32, 36, 48]  # 2ᵏ·m with m = 1, 3, 5, 9


def dense_block(angles, k, m):
    """Q of one block in float64: the product of its Givens matrices, layer by layer; differentiable."""
    run, angle = 2**k, iter(angles.double())
    q = torch.eye(m * run, dtype=torch.float64)

    def turn(q, pairs, theta):
        givens = torch.eye(m * run, dtype=torch.float64)
        for p, s in pairs:
            givens[p, p] = givens[s, s] = theta.cos()
            givens[p, s] = -theta.sin()
            givens[s, p] = theta.sin()
        return givens @ q

    for j in range(k):
        for p in range(m * run):
            if p // 2**j % 2 == 0:
                q = turn(q, [(p, p + 2**j)], next(angle))
    for r in range(m):
        for s in range(r + 1, m):
            q = turn(q, [(r * run + c, s * run + c) for c in range(run)], next(angle))
    assert next(angle, None) is None
    return q


def dense(angles, block_size):
    m = block_size
    while m % 2 == 0:
        m //= 2
    k = int(math.log2(block_size // m))
    return torch.block_diag(*(dense_block(row, k, m) for row in angles))


def random_angles(blocks, block_size):
    return (torch.rand(blocks, num_angles(block_size)) * 2 - 1) * math.pi


@pytest.mark.parametrize("block_size", BLOCKS)
def test_rotate_is_the_product_of_givens_matrices(block_size):
    angles = random_angles(2, block_size)
    x = torch.randn(3, 5, 2 * block_size)
    y = reference.rotate(x, angles, block_size)
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), x.double() @ dense(angles, block_size).T, atol=2e-5, rtol=0)
    back = reference.unrotate(x, angles, block_size)
    torch.testing.assert_close(back.double(), x.double() @ dense(angles, block_size), atol=2e-5, rtol=0)


@pytest.mark.parametrize("block_size", [1, 64, 96, 320, 576, 11008])
def test_rotation_is_orthogonal(block_size):
    angles = random_angles(1, block_size)
    x = torch.randn(4, block_size)
    y = reference.rotate(x, angles, block_size)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-5, atol=1e-5 * block_size)
    torch.testing.assert_close(reference.unrotate(y, angles, block_size), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_shape_and_strides(dtype):
    angles = random_angles(2, 12)
    x = torch.randn(24, 5, 3, dtype=dtype).transpose(0, 2)
    y = reference.rotate(x, angles, 12)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert torch.equal(y, reference.rotate(x.float(), angles, 12).to(dtype))
    for empty in (torch.empty(0, 24, dtype=dtype), torch.empty(3, 0, 24, dtype=dtype)):
        assert reference.rotate(empty, angles, 12).shape == empty.shape
        assert reference.unrotate(empty, angles, 12).shape == empty.shape


@pytest.mark.parametrize("block_size", [1, 4, 5, 12, 24])
def test_gradients(block_size):
    angles = random_angles(2, block_size).requires_grad_()
    x = torch.randn(3, 2 * block_size, requires_grad=True)
    probe = torch.randn(3, 2 * block_size)
    (reference.rotate(x, angles, block_size) * probe).sum().backward()
    angles64, x64 = (t.detach().double().requires_grad_() for t in (angles, x))
    (x64 @ dense(angles64, block_size).T * probe).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, atol=1e-5, rtol=1e-5)
    if angles.numel():
        torch.testing.assert_close(angles.grad.double(), angles64.grad, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("log_size", [2, 6, 10])
def test_hadamard_is_sylvesters_behind_thue_morse_signs(log_size):
    size = 2**log_size
    sign = lambda number: (-1.0) ** number.bit_count()  # noqa: E731
    wanted = torch.tensor([[sign(row & column) * sign(column) for column in range(size)] for row in range(size)])
    found = reference.rotate(torch.eye(size), reference.hadamard_angles(size, size), size).T
    torch.testing.assert_close(found * size**0.5, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 64, 96, 576])
def test_hadamard_angles(block_size):
    angles = reference.hadamard_angles(2 * block_size, block_size)
    assert angles.shape == (2, num_angles(block_size))
    q = reference.rotate(torch.eye(2 * block_size), angles, block_size).T
    run = block_size & -block_size
    inside = torch.block_diag(*[torch.ones(run, run)] * (2 * block_size // run))
    torch.testing.assert_close(q.abs(), inside / math.sqrt(run), atol=1e-6, rtol=0)


def test_zero_angles_are_the_identity():
    x = torch.randn(3, 96)
    assert torch.equal(reference.rotate(x, torch.zeros(2, num_angles(48)), 48), x)


def test_refuses_angles_of_another_block_size():
    with pytest.raises(ValueError, match=r"expected angles \[blocks, 192\] for block size 64, got"):
        reference.rotate(torch.randn(2, 64), torch.zeros(1, 32), 64)


def random_layer(out_features, in_features, bits, group, float_zero):
    codes = torch.randint(2**bits, (out_features, in_features))
    scales = torch.rand(out_features, in_features // group).half()
    zeros = (torch.rand(out_features, in_features // group) * (2**bits - 1)).half() if float_zero else None
    return codes, pack(codes, bits), scales, zeros


def decode(qweight, bits, scales, zeros, in_features):
    """W′ in float64, code by code, from the bit stream of every row."""
    weight = torch.empty(qweight.shape[0], in_features, dtype=torch.float64)
    group = in_features // scales.shape[1]
    for n, words in enumerate(qweight.tolist()):
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        for column in range(in_features):
            code = (stream >> (bits * column)) & (2**bits - 1)
            zero = (2**bits - 1) / 2 if zeros is None else zeros[n, column // group].item()
            weight[n, column] = scales[n, column // group].item() * (code - zero)
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize(("in_features", "group"), [(64, 32), (192, 96), (96, 96)])
def test_packed_linear(bits, float_zero, in_features, group):
    _, qweight, scales, zeros = random_layer(7, in_features, bits, group, float_zero)
    assert reference.layout_of(qweight, scales, in_features) == (bits, group)
    weight = decode(qweight, bits, scales, zeros, in_features)
    torch.testing.assert_close(
        reference.dequantize(qweight, scales, zeros, in_features).double(), weight, atol=0, rtol=1e-6
    )
    x, bias = torch.randn(2, 3, in_features), torch.randn(7)
    want = x.double() @ weight.T + bias
    got = reference.packed_linear(x, qweight, scales, zeros, bias)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    half = reference.packed_linear(x.half(), qweight, scales, zeros)
    assert half.dtype == torch.float16
    assert reference.packed_linear(x[:0], qweight, scales, zeros, bias).shape == (0, 3, 7)


@pytest.mark.parametrize("block_size", [None, 1, 32, 48, 96])
def test_dense_weight_is_the_rotation_then_the_packed_linear(block_size):
    _, qweight, scales, zeros = random_layer(5, 96, 2, 32, True)
    x = torch.randn(4, 96)
    angles = None if block_size is None else random_angles(96 // block_size, block_size)
    rotated = x if block_size is None else reference.rotate(x, angles, block_size)
    weight = reference.dense_weight(qweight, scales, zeros, angles, block_size or 0, 96)
    want = reference.packed_linear(rotated, qweight, scales, zeros)
    torch.testing.assert_close(x @ weight.T, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "groups"),
    [(7, 1), (2, 1), (10, 1), (4, 0), (4, 3)],  # 2 bits in a row of 64 are 4 words
)
def test_refuses_layouts(words, groups):
    with pytest.raises(ValueError, match="do not fit 64 input features"):
        reference.layout_of(torch.zeros(3, words, dtype=torch.int32), torch.zeros(3, groups), 64)
