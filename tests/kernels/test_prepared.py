"""Prepared weights multiply like the reference, tiled and not."""

import pytest
import torch
from bq_kernels import reference
from bq_kernels.format import num_angles
from bq_kernels.packing import pack
from bq_kernels.prepared import prepare_weights, prepared_embedding, prepared_linear


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("float_zero", [False, True])
def test_product(tiled, rotates, float_zero):
    scales = torch.rand(70, 6).half()
    zeros = (torch.rand(70, 6) * 3).half() if float_zero else None
    stored = pack(torch.randint(4, (70, 192)), 2), scales, zeros
    angles = torch.randn(2, num_angles(96)) if rotates else None
    weights = prepare_weights(*stored, angles, 96, 192, tiled=tiled)
    assert weights.qweight.dim() == (3 if tiled else 2)
    assert (weights.cos_sin is not None) == rotates and (weights.zeros is not None) == float_zero
    x, bias = torch.randn(2, 3, 192), torch.randn(70)
    want = x @ reference.dense_weight(*stored, angles, 96, 192).T + bias
    torch.testing.assert_close(prepared_linear(x, weights, bias, 70), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("kept", [[], [0], [3, 40, 41, 69], list(range(70))], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_kept(tiled, rotates, kept, dtype):
    """They stand in place of the packed ones, in the product, the look-up and the dense weight."""
    stored = pack(torch.randint(4, (70, 192)), 2), torch.rand(70, 6).half(), None
    angles = torch.randn(2, num_angles(96)) if rotates else None
    layer = *stored, angles, 96, 192
    tokens, rows = torch.tensor(kept, dtype=torch.int32), torch.randn(len(kept), 192).half()
    want = reference.dense_weight(*layer)
    want[kept] = rows.float()
    torch.testing.assert_close(reference.dense_weight(*layer, tokens, rows), want)
    weights = prepare_weights(*layer, tokens, rows, tiled=tiled)
    x, ids = torch.randn(2, 3, 192).to(dtype), torch.randint(70, (4, 9))
    close = dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.3, rtol=2e-2)
    for bias in (None, torch.randn(70).to(dtype)):
        found = prepared_linear(x, weights, bias, 70)
        assert found.dtype == dtype
        expected = x.float() @ want.T + (0 if bias is None else bias.float())
        torch.testing.assert_close(found.float(), expected, **close)
    found = prepared_embedding(ids.T, weights, 192, dtype)
    torch.testing.assert_close(found, want[ids.T].to(dtype), atol=1e-5, rtol=2e-2)
    assert torch.equal(prepared_embedding(tokens, weights, 192, torch.float16), rows)


def test_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit 96 input features"):
        prepare_weights(torch.zeros(8, 5, dtype=torch.int32), torch.ones(8, 3).half(), None, None, 1, 96, tiled=True)
