"""Schedules, and the optimizer of latent codes: what it holds per weight, and that 16 bits lose nothing."""

import pytest
import torch
from bq_calibration.optimizer import Optimizer, latent_dtype
from bq_calibration.schedule import DECAY, WARM_UP, Schedule
from torch import nn

RATES = {"codes": 1e-2, "scales": 1e-2}


def test_schedules():
    cosine, wsd = (Schedule.of(kind, 200) for kind in ("cosine", "wsd"))
    for schedule in (cosine, wsd):
        factors = [schedule.factor(step) for step in range(200)]
        assert max(factors) <= 1 and factors[0] == pytest.approx(1 / (WARM_UP * 200)) and factors[-1] < 0.1
    assert wsd.decay_from == 200 * (1 - DECAY)
    stable = [wsd.factor(step) for step in range(20, wsd.decay_from)]
    assert set(stable) == {1.0}
    longer = Schedule("wsd", 1000, wsd.warm_up)  # up to the fall it does not depend on the number of steps
    assert [longer.factor(step) for step in range(wsd.decay_from)] == [
        wsd.factor(step) for step in range(wsd.decay_from)
    ]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("in_backward", [False, True])
def test_state_per_weight(bits, in_backward):
    """Bytes per weight beside the packed model: 12 or 4, gradients freed as they come where one pass is one step."""
    if bits == 8:
        pytest.importorskip("torchao")
    codes = nn.Parameter(torch.rand(256, 8, 64).to(latent_dtype(bits)))
    scales = nn.Parameter(torch.ones(256, 8))
    optimizer = Optimizer({"codes": [codes], "scales": [scales]}, bits, in_backward)
    optimizer.set_rates(RATES)
    before = codes.detach().clone()
    (codes.float().square().sum() + scales.sum()).backward()
    assert (codes.grad is None) == in_backward and scales.grad is not None
    optimizer.step()
    assert codes.grad is None and scales.grad is None and not torch.equal(codes, before)
    held = sum(tensor.nbytes for name, tensor in optimizer.state().items() if name.startswith("0."))
    assert held / codes.numel() <= {32: 12, 8: 4.05}[bits]  # 8: two scales per 256 weights, and a table


def test_both_ways_to_step_are_one():
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        codes, scales = nn.Parameter(torch.rand(8, 2, 32)), nn.Parameter(torch.ones(8, 2))
        optimizer = Optimizer({"codes": [codes], "scales": [scales]}, 32, in_backward)
        for step in range(3):
            optimizer.set_rates({kind: rate / (step + 1) for kind, rate in RATES.items()})
            ((codes * scales[..., None]).sin().sum()).backward()
            optimizer.step()
        found.append((codes.detach(), scales.detach()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_small_steps_are_not_lost_in_16_bits():
    """Steps of a tenth of bfloat16's spacing at 2 move codes as far as in 32 bits, on average over them."""
    pytest.importorskip("torchao")
    moved = []
    for bits in (32, 8):
        torch.manual_seed(0)
        codes = nn.Parameter(torch.full((64, 4, 64), 2.0, dtype=latent_dtype(bits)))
        optimizer = Optimizer({"codes": [codes]}, bits)
        for _ in range(20):
            optimizer.set_rates({"codes": 1.5e-3})
            codes.float().sum().backward()
            optimizer.step()
        moved.append((2 - codes.detach().float()).mean().item())
    assert moved[0] == pytest.approx(20 * 1.5e-3, rel=1e-3)
    assert moved[1] == pytest.approx(moved[0], rel=0.05)
