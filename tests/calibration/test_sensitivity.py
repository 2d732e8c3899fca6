"""Mixed bits: the estimate behind them, how a budget is spent, and checkpoints that come of it."""

import json

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import pytest
import torch
from bq_calibration.architecture import InputGroup
from bq_calibration.checkpoint import verify
from bq_calibration.errors import UserError
from bq_calibration.model import SourceModel
from bq_calibration.pipeline import Calibration
from bq_calibration.recipes import make_recipe
from bq_calibration.sensitivity import allocate, sensitivities
from bq_kernels.format import BITS
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from .conftest import make_model

SMALL = dict(group_size=32, rotation="butterfly", rotation_block=32, samples=8, seqlen=32, steps=2)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # a tied head and one of its own
def test_estimate_of_the_loss(architecture, tmp_path):
    """Independent noise on the weights of one group of layers at a time: estimated and measured KL agree."""
    folder = make_model(tmp_path / "model", architecture)
    source = SourceModel(str(folder), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (8, 64), generator=generator)
    spread = {2: 4e-3, 3: 2e-3, 4: 1e-3}

    def rounding_error(weight, hessian, group, bits):
        return spread[bits] * torch.randn(weight.shape, generator=generator), hessian

    estimated = sensitivities(source, tokens, rounding_error, 0, Progress(disable=True))
    assert len(estimated) == source.num_blocks * len(source.groups[0])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits.log_softmax(-1)
        for (index, group), losses in estimated.items():
            assert losses[2] > losses[3] > losses[4] > 0
            measured = []
            for _ in range(4):
                layers = [model.get_submodule(f"model.layers.{index}.{name}") for name in group.layers]
                before = [layer.weight.clone() for layer in layers]
                for layer in layers:
                    layer.weight += spread[2] * torch.randn(layer.weight.shape, generator=generator)
                found = model(input_ids=tokens).logits.log_softmax(-1)
                measured.append((wanted.exp() * (wanted - found)).sum(-1).mean().item())
                for layer, weight in zip(layers, before, strict=True):
                    layer.weight.copy_(weight)
            ratio = losses[2] / (sum(measured) / len(measured))
            assert 0.5 < ratio < 2, (index, group.name, ratio)


def test_budget_goes_where_a_bit_saves_most():
    a, b = InputGroup(("a",), row_parallel=False), InputGroup(("b",), row_parallel=False)
    losses = {(0, a): {2: 8.0, 3: 2.0, 4: 1.9}, (0, b): {2: 9.0, 3: 2.0, 4: 0.0}}
    weights = {a: 10, b: 20}  # a bit more: a saves 0.6 a weight, then 0.01; b 0.35, then 0.1
    assert allocate(losses, weights, 2, 9) == {}
    assert allocate(losses, weights, 2, 10) == {(0, a): 3}
    assert allocate(losses, weights, 2, 25) == {(0, a): 4}  # b does not fit into what is left, a bit of a does
    assert allocate(losses, weights, 2, 30) == {(0, a): 3, (0, b): 3}
    assert allocate(losses, weights, 2, 50) == {(0, a): 3, (0, b): 4}
    assert allocate(losses, weights, 2, 1000) == {(0, a): 4, (0, b): 4}
    assert set(BITS) == {2, 3, 4}


@pytest.mark.parametrize(
    "settings", [{}, {"block_tokens": 1024, "train_tokens": 4096, "train_codes": True, "train_samples": 6}]
)
def test_checkpoint_of_mixed_bits(model, text, tmp_path, settings):
    recipe = make_recipe("fast", SMALL | {"dataset": str(text), "target_bpw": 3.6} | settings)
    Calibration(str(model), str(tmp_path / "out"), recipe, "cpu", plots=False).run(Progress(disable=True))
    verified = verify(tmp_path / "out")
    table = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["module_bits"]
    assert table and set(table.values()) <= {3, 4}
    assert 3.3 < verified.bits_per_weight() <= 3.6
    for index in range(2):  # layers that vLLM fuses have as many bits each
        prefix = f"model.layers.{index}."
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({table.get(prefix + name) for name in names}) == 1
    report = json.loads((tmp_path / "out" / "bq_report.json").read_text())
    assert {entry["bits"] for entry in report["inputs"]} <= {2, 3, 4}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(loaded(input_ids=torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize("settings", [{"rotation": "hadamard"}, {"bits": 3, "zero_point": "float"}])
def test_what_fewer_scales_save_goes_to_layers(model, text, tmp_path, settings):
    """`--group-size auto`: a scale per row, the size of groups, and more bits for some layers."""
    verified = {}
    for name, size in (("groups", 32), ("rows", None)):  # the usual 64 does not divide 96 features, 32 does
        recipe = make_recipe("fast", SMALL | {"dataset": str(text), "group_size": size} | settings)
        Calibration(str(model), str(tmp_path / name), recipe, "cpu", plots=False).run(Progress(disable=True))
        verified[name] = verify(tmp_path / name)
    groups, rows = verified["groups"], verified["rows"]
    assert rows.config.group_size == -1 and set(rows.config.module_bits.values()) <= {3, 4}
    steps = {}  # what a bit more costs layers that share an input, where they do not have 4 yet
    for name, (n, k) in rows.layers.items():
        if rows.config.bits_of(name) < 4:
            prefix, _, last = name.rpartition(".")
            key = prefix, last if last in ("o_proj", "down_proj") else "together"
            steps[key] = steps.get(key, 0) + n * k
    left = sum(groups.stored_bits.values()) - sum(rows.stored_bits.values())
    assert 0 <= left < min(steps.values())
    report = json.loads((tmp_path / "rows" / "bq_report.json").read_text())
    assert report["recipe"]["target_bpw"] == pytest.approx(groups.bits_per_weight())


@pytest.mark.parametrize(
    ("architecture", "settings"), [("llama", {"bits": 4}), ("qwen3_moe", {}), ("deepseek_v2", {"bits": 3})]
)
def test_groups_stay_where_layers_cannot_get_more_bits(architecture, settings, tmp_path):
    recipe = make_recipe("fast", SMALL | {"group_size": None} | settings)
    made = Calibration(str(make_model(tmp_path / "model", architecture)), str(tmp_path / "out"), recipe, "cpu")
    assert made.config.group_size == made.recipe.group_size == 32 and made.recipe.target_bpw is None


@pytest.mark.parametrize(("settings", "size"), [({}, -1), ({"train_tokens": 64}, 96), ({"block_tokens": 64}, -1)])
def test_scales_that_train_have_groups(settings, size, tmp_path):
    recipe = make_recipe("fast", SMALL | {"group_size": None, "rotation": "hadamard"} | settings)
    made = Calibration(str(make_model(tmp_path / "model", "llama")), str(tmp_path / "out"), recipe, "cpu")
    assert made.config.group_size == made.recipe.group_size == size  # inputs have 96 or 192 columns
    assert made.recipe.target_bpw == 2.5  # groups of 32 have it


def test_groups_fit_the_shards(tmp_path):
    folder = str(make_model(tmp_path / "model", "llama"))
    settings = SMALL | {"group_size": None, "train_tokens": 64, "tensor_parallel": 3}
    made = Calibration(folder, str(tmp_path / "out"), make_recipe("fast", settings), "cpu")
    assert made.config.group_size == 32  # o_proj and down_proj have 32 and 64 columns in a shard


def test_memory_counts_the_states_of_all_layers(model, text, tmp_path):
    needed = {}
    for target in (None, 3.6):
        recipe = make_recipe("fast", SMALL | {"dataset": str(text), "target_bpw": target})
        run = Calibration(str(model), str(tmp_path / "out"), recipe, "cpu", "float32")
        needed[target] = run.dry_run(Progress(disable=True))["memory_bytes"]
    states = 8 * 32 * 96 * 4  # 8 sequences of 32 tokens, 96 features in float32
    assert needed[3.6] - needed[None] == 2 * states  # in front of both layers and behind, in place of one at a time


def test_budget_below_what_is_there(model, text, tmp_path):
    recipe = make_recipe("fast", SMALL | {"dataset": str(text), "target_bpw": 2.0})
    with pytest.raises(UserError, match=r"--target-bpw 2.0: 2 bits alone, all counted, take 2\.\d+"):
        Calibration(str(model), str(tmp_path / "out"), recipe, "cpu", plots=False).run(Progress(disable=True))
