"""KL divergence of logits and its gradient: the torch reference against autograd, the kernel against the reference."""

import pytest
import torch
import torch.nn.functional as F
from bq_kernels.divergence import reference_divergence_

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
SHAPES = [(1, 1), (3, 50), (2, 4096), (5, 4097), (1, 12345)]


def random_logits(shape, dtype):
    """Two models that agree more or less, some of their logits far from all others."""
    found = torch.randn(shape) * 3
    wanted = found + torch.randn(shape)
    wanted[..., 0] += 40
    return found.to(dtype), wanted.to(dtype)


def exact(found, wanted):
    """Divergence per row and its gradient by autograd in float64."""
    found = found.double().requires_grad_()
    loss = F.kl_div(found.log_softmax(-1), wanted.double().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), found)[0]


def check(loss, gradient, found, wanted):
    want_loss, want_gradient = exact(found, wanted)
    assert loss.dtype == FLOAT and gradient.dtype == found.dtype
    # logits are of the order of 50: exponents and normalisers are off by as many roundings of float32
    bound = 64 * 50 * torch.finfo(FLOAT).eps
    assert ((loss.double() - want_loss).abs() <= bound * (1 + want_loss.abs())).all()
    allowed = bound + torch.finfo(found.dtype).eps / 2 * want_gradient.abs()
    allowed = allowed + torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    assert ((gradient.double() - want_gradient).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FLOAT])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape, dtype):
    found, wanted = random_logits(shape, dtype)
    gradient = found.clone()
    check(reference_divergence_(gradient, wanted), gradient, found, wanted)


def test_equal_logits_do_not_diverge():
    logits = torch.randn(4, 100)
    gradient = logits.clone()
    assert reference_divergence_(gradient, logits).abs().max() < 1e-6 and gradient.abs().max() < 1e-7


def by_kernel(found, wanted):
    """Loss and gradient in one tensor, so that both come back from another process."""
    from bq_kernels.triton_divergence import divergence_

    loss = divergence_(found, wanted)
    return torch.cat((loss[:, None].double(), found.double()), 1)


@pytest.mark.parametrize("dtype", [HALF, FLOAT])  # Triton's interpreter cannot multiply bfloat16
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(call, shape, dtype):
    found, wanted = random_logits(shape, dtype)
    got = call(by_kernel, found.clone(), wanted)  # processes share the memory of tensors
    check(got[:, 0].float(), got[:, 1:].to(dtype), found, wanted)
