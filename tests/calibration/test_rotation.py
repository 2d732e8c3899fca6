import math

import pytest
import torch
from bq_calibration.quantize import damped, output_energy
from bq_calibration.rotation import (
    OBJECTIVES,
    ButterflyRotation,
    RotationProblem,
    gptq_loss,
    initial_angles,
    learn_rotation,
    output_loss,
    uniformity,
)
from bq_kernels.format import num_angles
from bq_kernels.reference import rotate, unrotate


def make_problem(rows=24, features=96, block_size=32, group=32):
    torch.manual_seed(1)
    scale = torch.linspace(-2, 2, features).exp()  # some features are outliers
    x = torch.randn(400, features) * scale @ torch.linalg.qr(torch.randn(features, features))[0]
    return RotationProblem(torch.randn(rows, features), x.T @ x / len(x), x[:64], block_size, 2, group), x


@pytest.mark.parametrize("block_size", [32, 96, 192])
def test_rotation_is_that_of_the_reference(block_size):
    angles = torch.randn(192 // block_size, num_angles(block_size))
    x, rotation = torch.randn(7, 192), ButterflyRotation(angles, block_size)
    bound = 1e-5 * 192**0.5
    assert (rotation.forward(x) - rotate(x, angles, block_size)).abs().max() < bound
    assert (rotation.inverse(x) - unrotate(x, angles, block_size)).abs().max() < bound
    hessian = x.T @ x
    dense = rotate(torch.eye(192), angles, block_size).T
    assert (rotation.rotate_hessian(hessian) - dense @ hessian @ dense.T).abs().max() < 1e-4 * hessian.abs().max()


@pytest.mark.parametrize("kind", ["identity", "hadamard", "random"])
def test_initial_angles(kind):
    angles = initial_angles(kind, 96, 96, torch.Generator().manual_seed(0))
    again = initial_angles(kind, 96, 96, torch.Generator().manual_seed(0))
    assert angles.shape == (1, num_angles(96)) and torch.equal(angles, again)
    q = rotate(torch.eye(96), angles, 96)
    if kind == "identity":
        assert torch.equal(q, torch.eye(96))
    elif kind == "hadamard":
        assert q[q.abs() > 1e-6].abs().allclose(torch.tensor(32**-0.5))
    else:
        assert 0.1 < q.abs().max() < 1


def test_output_loss_is_the_error_over_the_tokens():
    problem, x = make_problem()
    angles = torch.randn(3, num_angles(32))
    w = rotate(problem.weight, angles, 32).unflatten(1, (-1, 32))
    step = w.square().mean(-1, keepdim=True).sqrt() * 0.9957
    quantized = (step * ((w / step + 1.5).round().clamp(0, 3) - 1.5)).flatten(1)
    direct = (x @ problem.weight.T - rotate(x, angles, 32) @ quantized.T).square().sum()
    direct /= (x @ problem.weight.T).square().sum()
    assert output_loss(problem, ButterflyRotation(angles, 32)).item() == pytest.approx(direct.item(), rel=1e-3)


def test_output_energy_and_its_gradient_are_those_of_the_quadratic_form():
    problem, _ = make_problem()
    weight = torch.randn(5, 96, requires_grad=True)
    direct = ((weight @ problem.hessian) * weight).sum()
    energy = output_energy(weight, problem.hessian)
    assert energy.item() == pytest.approx(direct.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(direct, weight)
    (gradient,) = torch.autograd.grad(energy, weight)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("group", [32, 96])
def test_gptq_loss_and_its_gradient_are_those_of_the_factorisation(group):
    problem, _ = make_problem(block_size=96, group=group)
    angles = (0.3 * torch.randn(1, num_angles(96))).requires_grad_()
    loss = gptq_loss(problem, ButterflyRotation(angles, 96))
    (gradient,) = torch.autograd.grad(loss, angles)
    rotation = ButterflyRotation(angles, 96)
    rotated = rotation.rotate_hessian(damped(problem.hessian)).double().flip(0, 1)
    pivots = torch.linalg.cholesky((rotated + rotated.T) / 2).diagonal().square().flip(0)
    energy = (
        rotation.forward(problem.weight).square().unflatten(1, (-1, group)).sum(0).mean(-1).repeat_interleave(group)
    )
    direct = 0.1188 * (pivots * energy).sum() / problem.output_energy
    (expected,) = torch.autograd.grad(direct, angles)
    assert loss.item() == pytest.approx(direct.item(), rel=1e-4)
    assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max()


def test_uniformity_is_zero_only_for_even_occupancy():
    problem, _ = make_problem()
    angles = torch.zeros(3, num_angles(32))
    even = torch.linspace(-1, 1, 4).repeat(64, 24)
    problem.inputs = even
    assert uniformity(problem, ButterflyRotation(angles, 32)).item() == pytest.approx(0, abs=1e-4)
    problem.inputs = torch.cat(
        (torch.ones(64, 1), torch.zeros(64, 95)), 1
    )  # one outlier: the middle bins hold nearly all
    assert uniformity(problem, ButterflyRotation(angles, 32)).item() > 0.5 * math.log(2)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.02), ("sgd", 2.0)])
@pytest.mark.parametrize("uniformity_weight", [0.0, 0.1])
def test_learning_lowers_the_loss(objective, optimizer, lr, uniformity_weight):
    problem, _ = make_problem()
    start = initial_angles("identity", 96, 32, torch.Generator())
    angles, losses = learn_rotation(problem, start, objective, optimizer, lr, 40, uniformity_weight)
    assert angles.dtype == torch.float16 and torch.isfinite(angles).all()
    assert min(losses) < 0.95 * losses[0]


def test_no_steps_returns_the_start():
    problem, _ = make_problem()
    start = initial_angles("hadamard", 96, 32, torch.Generator())
    angles, losses = learn_rotation(problem, start, "gptq", "adam", 0.02, 0, 0.0)
    assert torch.equal(angles, start.half()) and len(losses) == 1
