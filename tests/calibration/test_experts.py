"""Mixtures of experts: what is rounded for which tokens, and what is refused."""

import json
import logging
import math
import shutil

import pytest
import torch
from bq_calibration import end_to_end, quantize_block
from bq_calibration.architecture import input_groups
from bq_calibration.checkpoint import verify
from bq_calibration.errors import UserError
from bq_calibration.experts import Experts, split_tensors
from bq_calibration.input_statistics import InputStatistics
from bq_calibration.model import SourceModel
from bq_calibration.pipeline import Calibration
from bq_calibration.preflight import plan
from bq_calibration.recipes import make_recipe
from bq_calibration.skeleton import empty_model
from bq_calibration.store import TensorStore
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .conftest import CONFIGS, make_model
from .test_calibrate import SMALL, interrupted, run, same_checkpoint

TRAINED = dict(
    rotation="hadamard",
    train_samples=4,
    held_out=1,
    block_tokens=256,
    train_tokens=256,
    tokens_per_step=64,
    train_codes=True,
)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("mixture") / "model", "qwen3_moe")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_experts_compute_what_transformers_does(architecture, tmp_path):
    folder = make_model(tmp_path / "model", architecture)
    stacked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[0].mlp.experts
    experts, store = Experts(stacked, ("gate_proj", "up_proj", "down_proj")), TensorStore(folder)
    split_tensors(store, architecture)
    prefix = "model.layers.0.mlp.experts."
    experts.load_state_dict({name: store.get(prefix + name) for name in experts.state_dict()})
    assert len(experts) == 6 and all(store.shape(prefix + name) == t.shape for name, t in experts.state_dict().items())
    weights, numbers = torch.randn(9, len(experts)).softmax(-1).topk(2, dim=-1)
    x = 5 * torch.randn(9, 96)  # beyond the limits of gpt-oss
    with torch.no_grad():
        torch.testing.assert_close(experts(x, numbers, weights), stacked(x, numbers, weights), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_time_counts_the_experts_that_a_token_chooses(architecture, tmp_path):
    """A further token of end-to-end training: forward, backward twice, the 16-bit model; and the loss."""
    folder = make_model(tmp_path / "model", architecture)
    config = Calibration(str(folder), "unused", make_recipe("fast", SMALL), "cpu").config
    source = SourceModel(str(folder), torch.device("cpu"))

    def operations(tokens: int, **settings) -> float:
        recipe = make_recipe("fast", SMALL | {"train_tokens": tokens} | settings)
        return plan(source, config, recipe, 10**10).operations

    unchosen = [f".experts.{number}." for number in range(2, 6)]
    met = [name for name in source.linear_weights if not any(part in name for part in unchosen)]
    weights = sum(math.prod(source.store.shape(name)) for name in met)
    head = source.vocabulary * source.text_config.hidden_size
    assert len(met) < len(source.linear_weights)
    assert (operations(128) - operations(64)) / 64 == pytest.approx(8 * weights + 6 * head)
    after_blocks = operations(128, block_tokens=64) - operations(64, block_tokens=64)  # which leave its states behind
    assert after_blocks / 64 == pytest.approx(6 * weights + 6 * head)


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_a_dequantized_mixture_is_an_ordinary_one(architecture, tmp_path, text):
    out = run(make_model(tmp_path / "model", architecture), tmp_path / "out", text)
    ids = torch.arange(3, 19)[None]
    dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).dequantize().eval()
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        (
            "mixtral",
            {"embedding_bits": 4},
            r"--embedding-bits 4: vLLM's MixtralForCausalLM keeps model\.embed_tokens in 16",
        ),
        ("gpt_oss", {"head_bits": 3}, "--head-bits 3: vLLM's GptOssForCausalLM keeps lm_head in 16 bits; use 16"),
    ],
)
def test_tables_that_vllm_keeps_in_16_bits(architecture, settings, message, tmp_path, text):
    with pytest.raises(UserError, match=message):
        run(make_model(tmp_path / "model", architecture), tmp_path / "out", text, **settings)


def test_hessian_of_an_expert_is_topped_up():
    few, many = torch.randn(3, 8), torch.randn(50, 8)
    statistics = [InputStatistics(8, torch.device("cpu")) for _ in range(3)]
    statistics[0].add(few)
    statistics[1].add(many)  # the third expert sees nothing
    together = InputStatistics(8, torch.device("cpu"))
    for each in statistics:
        together.merge(each)
    everything = torch.cat((few, many))
    shared = everything.T @ everything / 53
    torch.testing.assert_close(together.hessian, shared)
    torch.testing.assert_close(statistics[0].topped_up(shared, 2.0), (few.T @ few + 2 * shared) / 5)
    torch.testing.assert_close(statistics[2].topped_up(shared, 2.0), shared)


def test_an_expert_without_a_token(mixture, tmp_path, text, caplog):
    """The routers never take expert 0: its weights are rounded all the same, and a line says so."""
    folder = shutil.copytree(mixture, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            row = tensors[name][4].clone()
            tensors[name][:4] = torch.stack((0 * row, -row, 3 * row, -3 * row))  # two are always above the first
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        out = run(folder, tmp_path / "out", text)
    verify(out)
    report = json.loads((out / "bq_report.json").read_text())
    counts = [entry["expert_tokens"] for entry in report["inputs"] if "expert_tokens" in entry]
    assert any(0 in tokens for tokens in counts)
    assert "experts saw fewer tokens than they have inputs" in caplog.text
    store = TensorStore(out)
    assert all(bool(store.get(name).isfinite().all()) for name in store.names() if not name.endswith("qweight"))


def test_one_rotation_for_all_experts(mixture, tmp_path, text):
    out = run(mixture, tmp_path / "out", text)
    store = TensorStore(out)
    for last in ("gate_proj", "down_proj"):
        angles = [store.get(f"model.layers.1.mlp.experts.{e}.{last}.angles") for e in range(6)]
        assert all(torch.equal(each, angles[0]) for each in angles)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "mlp.gate" in config["modules_to_not_convert"]


def test_bits_by_layer_are_refused(mixture, tmp_path, text):
    with pytest.raises(UserError, match="--target-bpw: a mixture of experts has the same bits everywhere"):
        run(mixture, tmp_path / "out", text, target_bpw=2.8)


def test_a_layer_of_no_known_kind():
    model = empty_model(CONFIGS["qwen3_moe"]())
    del model.model.layers[1].mlp.experts[2].up_proj
    with pytest.raises(
        UserError, match=r"layer 1 of a qwen3_moe model has no mlp\.experts\.2\.up_proj and no mlp\.gate_"
    ):
        input_groups(model)


def test_full_width_with_two_widths_of_one_name(tmp_path, text):
    model = make_model(tmp_path / "model", "qwen2_moe")
    with pytest.raises(UserError, match="full: down_proj has 192 and 64 inputs"):
        run(model, tmp_path / "out", text, rotation_block=None)


@pytest.mark.parametrize("settings", [{}, TRAINED], ids=["rounded", "trained"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v2"])
def test_resume_gives_the_same_bytes(architecture, settings, tmp_path, text, monkeypatch):
    """Interrupted between two experts of the last layer, and at the first step of end-to-end training."""
    model = make_model(tmp_path / "model", architecture)
    rounded, counts = quantize_block.round_gptq, []
    with monkeypatch.context() as patch:
        patch.setattr(quantize_block, "round_gptq", lambda *a: (counts.append(1), rounded(*a))[1])
        whole = run(model, tmp_path / "whole", text, **settings)
    stops = {"expert": len(counts) - 3} | ({"step": 0} if settings else {})
    for place, after in stops.items():
        module, name = {"expert": (quantize_block, "round_gptq"), "step": (end_to_end, "train_model")}[place]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted(getattr(module, name), after))
            run(model, tmp_path / "out", text, resume=(tmp_path / "out.partial").exists(), **settings)
    run(model, tmp_path / "out", text, resume=True, **settings)
    same_checkpoint(whole, tmp_path / "out")


def test_experts_on_demand(mixture, tmp_path, text, caplog):
    """Where memory is short, weights of experts are read for every use: the same bytes, none of them kept."""
    whole = run(mixture, tmp_path / "whole", text)
    recipe = make_recipe("fast", SMALL | {"dataset": str(text)})
    arguments = str(mixture), str(tmp_path / "out"), recipe, "cpu"
    needed = Calibration(*arguments).dry_run(Progress(disable=True))["memory_bytes"]
    calibration = Calibration(*arguments, plots=False, memory_budget=needed - 1)
    with caplog.at_level(logging.INFO):
        calibration.run(Progress(disable=True))
    assert "they are read for every use" in caplog.text
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with calibration.source.block(0) as block:
        assert not any("experts" in name for name, _ in block.module.named_parameters())
