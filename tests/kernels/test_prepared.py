"""Prepared weights multiply like the reference, tiled and not."""

import pytest
import torch
from bq_kernels import reference
from bq_kernels.format import num_angles
from bq_kernels.packing import pack
from bq_kernels.prepared import prepare_weights, prepared_linear


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


def test_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit 96 input features"):
        prepare_weights(torch.zeros(8, 5, dtype=torch.int32), torch.ones(8, 3).half(), None, None, 1, 96, tiled=True)
