"""The block, its statistics, and the dtype in which it is computed."""

import dataclasses

import pytest
import torch
from bq_calibration import compute, input_statistics
from bq_calibration.block import TOKENS_PER_BATCH, Original
from bq_calibration.compute import compute_dtypes, native_dtype
from bq_calibration.errors import UserError
from bq_calibration.input_statistics import InputStatistics
from bq_calibration.model import SourceModel
from bq_calibration.sampling import derive_seed, spread_rows
from transformers import AutoModelForCausalLM

from .conftest import CONFIGS, make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_running_block_by_block_is_the_model(architecture, tmp_path):
    folder = make_model(tmp_path / "model", architecture)
    source, tokens = SourceModel(str(folder), CPU), torch.randint(3, 300, (5, 24))
    hidden = source.embed(tokens)
    for index in range(source.num_blocks):
        with source.block(index) as block:
            assert (block.index, block.prefix) == (index, f"model.layers.{index}.")
            after = block.run(hidden)
            block.run(hidden, out=hidden)
            assert torch.equal(hidden, after)
    with source.final_norm() as norm:
        found = norm(hidden)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole.model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_hessian_is_summed_by_panels_of_its_lower_triangle(monkeypatch):
    monkeypatch.setattr(input_statistics, "_PANEL", 16)  # not a divisor of 40
    statistics, batches = InputStatistics(40, CPU), [torch.randn(3, 50, 40), torch.randn(2, 50, 40)]
    for batch in batches:
        statistics.add(batch)
    x = torch.cat(batches).flatten(0, -2)
    torch.testing.assert_close(statistics.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(statistics.hessian, statistics.hessian.T)


def test_captured_statistics_are_those_of_the_inputs(model):
    source = SourceModel(str(model), CPU)
    hidden = source.embed(torch.randint(3, 300, (6, 24)))
    with source.block(0) as block:
        for group in block.groups:
            seen = []
            layer = block.linear(group.layers[0])
            hook = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with block.observe() as observed:
                block.run(hidden)
            hook.remove()
            x = torch.cat(seen).flatten(0, -2)
            captured = block.capture(hidden, group)
            for statistics in (captured, observed[group]):
                assert statistics.tokens == len(x) == 6 * 24
                torch.testing.assert_close(statistics.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-6)
                assert all((row == x).all(1).any() for row in statistics.sample)
            assert not layer._forward_pre_hooks, "hooks are gone"


def test_drift_is_the_error_of_the_inputs(model):
    source = SourceModel(str(model), CPU)
    hidden = source.embed(torch.randint(3, 300, (6, 24)))
    worse = hidden + 0.1 * torch.randn_like(hidden)
    with source.block(0) as block:
        original = Original(block.clone(), hidden)
        for group in block.groups:
            wanted = torch.cat(list(block.inputs(hidden, group))).flatten(0, -2)
            x = torch.cat(list(block.inputs(worse, group))).flatten(0, -2)
            assert len(x) == 6 * 24
            statistics = block.capture(worse, group, original)
            torch.testing.assert_close(statistics.drift, (wanted - x).T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(statistics.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            assert block.capture(worse, group).drift is None
        block.linear("mlp.up_proj").weight.data.zero_()
        assert original.block.linear("mlp.up_proj").weight.any(), "a clone has weights of its own"


def test_sample_is_spread_over_all_batches():
    statistics = InputStatistics(1, CPU)
    for start in range(0, 40 * TOKENS_PER_BATCH, TOKENS_PER_BATCH):
        statistics.add(torch.arange(start, start + TOKENS_PER_BATCH)[:, None].float())
    sample = statistics.sample[:, 0]
    assert len(sample) == 1024 and sample[0] == 0 and sample[-1] > 39 * TOKENS_PER_BATCH


def test_block_names_what_it_does_not_have(model):
    block = SourceModel(str(model), CPU).empty_block(0)
    with pytest.raises(UserError, match=r"there is no layer mlp\.nothing inside"):
        block.linear("mlp.nothing")
    with pytest.raises(UserError, match="mlp is a LlamaMLP, not a linear layer"):
        block.linear("mlp")


def test_bad_inputs_are_refused_by_block_and_layers(model):
    source = SourceModel(str(model), CPU)
    hidden = source.embed(torch.randint(3, 300, (2, 8)))
    hidden[1, 3, 5] = torch.nan
    with source.block(1) as block, pytest.raises(UserError, match="block 1, q_proj,k_proj,v_proj: the inputs hold NaN"):
        block.capture(hidden, block.groups[0])


def test_spread_rows():
    assert spread_rows(torch.arange(10), 5).tolist() == [0, 2, 4, 6, 8]
    assert spread_rows(torch.arange(12), 5).tolist() == [0, 2, 4, 7, 9]
    assert spread_rows(torch.arange(3), 5).tolist() == [0, 1, 2]


def test_seeds_of_the_parts_of_a_run_differ():
    seeds = {derive_seed(seed, block, group) for seed in range(3) for block in range(80) for group in range(4)}
    assert len(seeds) == 3 * 80 * 4 and all(0 <= seed < 2**63 for seed in seeds)


# ---- the dtype


@pytest.fixture
def rates(monkeypatch):
    """Makes this CPU multiply as fast as one wants: seconds of a product by dtype."""

    def pretend(bfloat16: float, float16: float, float32: float = 1.0) -> None:
        seconds = {torch.float32: float32, torch.bfloat16: bfloat16, torch.float16: float16}
        monkeypatch.setattr(compute, "_cpu_seconds", lambda: seconds)

    return pretend


def test_sixteen_bits_only_where_they_are_native(rates):
    rates(bfloat16=7.0, float16=7.0)
    assert native_dtype(torch.bfloat16, "cpu") == native_dtype(torch.float16, "cpu") == torch.float32
    assert compute_dtypes("auto", torch.bfloat16, "cpu").to_dict() == {"forward": "float32", "training": "float32"}
    rates(bfloat16=0.5, float16=7.0)
    assert native_dtype(torch.bfloat16, "cpu") == torch.bfloat16
    assert compute_dtypes("auto", torch.bfloat16, "cpu").to_dict() == {"forward": "bfloat16", "training": "bfloat16"}
    assert compute_dtypes("auto", torch.float16, "cpu").to_dict() == {"forward": "float32", "training": "bfloat16"}
    assert compute_dtypes("auto", torch.float32, "cpu").to_dict() == {"forward": "float32", "training": "bfloat16"}


def test_forced_dtype(rates):
    rates(bfloat16=7.0, float16=7.0)
    assert compute_dtypes("bfloat16", torch.float32, "cpu").to_dict() == {"forward": "bfloat16", "training": "bfloat16"}
    assert compute_dtypes("float16", torch.float32, "cpu").to_dict() == {"forward": "float16", "training": "float32"}
    with pytest.raises(UserError, match="--compute-dtype int8: expected one of auto, float32"):
        compute_dtypes("int8", torch.float32, "cpu")


def test_this_machine_is_measured_the_same_twice():
    measured = [compute._cpu_seconds.__wrapped__() for _ in range(2)]
    chosen = [{dtype: seconds <= once[torch.float32] for dtype, seconds in once.items()} for once in measured]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(("requested", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_blocks_are_loaded_in_the_compute_dtype(requested, expected, tmp_path):
    folder = make_model(tmp_path / "model", dtype=torch.bfloat16)
    source = SourceModel(str(folder), CPU, requested)
    hidden = source.embed(torch.randint(3, 300, (2, 8)))
    with source.block(0) as block:
        assert {p.dtype for p in block.module.parameters()} == {expected}
        assert block.run(hidden).dtype == hidden.dtype == expected
    assert {field.name for field in dataclasses.fields(source.compute)} == {"forward", "training"}
