"""Conversion of checkpoints of other packages: every weight stays the same number, and what cannot is refused."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import numpy
import pytest
import torch
from bq_calibration import cli, convert, inspect
from bq_calibration.errors import UserError
from bq_calibration.packed_modules import ButterflyLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..vllm.engine import ONE_PROCESS, run_engines
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
        assert torch.equal(found[name].to_dense(torch.float32).weight, layer.weight().float()), name
    folder = checkpoint.with_name(f"{checkpoint.name}-dense")
    dense = AutoModelForCausalLM.from_pretrained(
        foreign.write(model, folder, layers, foreign.dense, None), dtype=torch.float32
    )
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=0, atol=1e-4 * logits(dense).abs().max().item())
    return inspect(str(checkpoint))


AWQ = {"quant_method": "awq", "group_size": 64, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "desc_act": False, "group_size": 32}
CASES = {
    "GPTQ": (foreign.gptq(1), lambda bits: GPTQ | {"bits": bits}),
    "GPTQ v2": (foreign.gptq(0), lambda bits: GPTQ | {"bits": bits, "checkpoint_format": "gptq_v2"}),
    "AutoRound": (
        foreign.gptq(0),
        lambda bits: {"quant_method": "auto-round", "packing_format": "auto_round:exllamav2", "bits": bits},
    ),
    "EfficientQAT": (foreign.efficientqat, lambda bits: None),
    "AWQ": (foreign.awq, lambda bits: AWQ | {"bits": bits}),
    "compressed-tensors": (foreign.compressed(), lambda bits: foreign.compressed_config(bits, 32, False)),
    "compressed-tensors 0.20": (
        foreign.compressed(foreign.streams),
        lambda bits: foreign.compressed_config(bits, 32, False),
    ),
}


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ("GPTQ", 2),
        ("GPTQ", 3),
        ("GPTQ v2", 4),
        ("AutoRound", 2),
        ("compressed-tensors", 3),
        ("compressed-tensors 0.20", 3),
    ],
)
def test_zero_points(tmp_path, model, case, bits):
    layers = foreign.random_layers(model, bits, 32)
    pack, config = CASES[case]
    source = foreign.write(model, tmp_path / "source", layers, pack, config(bits))
    report = convert(str(source), str(tmp_path / "out"))
    description = assert_exact(model, layers, tmp_path / "out")
    assert description["quantization_config"]["zero_point"] == "float"
    assert report["totals"]["bits_per_weight"] == description["bits_per_weight"] == bits + 32 / 32
    assert case.split()[0] in report["conversion"]["method"]


@pytest.mark.parametrize(("architecture", "router"), [("qwen3_moe", "mlp.gate"), ("mixtral", "block_sparse_moe.gate")])
@pytest.mark.parametrize("case", ["GPTQ", "compressed-tensors"])
def test_experts(tmp_path, architecture, router, case):
    model = foreign.base_model(tmp_path / "model", architecture)
    layers = foreign.random_layers(model, 4, 32)
    pack, config = CASES[case]
    convert(str(foreign.write(model, tmp_path / "source", layers, pack, config(4))), str(tmp_path / "out"))
    description = assert_exact(model, layers, tmp_path / "out")
    assert description["quantization_config"]["modules_to_not_convert"] == ["lm_head", router]


@pytest.mark.parametrize("bits", [2, 3])
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
    pack, config = CASES["AWQ"]
    convert(str(foreign.write(model, tmp_path / "source", layers, pack, config(4))), str(tmp_path / "out"))
    assert_exact(model, layers, tmp_path / "out")


def test_compressed_tensors_as_their_own_loader_reads_them(tmp_path, model):
    pytest.importorskip("compressed_tensors")
    for symmetric in (True, False):
        layers = foreign.random_layers(model, 4, 32, symmetric)
        config = foreign.compressed_config(4, 32, symmetric)
        source = foreign.write(model, tmp_path / f"source-{symmetric}", layers, foreign.compressed(), config)
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


# ---- what is not plain


def plain_gptq(model: Path, folder: Path, layers: dict[str, foreign.Layer], **changes) -> Path:
    return foreign.write(model, folder, layers, foreign.gptq(0), GPTQ | {"checkpoint_format": "gptq_v2"} | changes)


def test_negative_and_empty_scales(tmp_path, model):
    layers = foreign.random_layers(model, 3, 32)
    for layer in layers.values():
        layer.scales[::2] *= -1
        layer.scales[0, 0] = 0
        layer.scales[1, 0] = 2.0**-24  # the smallest of float16
    convert(str(plain_gptq(model, tmp_path / "source", layers)), str(tmp_path / "out"))
    assert_exact(model, layers, tmp_path / "out")


def test_layers_left_out_and_bits_of_their_own(tmp_path, model):
    layers = foreign.random_layers(model, 2, 32)
    four = [name for name in layers if name.endswith(("o_proj", "gate_proj", "up_proj"))]
    layers |= {name: foreign.random_layers(model, 4, 32)[name] for name in four}
    del layers["model.layers.0.mlp.down_proj"]
    convert(str(plain_gptq(model, tmp_path / "source", layers)), str(tmp_path / "out"))
    config = assert_exact(model, layers, tmp_path / "out")["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert {name: config["module_bits"].get(name, config["bits"]) for name in layers} == {
        name: layer.bits for name, layer in layers.items()
    }


def test_per_channel(tmp_path, model):
    layers = foreign.random_layers(model, 4, foreign.WIDTH)
    convert(str(plain_gptq(model, tmp_path / "source", layers, group_size=-1)), str(tmp_path / "out"))
    assert_exact(model, layers, tmp_path / "out")


def test_a_bias_that_the_model_does_not_have(tmp_path, model):
    layers = foreign.random_layers(model, 4, 32)

    def pack(value: float):
        return lambda layer: foreign.gptq(1)(layer) | {"bias": torch.full((len(layer.codes),), value).half()}

    source = foreign.write(model, tmp_path / "zeros", layers, pack(0.0), GPTQ | {"bits": 4})
    convert(str(source), str(tmp_path / "out"))
    assert_exact(model, layers, tmp_path / "out")
    refuse(foreign.write(model, tmp_path / "ones", layers, pack(1.0), GPTQ | {"bits": 4}), "bias has no place")


def refuse(source: Path, message: str) -> None:
    """The source is refused, in one line, and nothing is written."""
    out = source.parent / "refused"
    with pytest.raises(UserError, match=message) as error:
        convert(str(source), str(out))
    assert "\n" not in str(error.value)
    assert not out.exists() and not out.with_name("refused.partial").exists()


def edited(source: Path, edit) -> Path:
    """The source with its tensors edited."""
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


DOWN = "model.layers.0.mlp.down_proj"
EDITS = {
    "desc_act": ({f"{DOWN}.g_idx": lambda t: t.roll(1)}, r"down_proj.g_idx: .*desc_act"),
    "float32 scales": (
        {f"{DOWN}.scales": lambda t: t.float() * 1.0001},
        r"scales in float32: \d+ of 2048 are no float16",
    ),
    "large scales": ({f"{DOWN}.scales": lambda t: t.bfloat16() * 2.0**24}, "scales in bfloat16: 2048 of 2048"),
    "NaN": ({f"{DOWN}.scales": lambda t: t * torch.nan}, "2048 of 2048 are no float16 numbers"),
    "missing": ({"model.norm.weight": None}, "model.norm.weight is missing"),
    "cut": ({f"{DOWN}.qweight": lambda t: t[:-1].clone()}, "15 words for 256 codes"),
    "a packed head": ({"lm_head.qweight": lambda t: torch.zeros(8, 8).int()}, "lm_head.qweight has no place"),
    "integers": ({"model.norm.weight": lambda t: t.int()}, "expected floats"),
}


@pytest.mark.parametrize("case", EDITS)
def test_refused_tensors(tmp_path, model, case):
    changes, message = EDITS[case]
    source = plain_gptq(model, tmp_path / "source", foreign.random_layers(model, 2, 32))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, change in changes.items():
            value = tensors.pop(name, None)
            if change is not None:
                tensors[name] = change(value)

    refuse(edited(source, edit), message)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda model: foreign.random_layers(model, 2, 16), "group_size: expected a multiple of 32.* found 16"),
        (
            lambda model: foreign.random_layers(model, 2, 32) | {DOWN: foreign.random_layers(model, 2, 64)[DOWN]},
            "groups of 32 columns, .*down_proj of 64",
        ),
        (
            lambda model: {n: la for n, la in foreign.random_layers(model, 2, 32).items() if "k_proj" not in n},
            "share an input differ .*'k_proj': 'unquantized'",
        ),
    ],
)
def test_refused_layers(tmp_path, model, layers, message):
    refuse(plain_gptq(model, tmp_path / "source", layers(model)), message)


def test_compressed_columns_out_of_order(tmp_path, model):
    layers = foreign.random_layers(model, 4, 32)
    source = foreign.write(model, tmp_path / "source", layers, foreign.compressed(), COMPRESSED)
    order = torch.arange(foreign.WIDTH, dtype=torch.int32) // 32
    refuse(edited(source, lambda tensors: tensors.update({f"{DOWN}.weight_g_idx": order.flip(0)})), "actorder group")


def test_zero_points_that_packages_read_in_different_ways(tmp_path, model):
    layers = foreign.random_layers(model, 4, 32)
    source = foreign.write(model, tmp_path / "source", layers, foreign.gptq(1), GPTQ | {"bits": 4})
    refuse(edited(source, lambda tensors: tensors[f"{DOWN}.qzeros"].fill_(-1)), "gptq_v2")


COMPRESSED = foreign.compressed_config(4, 32, False)
GROUP = COMPRESSED["config_groups"]["group_0"]
CONFIGS = [
    (GPTQ | {"bits": 8}, "8 bits"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({"quant_method": "auto-round", "bits": 2, "packing_format": "auto_round:fp8"}, "packing_format 'auto_round:fp8'"),
    ({"quant_method": "auto-round", "bits": 4, "act_bits": 8}, "activations"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
    ({"quant_method": "awq", "bits": 2}, "AWQ with 2 bits"),
    ({"quant_method": "bitsandbytes"}, "not evenly spaced"),
    ({"quant_method": "quip"}, "quant_method 'quip' is not read"),
    ({"quant_method": "butterfly"}, "already"),
    (COMPRESSED | {"format": "int-quantized"}, "format 'int-quantized'"),
    (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    (COMPRESSED | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transform_config"),
    (COMPRESSED | {"config_groups": {"group_0": GROUP | {"input_activations": {"num_bits": 8}}}}, "weight-only"),
    (COMPRESSED | {"config_groups": {"group_0": GROUP | {"weights": {"type": "float"}}}}, "type 'float'"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_refused_settings(tmp_path, model, config, message):
    refuse(foreign.write(model, tmp_path / "source", {}, foreign.compressed(), config), message)


REASONS = {
    "Q4_1": "a minimum per group",
    "Q5_0": "more than 4 bits",
    "Q8_0": "more than 4 bits",
    "Q2_K": "groups of 16",
    "Q6_K": "groups of 16",
    "Q4_K": "scales that are products",
    "IQ2_XXS": "levels of a code book",
    "IQ4_XS": "levels of a code book",
    "MXFP4": "levels that are not evenly spaced",
}


@pytest.mark.parametrize("kind", REASONS)
def test_refused_gguf_types(tmp_path, model, kind, monkeypatch):
    gguf = pytest.importorskip("gguf")
    type_id = gguf.GGMLQuantizationType[kind]
    size, nbytes = gguf.GGML_QUANT_SIZES[type_id]
    blocks = lambda codes, scales: numpy.zeros((len(codes), nbytes), numpy.uint8)  # noqa: E731
    monkeypatch.setitem(foreign.GGUF_TYPES, kind, (int(type_id), size, 0, 0, blocks))
    source = foreign.write_gguf(model, tmp_path / "tiny.gguf", foreign.gguf_layers(model, "TQ2_0"), kind)
    refuse(source, f"blk.0.attn_q.weight: type {kind} has {REASONS[kind]}")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda writer: writer.add_rope_scaling_type(foreign.yarn()), "rope scaling 'yarn'"),
        (lambda writer: writer.add_uint32("prism.hadamard.block_size", 1024), "signed Hadamard"),
        (lambda writer: writer.add_uint16("split.count", 2), "gguf-split --merge"),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", torch.ones(32).numpy()),
            "rope_freqs.weight has no place",
        ),
    ],
)
def test_refused_gguf_metadata(tmp_path, model, extra, message):
    pytest.importorskip("gguf")
    refuse(
        foreign.write_gguf(model, tmp_path / "tiny.gguf", foreign.gguf_layers(model, "TQ2_0"), "TQ2_0", extra), message
    )


def test_gguf_groups_of_another_size_under_the_same_number(tmp_path, model, monkeypatch):
    """PrismML once stored groups of 128 as type 42."""
    pytest.importorskip("gguf")
    monkeypatch.setitem(foreign.GGUF_TYPES, "Q2_0", (42, 128, 1, 3, foreign.q2_0))
    source = foreign.write_gguf(model, tmp_path / "tiny.gguf", foreign.gguf_layers(model, "Q2_0"), "Q2_0")
    refuse(source, "take the PQ2_0 file")


def test_gguf_beside_its_config(tmp_path, model):
    """The original's config.json and tokenizer count, where they are there; rows of Qwen3 keep their order."""
    pytest.importorskip("gguf")
    qwen = foreign.base_model(tmp_path / "qwen3", "qwen3")
    layers = foreign.gguf_layers(qwen, "PQ2_0")
    extra = lambda writer: writer.add_rope_scaling_type(foreign.yarn())  # noqa: E731
    foreign.write_gguf(qwen, qwen / "tiny.gguf", layers, "PQ2_0", extra)
    convert(str(qwen / "tiny.gguf"), str(tmp_path / "out"))
    assert_exact(qwen, layers, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (qwen / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "tiny.gguf").exists()


def test_a_source_without_its_tokenizer(tmp_path, model):
    source = plain_gptq(model, tmp_path / "source", foreign.random_layers(model, 2, 32))
    (source / "tokenizer.json").unlink()
    refuse(source, "no tokenizer")


# ---- the run


def test_shards_and_resuming_end_at_the_same_bytes(tmp_path, model, monkeypatch):
    import bq_calibration.conversion.pipeline as pipeline
    import bq_calibration.export as export

    monkeypatch.setattr(export, "SHARD_BYTES", 200_000)
    layers = foreign.random_layers(model, 2, 32)
    source = plain_gptq(model, tmp_path / "source", layers)
    convert(str(source), str(tmp_path / "whole"))
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    assert_exact(model, layers, tmp_path / "whole")

    read, calls = pipeline.pack_rows, []

    def interrupted(codes, bits):
        calls.append(bits)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(codes, bits)

    monkeypatch.setattr(pipeline, "pack_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--resume"):
        convert(str(source), str(tmp_path / "out"))
    calls[:] = [0] * 9
    convert(str(source), str(tmp_path / "out"), resume=True)
    assert not (tmp_path / "out.partial").exists()
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert names == {file.name for file in (tmp_path / "out").iterdir()}
    for name in names - {"bq_report.json", "SHA256SUMS"}:  # which say how long it took
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_the_command(tmp_path, model, monkeypatch, capsys):
    def command(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["bq", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            (cli.inspect_main if arguments[0] == tmp_path / "out" else cli.convert_main)()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    source = plain_gptq(model, tmp_path / "source", foreign.random_layers(model, 2, 64))
    code, shown = command(source, "-o", tmp_path / "out", "--json")
    assert code == 0 and json.loads(shown) == json.loads((tmp_path / "out" / "bq_report.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "GPTQ, packed as gptq_v2" in card and "2.500" in card
    code, shown = command(tmp_path / "out")
    assert code == 0 and "converted from" in shown and "GPTQ, packed as gptq_v2" in " ".join(shown.split())
    code, shown = command(source, "-o", tmp_path / "out")
    assert code == 1 and "exists and is not empty" in shown
    code, shown = command(source, "-o", tmp_path / "second")
    assert code == 0 and "2.500 bits per weight" in " ".join(shown.split())


# ---- in vLLM


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm(tmp_path, model):
    """Greedy tokens of conversions are those of transformers, for all sources in one process."""
    ternary, experts = foreign.gguf_layers(model, "PTQ1_0"), foreign.base_model(tmp_path / "mixture", "qwen3_moe")

    def source(case: str, bits: int, group: int, base: Path = model) -> Path:
        pack, config = CASES[case]
        layers, folder = foreign.random_layers(base, bits, group), tmp_path / f"{case}-{base.name}-source"
        return foreign.write(base, folder, layers, pack, config(bits))

    sources = {
        "GPTQ": plain_gptq(model, tmp_path / "source", foreign.random_layers(model, 2, 64)),
        "AutoRound": source("AutoRound", 3, 32),
        "EfficientQAT": source("EfficientQAT", 2, 64),
        "AWQ": source("AWQ", 4, 64),
        "compressed-tensors": source("compressed-tensors", 4, 32),
        "ternary": foreign.write_gguf(model, tmp_path / "tiny.gguf", ternary, "PTQ1_0"),
        "experts": source("GPTQ", 4, 32, experts),
    }
    prompts, jobs, expected = IDS[:, :8].tolist(), [], []
    for name, folder in sources.items():
        convert(str(folder), str(tmp_path / name), **({"method": "efficientqat"} if name == "EfficientQAT" else {}))
        jobs.append({"model": str(tmp_path / name), "prompts": prompts, "max_tokens": 6})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
        expected.append([loaded.generate(torch.tensor([p]), **settings)[0, 8:].tolist() for p in prompts])
    answers, _ = run_engines(tmp_path, jobs, **ONE_PROCESS)
    assert [[answer["tokens"] for answer in job["base"]] for job in answers] == expected
