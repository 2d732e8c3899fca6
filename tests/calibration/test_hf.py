"""Loading in transformers, and evaluation."""

import math

import bq_calibration.hf
import pytest
import torch
from bq_calibration import packed_modules
from bq_calibration.errors import UserError
from bq_calibration.evaluation import Evaluator
from rich.progress import Progress
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .test_calibrate import run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, text):
    return run(model, tmp_path_factory.mktemp("hf") / "checkpoint", text)


def test_float16_tensors_stay_exact_in_a_bfloat16_model(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    stored = load_file(checkpoint / "model.safetensors")
    layer = loaded.model.layers[1].mlp.down_proj
    for suffix in ("qweight", "scales", "angles"):
        expected = stored[f"model.layers.1.mlp.down_proj.{suffix}"]
        assert torch.equal(getattr(layer, suffix).to(expected.dtype), expected)
    assert loaded.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    "cast", [lambda model: model.to(torch.bfloat16), lambda model: model.bfloat16().to(torch.float32)]
)
def test_casting_a_model_does_not_round_the_format(checkpoint, monkeypatch, cast, kernels):
    monkeypatch.setattr(packed_modules, "runs_kernels", lambda device: kernels)
    ids = torch.randint(3, 30, (2, 9))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model(input_ids=ids)  # layers prepare themselves at their first call
    cast(model)
    dtype = model.model.norm.weight.dtype
    stored = load_file(checkpoint / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, packed_modules.ButterflyLinear):
            for suffix in ("qweight", "scales", "angles"):
                expected = stored[f"{name}.{suffix}"]
                assert torch.equal(getattr(module, suffix).to(expected.dtype), expected)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    loaded.to(torch.bfloat16).to(dtype)  # rounds the frequencies of the positions, as of any model
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_cast_layer_keeps_its_bias_in_the_models_dtype(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    layer = model.model.layers[0].self_attn.o_proj
    layer.bias = torch.nn.Parameter(torch.full((layer.out_features,), 1 / 3))
    x = torch.randn(1, layer.in_features)
    with torch.no_grad():
        before = layer(x)
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and layer.qweight.dtype == torch.int32
    layer.to("cpu", torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before, rtol=1e-2, atol=1e-2)


def test_generation(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7]])
    packed = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    dense = loaded.dequantize().generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(packed, dense)


def test_layers_as_a_gpu_runs_them(checkpoint, monkeypatch):
    """Repacked, through the operator; on the CPU that is the reference of the kernels."""
    ids = torch.randint(3, 30, (2, 9))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        monkeypatch.setattr(packed_modules, "runs_kernels", lambda device: True)
        tiled = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(tiled, plain)


def test_importing_twice_is_harmless():
    import importlib

    importlib.reload(bq_calibration.hf)


@pytest.mark.parametrize("which", ["16-bit", "packed"])
def test_perplexity_follows_the_protocol(which, model, checkpoint, text):
    path = model if which == "16-bit" else checkpoint
    context = 64
    found = Evaluator(str(path), "float32", "cpu").perplexity(str(text), context, None, Progress(disable=True))
    tokens = AutoTokenizer.from_pretrained(path)(text.read_text(), verbose=False)["input_ids"]  # adds no BOS
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    losses = []
    for start in range(0, len(tokens) - context + 1, context):
        ids = torch.tensor([tokens[start : start + context]])
        with torch.no_grad():
            losses.append(reference(input_ids=ids, labels=ids).loss.item())
    assert found["windows"] == len(losses)
    assert found["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.slow
def test_zero_shot_task_through_lm_eval(tmp_path, checkpoint):
    pytest.importorskip("lm_eval")
    (tmp_path / "data.jsonl").write_text('{"q": "w1 w2", "c": ["w3", "w4"], "a": 0}\n' * 6)
    (tmp_path / "tiny_task.yaml").write_text(
        f"""task: tiny_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "data.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: a
metric_list:
  - metric: acc
"""
    )
    results = Evaluator(str(checkpoint), "float32", "cpu").tasks(["tiny_task"], tmp_path, None)
    assert results["tiny_task"]["metric"] == "acc" and results["tiny_task"]["value"] in (0.0, 1.0)


@pytest.mark.slow
def test_unknown_task(checkpoint):
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="lm-eval knows no such task"):
        Evaluator(str(checkpoint), "float32", "cpu").tasks(["no_such_task"], None, None)


def test_self_sampled_calibration_needs_no_data(tmp_path, model):
    from bq_calibration.checkpoint import verify

    verify(run(model, tmp_path / "out", "self"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tables_of_documents(suffix, tmp_path, model, text):
    import datasets
    from bq_calibration.data import calibration_tokens

    rows = datasets.Dataset.from_dict({"text": [text.read_text()[i : i + 400] for i in range(0, 4000, 400)]})
    path = tmp_path / f"rows.{suffix}"
    rows.to_json(path) if suffix == "jsonl" else rows.to_parquet(path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = calibration_tokens(tokenizer, str(path), 8, 64, seed=0)
    assert tokens.shape == (8, 64)
    assert torch.equal(tokens, calibration_tokens(tokenizer, str(path), 8, 64, seed=0))
    assert not torch.equal(tokens, calibration_tokens(tokenizer, str(path), 8, 64, seed=1))
