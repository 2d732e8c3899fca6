"""Peers of the accuracy table on a tiny model: on their levels, and better than rounding to nearest; the table; and the
ablations.
"""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bq_calibration.quantize import round_nearest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GROUP, BITS = 32, 3  # at 2 bits a random model is far off with any method


def load(script: str):
    """A script as a module; BENCHMARKS cannot be on the path, where its kernels.py would stand for another package."""
    path = BENCHMARKS / script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# in this order: the later ones import the first
SCRIPTS = ("provenance.py", "accuracy.py", "peers/packages.py", "peers/ours.py", "ablations.py")
_, accuracy, packages, ours, ablations = map(load, SCRIPTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama whose inputs have outlier channels, with heads that share values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,  # 32·3: not a power of two
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.rand(96) + 0.5)
                parameter[::7] *= 6
            else:
                parameter.normal_()
                parameter.copy_(
                    0.5 * parameter if "embed" in name else 0.1 * parameter * parameter.abs()
                )  # tails to clip
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    vocabulary = {f"t{n}": n for n in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Tokens of a skewed distribution."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    torch.manual_seed(0)
    rows = torch.randint(0, 64, (16, 64)).minimum(torch.randint(0, 64, (16, 64)))
    save_file({"tokens": rows, "train_tokens": rows.clone()}, file)
    return file


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
                grouped = layer.weight.unflatten(1, (-1, GROUP))
                rounded = ours._nearest(grouped, *ours.clipped_range(grouped, BITS, 1, 1, levels), BITS)
            layer.weight.copy_(rounded.weight())
    return network


@pytest.mark.parametrize("levels", ["midrise", "minmax"])
@pytest.mark.parametrize("method", [ours.awq, partial(ours.omniquant, steps=40)], ids=["awq", "omniquant"])
def test_clipping_peers(model, tokens, tmp_path, method, levels):
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
    ours.spinquant(model, tmp_path / "out", tokens, BITS, GROUP, steps)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rotations = ours.Rotations(ours.SourceModel(str(model), torch.device("cpu")), BITS, GROUP)
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
        turned = rotations.basis(int(index), short).turn(layer.weight.detach())
        step = 1e-3 * turned.abs().max()
        assert (turned.unflatten(1, (-1, GROUP)).sort(-1).values.diff(dim=-1) > step).sum(-1).max() < 8, name
    assert error(network, model, tokens) < 0.9 * error(nearest(model, "midrise"), model, tokens)


def test_resumes_to_the_same_bytes(model, tokens, tmp_path):
    ours.awq(model, tmp_path / "whole", tokens, BITS, GROUP)
    partial = tmp_path / "parts.partial"
    partial.mkdir()
    first = "model-00001-of-00003.safetensors"
    (partial / first).write_bytes((tmp_path / "whole" / first).read_bytes())
    ours.awq(model, tmp_path / "parts", tokens, BITS, GROUP)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    assert json.loads((tmp_path / "parts" / "peer.json").read_text())["run"]["resumed"]


@pytest.mark.parametrize("arguments", ["auto-round --iters 2", "llm-compressor --method gptq --asym"])
def test_packages(model, tokens, tmp_path, arguments):
    pytest.importorskip({"auto-round": "auto_round", "llm-compressor": "llmcompressor"}[arguments.split()[0]])
    script, common = BENCHMARKS / "peers" / "packages.py", ["-o", tmp_path / "out", "--tokens", tokens]
    call = [sys.executable, script, *arguments.split(), model, *common, "--group-size", GROUP]
    subprocess.run([str(part) for part in call], check=True, timeout=300)
    assert (tmp_path / "out" / "peer.json").exists()


def test_table_from_what_is_there(tmp_path, capsys):
    out = tmp_path / "out"
    perplexities = {("16-bit", 0): 20.0, ("RTN (ours)", 1): 4000.0}
    perplexities |= {("butterfly `fast`", 0): 60.0, ("butterfly `fast`", 1): 64.0}
    for (label, seed), value in perplexities.items():
        slug = accuracy.Row(label, "", "").slug
        checkpoint = out / ("16-bit" if label == "16-bit" else f"3/{slug}.seed{seed}")
        checkpoint.mkdir(parents=True)
        run = {"wall_seconds": 12.0, "resumed": False, "peak_memory_bytes": 2e9}
        report = {"totals": {"bits_per_weight": 3.25}, "calibration_tokens": 64, "run": run}
        (checkpoint / "bq_report.json").write_text(json.dumps(report))
        for dataset, factor in (("wikitext2", 1), ("c4-eval.jsonl", 2)):
            score = {"perplexity": {"dataset": dataset, "context": 128, "windows": 3, "value": value * factor}}
            checkpoint.with_name(f"{checkpoint.name}.{dataset}.128x3.json").write_text(json.dumps(score))
        for task, limit in {"one": "all", "two": 7}.items():
            score = {"tasks": {task: {"metric": "acc", "value": 0.5, "stderr": 0.03}}}
            checkpoint.with_name(f"{checkpoint.name}.{task}.{limit}.json").write_text(json.dumps(score))
    for seed in (0, 1):
        (out / f"tokens.seed{seed}.safetensors").touch()
    accuracy.main(
        Path("a-model"),
        bits=[3],
        dataset="c4",
        perplexity=["wikitext2", "data/c4/eval.jsonl"],
        context=128,
        windows=3,
        tasks="one,two:7",
        seed=[0, 1],
        only=["RTN, min-max", "RTN (ours)", "butterfly `fast`", "AutoRound, sym"],
        peers_python=tmp_path / "no-python",
        out=out,
        as_json=tmp_path / "table.json",
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["16-bit", "RTN (ours)", "butterfly `fast`"]
    fast = result["rows"][2]["perplexity"]["c4/eval.jsonl"]
    assert (fast["value"], fast["spread"]) == (124, pytest.approx(8 / 2**0.5))
    assert "62.00 ±" in printed and "2.83" in printed and "4,000.00 " in printed and "4,000.00 ±" not in printed
    assert [one["seed"] for one in result["rows"][2]["seeds"]] == [0, 1]
    left_out = [f"3 bits, {row}, seed {seed}" for row in ("RTN, min-max", "AutoRound, symmetric") for seed in (0, 1)]
    assert [name for name in result["left_out"] if "RTN (ours)" not in name] == left_out
    assert all("no-python" in result["left_out"][name] for name in left_out)
    assert "left out: 3 bits, AutoRound, symmetric, seed 1" in printed and "3.250" in printed
    assert accuracy.mean_accuracy(result["rows"][1]["tasks"]) == pytest.approx((0.5, 0.03 / 2**0.5))
    assert (tmp_path / "table.png").stat().st_size > 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| butterfly `fast`")] == lines[-1:], "a row is one line"
    with pytest.raises(accuracy.typer.BadParameter):  # other tokens than those of the rows that are there
        accuracy.main(Path("a-model"), dataset="wikitext2", out=out)
    with pytest.raises(accuracy.typer.BadParameter, match="two:few"):
        accuracy.main(Path("a-model"), dataset="c4", tasks="one,two:few", out=out)


def test_ablations(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{n}" for n in torch.randint(1, 64, (1500,)).tolist()))
    groups = ["start", "any orthogonal matrix"]
    settings = dict(
        bits=BITS, group_size=GROUP, rotation_block=32, dataset=str(text), samples=16, held_out=8, seqlen=32
    )

    def run(json_file: str) -> dict:
        file = tmp_path / json_file
        ablations.main(model, **settings, blocks="1", steps=12, only=groups, out=tmp_path / "out", as_json=file)
        assert file.with_suffix(".png").exists()
        return json.loads(file.read_text())["groups"]

    found = run("first.json")
    assert [[line["value"] for line in found[name]] for name in groups] == [
        ["identity", "hadamard", "random"],
        ["butterfly, Adam", "matrix, Cayley SGD"],
    ]
    for line in found[groups[0]] + found[groups[1]]:
        assert len(line["errors"]) == 4 and 0 < line["summary"]["error"] < 1
        assert line["curve"][-1] < line["curve"][0]  # all of them learn
    assert run("again.json") == found  # from what is kept, times and all
    with pytest.raises(ablations.typer.BadParameter):
        ablations.main(model, **settings | {"samples": 8}, out=tmp_path / "out")


def test_any_matrix_is_a_rotation():
    matrices = torch.linalg.qr(torch.randn(3, 8, 8)).Q
    turn, x = ablations.MatrixTurn(matrices), torch.randn(5, 24)
    torch.testing.assert_close(turn.forward(x), x @ torch.block_diag(*matrices).T)
    torch.testing.assert_close(turn.back(turn.forward(x)), x)
