import pytest
import torch
from bq_kernels.packing import pack, unpack

# What a checkpoint holds for codes (i² + i//3) mod 2^bits, i < 32: a change of these bytes is a new format version
GOLDEN = {
    2: "84e93284e93284e9",
    3: "081579e2c9c2b56e0c081579",
    4: "10a4a13642c7d46865fa068b982c29be",
}


def stream_bytes(codes, bits):
    """The row as bytes, from a string of bits, lowest first."""
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    return bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_golden(bits):
    codes = [(i * i + i // 3) % 2**bits for i in range(32)]
    packed = pack(torch.tensor(codes), bits)
    assert packed.dtype == torch.int32
    assert packed.numpy().astype("<i4").tobytes().hex() == GOLDEN[bits]
    assert stream_bytes(codes, bits).hex() == GOLDEN[bits]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(32,), (3, 96), (2, 5, 576), (0, 64)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_round_trip(bits, shape, dtype):
    codes = torch.randint(2**bits, shape, dtype=dtype)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 32)
    for row, words in zip(codes.reshape(-1, shape[-1]).tolist(), packed.reshape(-1, packed.shape[-1]), strict=True):
        assert words.numpy().astype("<i4").tobytes() == stream_bytes(row, bits)
    unpacked = unpack(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_extreme_codes(bits):
    for code in (0, 2**bits - 1):
        codes = torch.full((2, 64), code)
        assert torch.equal(unpack(pack(codes, bits), bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("code", [-1, 16, 300])
def test_refuses_codes_out_of_range(bits, code):
    codes = torch.zeros(32, dtype=torch.int64)
    codes[7] = code
    with pytest.raises(ValueError, match=r"codes must lie in \[0, "):
        pack(codes, bits)


def test_refuses_rows_that_do_not_fill_words():
    with pytest.raises(ValueError, match="do not fill whole 32-bit words"):
        pack(torch.zeros(2, 33, dtype=torch.int64), 2)
