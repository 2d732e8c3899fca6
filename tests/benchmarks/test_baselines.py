"""The baselines of the accuracy table on a tiny model: on their levels, and better than rounding to nearest."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bq_calibration.quantize import round_nearest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.baselines import awq, omniquant, spinquant
from benchmarks.baselines.levels import Levels
from benchmarks.baselines.stream import SourceModel
from benchmarks.baselines.third_party import packages

GROUP, BITS = 32, 3  # at 2 bits a random model is far off with any method


@torch.no_grad()
def error(network, model: Path, tokens: Path) -> float:
    """Relative squared error of what the first block adds."""
    ids = load_file(tokens)["tokens"]
    inputs, full = AutoModelForCausalLM.from_pretrained(model)(ids, output_hidden_states=True).hidden_states[:2]
    found = network(ids, output_hidden_states=True).hidden_states[1]
    return float((found - full).square().sum() / (full - inputs).square().sum())


def nearest(model: Path, levels: str):
    """The model rounded to nearest."""
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in packages.quantized_layers(network).values():
            if levels == "midrise":
                rounded = round_nearest(layer.weight, BITS, GROUP, levels)
            else:
                grid = Levels(BITS, GROUP, levels)
                grouped = grid.grouped(layer.weight)
                rounded = grid.quantized(grouped, *grid.clipped_range(grouped, 1, 1))
            layer.weight.copy_(rounded.weight())
    return network


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["midrise", "minmax"])
@pytest.mark.parametrize("method", [awq.main, partial(omniquant.main, steps=40)], ids=["awq", "omniquant"])
def test_clipping_baselines(model, tokens, tmp_path, method, levels):
    method(model, tmp_path / "out", tokens, BITS, GROUP, levels)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, layer in packages.quantized_layers(network).items():
        assert 4 < packages.most_levels(layer.weight, GROUP) <= 8, name
    found, plain = error(network, model, tokens), error(nearest(model, levels), model, tokens)
    assert found < 0.9 * plain
    facts = json.loads((tmp_path / "out" / "peer.json").read_text())
    assert facts["totals"]["bits_per_weight"] == BITS + (16 if levels == "midrise" else 16 + BITS) / GROUP
    assert facts["calibration_tokens"] == 16 * 64 and facts["run"]["wall_seconds"] > 0


@pytest.mark.parametrize("steps", [0, 8])
def test_spinquant(model, tokens, tmp_path, steps):
    spinquant.main(model, tmp_path / "out", tokens, BITS, GROUP, steps)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rotations = spinquant.Rotations(SourceModel(str(model), torch.device("cpu")), Levels(BITS, GROUP))
    if steps:
        learned = load_file(tmp_path / "out" / "rotations" / "learned.safetensors")
        losses = learned.pop("losses")
        assert losses[-1] < losses[0]
        assert not torch.allclose(learned["residual"], rotations.learned["residual"], atol=1e-3)
        rotations.learned = learned
    for matrix in (*rotations.learned.values(), rotations.down):
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5)
    for name, layer in packages.quantized_layers(network).items():
        _, _, index, short = name.split(".", 3)
        rotated = rotations.basis(int(index), short).rotate(layer.weight.detach())
        step = 1e-3 * rotated.abs().max()
        assert (rotated.unflatten(1, (-1, GROUP)).sort(-1).values.diff(dim=-1) > step).sum(-1).max() < 8, name
    assert error(network, model, tokens) < 0.9 * error(nearest(model, "midrise"), model, tokens)


def test_resumes_to_the_same_bytes(model, tokens, tmp_path):
    awq.main(model, tmp_path / "whole", tokens, BITS, GROUP)
    partial = tmp_path / "parts.partial"
    partial.mkdir()
    first = "model-00001-of-00003.safetensors"
    (partial / first).write_bytes((tmp_path / "whole" / first).read_bytes())
    awq.main(model, tmp_path / "parts", tokens, BITS, GROUP)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    assert json.loads((tmp_path / "parts" / "peer.json").read_text())["run"]["resumed"]


@pytest.mark.parametrize("arguments", ["auto-round --iters 2", "llm-compressor --method gptq --asym"])
def test_packages(model, tokens, tmp_path, arguments):
    pytest.importorskip({"auto-round": "auto_round", "llm-compressor": "llmcompressor"}[arguments.split()[0]])
    script, common = packages.__file__, ["-o", tmp_path / "out", "--tokens", tokens]
    call = [sys.executable, script, *arguments.split(), model, *common, "--group-size", GROUP]
    subprocess.run([str(part) for part in call], check=True, timeout=300)
    assert (tmp_path / "out" / "peer.json").exists()
