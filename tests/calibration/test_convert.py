"""Conversion of checkpoints of other packages: every weight stays the same number, and what cannot is refused."""

from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import pytest
import torch
from bq_calibration import convert, inspect
from bq_calibration.errors import UserError
from bq_calibration.hf import ButterflyLinear
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import foreign

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return foreign.base_model(tmp_path_factory.mktemp("foreign") / "llama")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def packed_layers(model) -> dict[str, ButterflyLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ButterflyLinear)}


def assert_exact(model: Path, layers: dict[str, foreign.Layer], checkpoint: Path) -> dict:
    """The checkpoint's weights are those of `layers`, and the model computes with them; returns its description."""
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    found = packed_layers(loaded)
    assert set(found) == set(layers)
    for name, layer in layers.items():
        assert torch.equal(found[name].to_linear(torch.float32).weight, layer.weight().float()), name
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in layers.items():
            dense.get_submodule(name).weight.copy_(layer.weight())
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=0, atol=1e-4 * logits(dense).abs().max().item())
    return inspect(str(checkpoint))


GPTQ = {"quant_method": "gptq", "desc_act": False, "group_size": 32}
CASES = {
    "GPTQ": (lambda layers: foreign.gptq(1), lambda bits: GPTQ | {"bits": bits}),
    "GPTQ v2": (lambda layers: foreign.gptq(0), lambda bits: GPTQ | {"bits": bits, "checkpoint_format": "gptq_v2"}),
    "AutoRound": (
        lambda layers: foreign.gptq(0),
        lambda bits: {"quant_method": "auto-round", "packing_format": "auto_round:exllamav2", "bits": bits},
    ),
    "compressed-tensors": (lambda layers: foreign.compressed, lambda bits: foreign.compressed_config(bits, 32, False)),
}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_zero_points(tmp_path, model, case, bits):
    layers = foreign.random_layers(model, bits, 32)
    pack, config = CASES[case]
    source = foreign.write(model, tmp_path / "source", layers, pack(layers), config(bits))
    report = convert(str(source), str(tmp_path / "out"))
    description = assert_exact(model, layers, tmp_path / "out")
    assert description["quantization_config"]["zero_point"] == "float"
    assert report["totals"]["bits_per_weight"] == description["bits_per_weight"] == bits + 32 / 32
    assert case.split()[0] in report["conversion"]["method"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_efficientqat(tmp_path, model, bits):
    layers = foreign.random_layers(model, bits, 64)
    layers["model.layers.0.mlp.up_proj"].zeros[0] = 0  # its zero points are stored as they are
    source = foreign.write(model, tmp_path / "source", layers, foreign.efficientqat, None)
    with pytest.raises(UserError, match="--method efficientqat"):
        convert(str(source), str(tmp_path / "out"))
    convert(str(source), str(tmp_path / "out"), method="efficientqat")
    assert_exact(model, layers, tmp_path / "out")


def test_awq(tmp_path, model):
    layers = foreign.random_layers(model, 4, 64)
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    convert(str(foreign.write(model, tmp_path / "source", layers, foreign.awq, config)), str(tmp_path / "out"))
    assert_exact(model, layers, tmp_path / "out")


def test_compressed_tensors_as_their_own_loader_reads_them(tmp_path, model):
    pytest.importorskip("compressed_tensors")
    for symmetric in (True, False):
        layers = foreign.random_layers(model, 4, 32, symmetric)
        config = foreign.compressed_config(4, 32, symmetric)
        source = foreign.write(model, tmp_path / f"source-{symmetric}", layers, foreign.compressed, config)
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        expected = logits(theirs)
        convert(str(source), str(tmp_path / f"out-{symmetric}"))
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{symmetric}", dtype=torch.float32)
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind", foreign.GGUF_TYPES)
def test_gguf(tmp_path, model, kind):
    pytest.importorskip("gguf")
    layers = foreign.gguf_layers(model, kind)
    source = foreign.write_gguf(model, tmp_path / "tiny.gguf", layers, kind)
    convert(str(source), str(tmp_path / "out"))
    description = assert_exact(model, layers, tmp_path / "out")
    assert description["quantization_config"]["zero_point"] == ("midrise" if kind == "Q1_0" else "float")
    assert description["report"]["conversion"]["method"] == f"GGUF {kind}"
    words = "the tokenizer came along"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "out")]
    assert tokenizers[0](words)["input_ids"] == tokenizers[1](words)["input_ids"]


@pytest.mark.parametrize("kind", ["Q4_0", "TQ1_0", "TQ2_0"])
def test_gguf_as_transformers_reads_it(tmp_path, model, kind):
    pytest.importorskip("gguf")
    source = foreign.write_gguf(model, tmp_path / "tiny.gguf", foreign.gguf_layers(model, kind), kind)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32))
    convert(str(source), str(tmp_path / "out"))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
