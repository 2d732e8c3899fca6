"""What vLLM sees of the plugin before it builds a layer."""

import json
import logging
import random
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import tiny
import torch
from bq_kernels.checksums import write_sums
from bq_kernels.format import FormatError


@pytest.fixture(scope="module")
def vllm():
    return pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.fixture
def config(vllm):
    from bq_vllm.config import ButterflyConfig

    def make(mapping=None, **options):
        config = ButterflyConfig.from_config(tiny.quant_config(**options).to_dict())
        config.packed_modules_mapping = mapping or {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        return config

    return make


@pytest.fixture
def linear(vllm):
    """A linear layer that has not been constructed: all that choosing its method looks at is its type."""
    from vllm.model_executor.layers.linear import LinearBase

    return LinearBase.__new__(LinearBase)


def test_import_is_lazy():
    code = "import sys, bq_vllm; sys.exit(any(m in sys.modules for m in ('vllm', 'torch')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_entry_point_is_found():
    found = entry_points(group="vllm.general_plugins", name="butterfly")
    assert found, "the project is not installed: pip install -e ."
    assert {entry.value for entry in found} == {"bq_vllm:register"}


def test_register_is_idempotent(vllm):
    from vllm.envs import compile_factors
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    import bq_vllm
    from bq_vllm.config import ButterflyConfig

    for _ in range(3):
        bq_vllm.register()
    assert get_quantization_config("butterfly") is ButterflyConfig
    assert QUANTIZATION_METHODS.count("butterfly") == 1
    # or a graph compiled for one backend would be run with another one's tensors
    variables = {"BQ_VLLM_BACKEND", "BQ_VLLM_PREFILL_ACTIVATION_BITS", "BQ_VLLM_FUSE_NORM"}
    assert variables <= set(compile_factors())


def test_register_does_not_raise(vllm, monkeypatch, caplog):
    import bq_vllm

    monkeypatch.setitem(sys.modules, "bq_vllm.config", None)
    with caplog.at_level(logging.ERROR):
        logging.getLogger("vllm").propagate, propagate = True, logging.getLogger("vllm").propagate
        bq_vllm.register()
        logging.getLogger("vllm").propagate = propagate
    assert "'butterfly' is not available" in caplog.text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format_version": 2}, "reads version 1, the checkpoint says 2"),
        ({"prefill_activation_bits": 4}, r"prefill_activation_bits: expected one of \[16, 8\], found 4"),
        ({"bits": 5}, r"bits: expected one of \[2, 3, 4\], found 5"),
        ({"sign": True}, "unknown key 'sign'"),
        ({"rotation": {"kind": "wavelet", "block_size": {"default": 64}}}, "rotation.kind: .*'wavelet'"),
    ],
)
def test_bad_config_is_refused(vllm, edit, message):
    from bq_vllm.config import ButterflyConfig

    with pytest.raises(FormatError, match=message):
        ButterflyConfig.from_config(tiny.quant_config().to_dict() | edit)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1000], r"model\.safetensors: damaged, \d+ bytes of \d+"),
        (lambda data: data[:100], r"model\.safetensors: not a whole safetensors file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", r"model\.safetensors: not a whole"),
        (lambda data: (20).to_bytes(8, "little") + bytes(20), r"model\.safetensors: not a whole"),
    ],
    ids=["tail", "header", "pointer", "zeros"],
)
def test_damaged_file_is_refused(config, tmp_path, damage, message):
    path = tiny.write_checkpoint(tmp_path) / "model.safetensors"
    config().maybe_update_config(str(tmp_path), revision=None)
    config().maybe_update_config("some/model-on-the-hub", hf_config=None)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match=message):
        config().maybe_update_config(str(tmp_path))


def test_missing_file_is_refused(config, tmp_path):
    index = tiny.write_checkpoint(tmp_path) / "model.safetensors.index.json"
    listed = {"a": "model.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    with pytest.raises(FormatError, match=r"model-2\.safetensors: missing"):
        config().maybe_update_config(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_broken_index_is_refused(config, tmp_path, text):
    (tiny.write_checkpoint(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=r"model\.safetensors\.index\.json: not a valid index"):
        config().maybe_update_config(str(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_changed_bit_is_refused(config, tmp_path, monkeypatch, name):
    for variable in ("BQ_VERIFY", "_BQ_VERIFIED"):
        monkeypatch.delenv(variable, raising=False)
    path = tiny.write_checkpoint(tmp_path) / name
    for other in ("tokenizer.json", "generation_config.json"):
        (tmp_path / other).write_text("{}")
    write_sums(tmp_path)
    config().maybe_update_config(str(tmp_path))
    data, chooser = path.read_bytes(), random.Random(name)
    for place in (0, len(data) - 1, *(chooser.randrange(len(data)) for _ in range(10))):
        changed = bytearray(data)
        changed[place] ^= 1 << chooser.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            config().maybe_update_config(str(tmp_path))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setenv("BQ_VERIFY", "0")
    config().maybe_update_config(str(tmp_path))


def test_changed_bit_in_the_cache_of_the_hub_is_refused(config, tmp_path, monkeypatch):
    for variable in ("BQ_VERIFY", "_BQ_VERIFIED"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repo = "0" * 40, tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    tiny.write_checkpoint(snapshot)
    write_sums(snapshot)
    weights, blob = snapshot / "model.safetensors", repo / "blobs" / "weights"
    weights.rename(blob)
    config().maybe_update_config("some/model")  # weights that are not downloaded yet are left to vLLM
    weights.symlink_to(blob)
    for revision in (None, "main", commit):
        config().maybe_update_config("some/model", revision=revision)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for revision in (None, commit):
        with pytest.raises(FormatError, match=r"model\.safetensors: .*differs"):
            config().maybe_update_config("some/model", hf_config=None, revision=revision)
    for elsewhere in ("other/model", "no name/of a/model"):
        config().maybe_update_config(elsewhere)


def test_methods_of_layers(config, linear):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from bq_vllm.linear import ButterflyLinearMethod

    quant = config(skip=("lm_head", "o_proj", "model.layers.1.self_attn.qkv_proj", "visual"))
    prefix = "model.layers.0.self_attn."
    method = quant.get_quant_method(linear, prefix + "qkv_proj")
    assert type(method) is ButterflyLinearMethod
    assert method.modules == [prefix + "q_proj", prefix + "k_proj", prefix + "v_proj"]
    for skipped in (prefix + "o_proj", "model.layers.1.self_attn.qkv_proj", "visual.blocks.0.fc1"):
        assert type(quant.get_quant_method(linear, skipped)) is UnquantizedLinearMethod
    assert type(quant.get_quant_method(linear, "model.layers.0.mlp.visual_proj")) is ButterflyLinearMethod
    assert quant.get_quant_method(torch.nn.Embedding(1, 1), "lm_head") is None


@pytest.mark.parametrize("dot", ["", "."])
def test_names_follow_the_model(config, dot):
    """Mappers of vLLM have prefixes of tensors' names, with a dot at the end or without."""
    from vllm.model_executor.models.utils import WeightsMapper

    prefixes = {f"model.visual{dot}": f"visual{dot}", f"lm_head{dot}": f"language_model.lm_head{dot}"}
    quant = config(skip=("lm_head", "model.visual"), module_bits={"model.visual.fc1": 4})
    quant.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    assert quant.quant.modules_to_not_convert == ("language_model.lm_head", "visual")
    assert quant.quant.module_bits == {"visual.fc1": 4}
    packed = config(skip=("model.visual",), module_bits={"lm_head": 3})
    packed.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    assert packed.quant.module_bits == {"language_model.lm_head": 3}


def test_fused_layers_must_agree(config, linear):
    with pytest.raises(FormatError, match=r"self_attn\.qkv_proj: .*holds only \['k_proj'\]"):
        config(skip=("k_proj",)).get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")
    with pytest.raises(FormatError, match=r"self_attn\.qkv_proj: .*\{'q_proj': 64, 'k_proj': 64, 'v_proj': 32\}"):
        quant = config(block_size={"default": 64, "v_proj": 32})
        quant.get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")
    with pytest.raises(FormatError, match=r"self_attn\.qkv_proj: .*\{'q_proj': 2, 'k_proj': 2, 'v_proj': 4\}"):
        quant = config(module_bits={"model.layers.0.self_attn.v_proj": 4})
        quant.get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")


def test_experts_that_are_not_packed(config):
    layer = type("RoutedExperts", (torch.nn.Module,), {})()
    assert config(skip=("experts",)).get_quant_method(layer, "model.layers.0.mlp.experts") is None


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", r"BQ_VLLM_BACKEND=cuda: unknown backend, expected one of \['triton', 'dense', 'reference'\]"),
        ("triton", "BQ_VLLM_BACKEND=triton on a CPU needs TRITON_INTERPRET=1"),
    ],
)
def test_backend_that_cannot_run(config, linear, monkeypatch, backend, message):
    from vllm.platforms import current_platform

    if backend == "triton" and current_platform.is_cuda_alike():
        pytest.skip("Triton runs here")
    monkeypatch.setenv("BQ_VLLM_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        config().get_quant_method(linear, "model.layers.0.self_attn.o_proj")


@pytest.mark.parametrize(
    ("backend", "asked", "configured", "bits"),
    [
        ("triton", "", 16, 16),  # off by default
        ("triton", "", 8, 8),
        ("reference", "8", 16, 8),
        ("triton", "16", 8, 16),  # the variable goes before the checkpoint
        ("dense", "", 8, 16),  # whose activations are not rotated
    ],
)
def test_bits_of_activations(monkeypatch, backend, asked, configured, bits):
    from bq_vllm.backend import select_activation_bits

    monkeypatch.setenv("BQ_VLLM_PREFILL_ACTIVATION_BITS", asked)
    assert select_activation_bits(backend, configured) == bits


@pytest.mark.parametrize(("backend", "asked"), [("triton", "4"), ("triton", "int8"), ("dense", "8")])
def test_bits_of_activations_that_cannot_be(monkeypatch, backend, asked):
    from bq_vllm.backend import select_activation_bits

    monkeypatch.setenv("BQ_VLLM_PREFILL_ACTIVATION_BITS", asked)
    with pytest.raises(ValueError, match=f"BQ_VLLM_PREFILL_ACTIVATION_BITS={asked}"):
        select_activation_bits(backend, 16)


@pytest.mark.parametrize(("asked", "fuses"), [("", False), ("0", False), ("1", True)])
def test_fused_norms(monkeypatch, asked, fuses):
    from bq_vllm.backend import select_fuse_norm

    monkeypatch.setenv("BQ_VLLM_FUSE_NORM", asked)
    assert select_fuse_norm("triton") is fuses


@pytest.mark.parametrize(("backend", "asked"), [("triton", "yes"), ("dense", "1"), ("reference", "1")])
def test_fused_norms_that_cannot_be(monkeypatch, backend, asked):
    from bq_vllm.backend import select_fuse_norm

    monkeypatch.setenv("BQ_VLLM_FUSE_NORM", asked)
    with pytest.raises(ValueError, match=f"BQ_VLLM_FUSE_NORM={asked}"):
        select_fuse_norm(backend)
