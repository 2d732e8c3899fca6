import pytest
import torch
from bq_kernels import reference
from bq_kernels.packing import pack
from bq_kernels.tiles import TILE_K, TILE_N, tile, tile_weight, tiled_linear, untile_codes


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(64, 128), (1, 32), (70, 160), (200, 576), (1100, 32)])
def test_there_and_back(shape, bits):
    codes = torch.randint(2**bits, shape, dtype=torch.uint8)
    tiles = tile_weight(pack(codes, bits), bits)
    assert tiles.shape == (-(-shape[0] // TILE_N), -(-shape[1] // TILE_K), 256 * bits)
    assert torch.equal(untile_codes(tiles, shape[1], shape[0]), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_words_hold_what_a_thread_multiplies(bits):
    """Word by word, from the description of mma operands: row (warp, half, g), columns 8·pair + 2t and 2t + 1."""
    codes = torch.randint(2**bits, (TILE_N, TILE_K))
    words = tile_weight(pack(codes, bits), bits).flatten().tolist()
    pairs = 16 // bits
    for thread in range(128):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        for block in range(bits // 2):
            for half in range(2):
                for word in range(2):
                    value = words[block * 512 + thread * 4 + half * 2 + word]
                    row = warp * 16 + half * 8 + g
                    for pair in range(pairs):
                        column = ((block * 2 + word) * pairs + pair) * 8 + 2 * t
                        for side in range(2):
                            code = value >> (16 * side + bits * pair) & (2**bits - 1)
                            assert code == codes[row, column + side]


@pytest.mark.parametrize("float_zero", [False, True])
def test_tiled_linear_is_the_reference(float_zero):
    codes, scales = torch.randint(4, (70, 192)), torch.rand(70, 3).half()
    layer = pack(codes, 2), scales, torch.rand(70, 3).half() if float_zero else None
    x, bias = torch.randn(3, 192), torch.randn(70)
    want = reference.packed_linear(x, *layer, bias)
    assert torch.equal(tiled_linear(x, *tile(*layer, 192), bias, 70), want)
    tables = reference.givens_tables(torch.randn(3, 192), 64)
    want = reference.packed_linear(reference.apply_rotation(x, *tables), *layer, bias)
    assert torch.equal(tiled_linear(x, *tile(*layer, 192), bias, 70, *tables), want)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="do not fit 96 input features"):
        tile(torch.zeros(8, 5, dtype=torch.int32), torch.ones(8, 3).half(), None, 96)
