"""Simulated int8 activations: the layers, and the command on tiny checkpoints."""

import json
import random

import pytest
import tiny
import torch
from bq_calibration.packed_modules import ButterflyLinear
from bq_kernels.activations import from_int8, rotate_to_int8
from torch import nn

from benchmarks.activation_rounding import cli
from benchmarks.activation_rounding.layers import PLACES, RoundingLinear, block_matrices, rounded

NAME = "mlp.down_proj"


@pytest.mark.parametrize("kind", ["butterfly", "none"])
def test_layer(kind):
    quant = tiny.quant_config(kind=kind)
    rows, columns = tiny.LINEARS[NAME]
    packed = ButterflyLinear(quant, NAME, nn.Linear(columns, rows, bias=False, device="meta"))
    for name, tensor in tiny.random_tensors(quant).items():
        if name.startswith(f"model.layers.0.{NAME}."):
            setattr(packed, name.rsplit(".", 1)[-1], nn.Parameter(tensor, requires_grad=False))
    layer, x = RoundingLinear(packed), torch.randn(2, 5, columns)
    exact = packed(x)
    torch.testing.assert_close(layer(x), exact)
    layer.place, layer.columns = PLACES[2], quant.group_size
    packed(x)  # prepares the tables
    tables = packed._weights.cos_sin, packed._weights.mix
    codes, scales = rotate_to_int8(x.flatten(0, 1), *tables, quant.group_size)
    want = (from_int8(codes, scales) @ layer.weight.T).view_as(exact)
    # a code may fall to the other side of a rounding
    torch.testing.assert_close(layer(x), want, rtol=0, atol=float(scales.max() * layer.weight.abs().max() * 2))
    assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 3e-2
    layer.place, layer.columns = PLACES[1], None
    assert torch.equal(layer(x), packed_like(layer, rounded(x, None)))


def packed_like(layer: RoundingLinear, x: torch.Tensor) -> torch.Tensor:
    layer.place = ""
    return layer(x)


def test_rounded():
    x = torch.randn(3, 64)
    x[:, 40] = 50  # an outlier costs its own columns only
    fine, coarse = rounded(x, 32), rounded(x, None)
    assert (fine - x)[:, :32].abs().max() < 4 / 254 < (coarse - x)[:, :32].abs().max() <= 50 / 254 * 1.001
    assert torch.equal(rounded(torch.zeros(2, 32), None), torch.zeros(2, 32))
    blocks = block_matrices(torch.rand(2, 32), 16)
    torch.testing.assert_close(blocks @ blocks.mT, torch.eye(16).expand(2, 16, 16))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"t{random.Random(0).randrange(60)}" for _ in range(100)))
    return file


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(64)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folders = []
    for kind in ("none", "hadamard"):
        folder = tmp_path_factory.mktemp("checkpoints") / kind
        folder.mkdir()
        tiny.write_checkpoint(folder, tiny.quant_config(kind=kind))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
        folders.append(folder)
    return folders


def test_command(checkpoints, text, tmp_path, capsys):
    file = tmp_path / "found.json"
    settings = {"perplexity": str(text), "context": 32, "windows": 2, "as_json": file}
    cli.main(checkpoints, **settings)
    first = json.loads(file.read_text())
    assert [len(found["rows"]) for found in first["checkpoints"]] == [3, 5]
    for found in first["checkpoints"]:
        assert found["rows"][0] == {
            "place": "",
            "columns": None,
            "perplexity": found["rows"][0]["perplexity"],
            "ratio": 1,
        }
        values = [row["perplexity"] for row in found["rows"]]
        assert [row["ratio"] for row in found["rows"]] == [value / values[0] for value in values]
        assert values[0] not in values[1:] and all(0.5 < value / values[0] < 2 for value in values), values
    assert first["settings"]["perplexity"] == text.name and "CPU" in first["device"]
    assert "behind the rotation" in file.with_suffix(".md").read_text()
    # interrupted: it goes on behind what is there
    again = json.loads(file.read_text())
    kept = again["checkpoints"][1]["rows"][:2]
    kept[1]["perplexity"] = 7.0
    again["checkpoints"][1]["rows"] = kept
    file.write_text(json.dumps(again))
    cli.main(checkpoints, **settings)
    second = json.loads(file.read_text())
    assert second["checkpoints"][1]["rows"][1]["perplexity"] == 7.0
    assert second["checkpoints"][1]["rows"][2:] == first["checkpoints"][1]["rows"][2:]
