"""Loading and multiplying, layer by layer in this process; more ranks than one are simulated."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from bq_kernels import ops
from bq_kernels.activations import DECODE_ROWS
from bq_kernels.format import FormatError, QuantConfig
from bq_kernels.packing import pack

pytest.importorskip("vllm", reason="vLLM is not installed")
LAYER = "model.layers.0."
QKV, GATE_UP = tiny.SHARED_INPUT
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module", autouse=True)
def distributed(tmp_path_factory):
    """vLLM's distributed state for one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


@pytest.fixture(autouse=True)
def cpu(monkeypatch, request):
    monkeypatch.setenv("BQ_VLLM_BACKEND", getattr(request, "param", "dense"))


@pytest.fixture
def ranks(monkeypatch):
    """Make vLLM believe that it is one rank of several."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def become(rank: int, size: int) -> None:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    return become


def build(
    quant: QuantConfig, name: str, dtype=torch.float32, in_features: int | None = None, prefix: str = LAYER
) -> torch.nn.Module:
    """The layer that vLLM makes for `name` in a model of the sizes of `tiny`."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    from bq_vllm.config import ButterflyConfig

    config = ButterflyConfig(quant)
    config.packed_modules_mapping = FUSED
    options = {"bias": False, "params_dtype": dtype, "quant_config": config, "prefix": prefix + name}
    if name == "self_attn.qkv_proj":
        return QKVParallelLinear(tiny.HIDDEN, tiny.HEAD, tiny.HEADS, tiny.KV_HEADS, **options)
    if name == "mlp.gate_up_proj":
        return MergedColumnParallelLinear(tiny.HIDDEN, [tiny.INTERMEDIATE] * 2, **options)
    rows, columns = tiny.LINEARS[name]
    return RowParallelLinear(in_features or columns, rows, reduce_results=False, **options)


def load(layer: torch.nn.Module, name: str, tensors: dict[str, torch.Tensor], prefix: str = LAYER) -> torch.nn.Module:
    """Load a layer from the tensors of a checkpoint as vLLM does, and finish it."""
    shards = {"self_attn.qkv_proj": dict(zip("qkv", QKV, strict=True)), "mlp.gate_up_proj": dict(enumerate(GATE_UP))}
    for shard, module in shards.get(name, {None: name}).items():
        for key, tensor in tensors.items():
            if key.startswith(f"{prefix}{module}."):
                param = getattr(layer, key.rsplit(".", 1)[-1], layer)
                param.weight_loader(param, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


DECODED: dict[str, dict[str, torch.Tensor]] = {}


@pytest.fixture
def dense(tmp_path):
    """The weight of a (fused) layer, decoded independently."""

    def decode(quant: QuantConfig, name: str) -> torch.Tensor:
        key = json.dumps(quant.to_dict())
        if key not in DECODED:
            DECODED[key] = tiny.decode(tiny.write_checkpoint(tmp_path, quant), LAYER)
        modules = {"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP}.get(name, (name,))
        return torch.cat([DECODED[key][f"{LAYER}{module}.weight"] for module in modules])

    return decode


FORMATS = {
    "default": {},
    "3 bits": {"bits": 3, "zero_point": "float", "group_size": 64},
    "4 bits": {"bits": 4, "kind": "hadamard", "block_size": {"default": 128, "down_proj": 192}, "group_size": 64},
    "one scale per row": {"group_size": -1, "zero_point": "float"},
    "no rotation": {"kind": "none"},
}


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
@pytest.mark.parametrize("name", ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_output(dense, options, name):
    quant = tiny.quant_config(**options)
    weight = dense(quant, name)
    layer = load(build(quant, name), name, tiny.random_tensors(quant))
    x, bias = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0])
    kept = x.clone()
    torch.testing.assert_close(layer.quant_method.apply(layer, x, bias), x @ weight.T + bias, atol=1e-4, rtol=1e-4)
    assert torch.equal(x, kept), "apply changed its input"


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
def test_sixteen_bit_activations(dense):
    quant, name = tiny.quant_config(), "mlp.down_proj"
    weight = dense(quant, name)
    layer = load(build(quant, name, torch.bfloat16), name, tiny.random_tensors(quant))
    x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16)
    out = layer.quant_method.apply(layer, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x.float() @ weight.T, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
def test_eight_bit_activations_of_a_prefill(dense, cpu, monkeypatch):
    """Rounded with many tokens and a backend that rotates; few tokens and dense weights stay exact."""
    name, quant = "mlp.down_proj", replace(tiny.quant_config(), prefill_activation_bits=8)
    weight = dense(tiny.quant_config(), name)
    layer = load(build(quant, name), name, tiny.random_tensors(quant))
    x = torch.randn(DECODE_ROWS + 1, weight.shape[1])
    want = x @ weight.T
    off = (layer.quant_method.apply(layer, x) - want).norm() / want.norm()
    if layer.quant_method.backend == "dense":
        assert off < 1e-5
    else:
        assert 1e-3 < off < 2e-2  # a uniform error of half a 127th of some 3.5 standard deviations
    torch.testing.assert_close(layer.quant_method.apply(layer, x[:3]), want[:3], atol=1e-4, rtol=1e-4)


def test_kernels_behind_a_norm_are_compiled_ahead(monkeypatch):
    """Those of layers that share their input, with a residual and without."""
    for variable, value in (("BQ_VLLM_BACKEND", "triton"), ("TRITON_INTERPRET", "1"), ("BQ_VLLM_FUSE_NORM", "1")):
        monkeypatch.setenv(variable, value)
    quant, x, calls = tiny.quant_config(), torch.randn(3, tiny.HIDDEN), []
    monkeypatch.setattr(ops, "packed_linear", lambda *arguments: calls.append("packed"))
    monkeypatch.setattr(ops, "norm_linear", lambda x, residual, *arguments: calls.append(residual))
    for name in ("self_attn.qkv_proj", "self_attn.o_proj"):
        layer = load(build(quant, name), name, tiny.random_tensors(quant))
        layer.quant_method.launch(layer, x, None)
    assert calls == ["packed", x, None, "packed"]


ROW_SCALES = {
    "group_size": -1,
    "bits": 3,
    "zero_point": "float",
    "block_size": {"default": 32, "down_proj": 48},
}


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("mlp.down_proj", 2, {}),
        ("mlp.down_proj", 2, {"kind": "hadamard", "block_size": {"default": 32}}),
        ("mlp.down_proj", 2, ROW_SCALES),
        ("self_attn.o_proj", 4, ROW_SCALES),
    ],
)
def test_ranks_add_up(dense, ranks, name, size, options):
    quant = tiny.quant_config(**options)
    weight, tensors = dense(quant, name), tiny.random_tensors(quant)
    x = torch.randn(3, weight.shape[1])
    total = 0
    for rank, part in enumerate(x.chunk(size, dim=1)):
        ranks(rank, size)
        layer = load(build(quant, name), name, tensors)
        total = total + layer.quant_method.apply(layer, part.contiguous())
    torch.testing.assert_close(total, x @ weight.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_split_heads(dense, ranks, size):
    """With four ranks, two share a key/value head."""
    quant, name = tiny.quant_config(), "self_attn.qkv_proj"
    q, k, v = dense(quant, name).split([tiny.HEADS * tiny.HEAD, *[tiny.KV_HEADS * tiny.HEAD] * 2])
    x = torch.randn(3, tiny.HIDDEN)
    for rank in range(size):
        ranks(rank, size)
        layer = load(build(quant, name), name, tiny.random_tensors(quant))
        copies = max(1, size // tiny.KV_HEADS)
        heads = [w.chunk(size // n)[rank // n] for w, n in ((q, 1), (k, copies), (v, copies))]
        torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ torch.cat(heads).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "block", "message"),
    [
        ("mlp.down_proj", 2, 192, r"down_proj: tensor parallel size 2 would cut .*\(192\).* below that .* is 1$"),
        ("mlp.down_proj", 4, 96, r"down_proj: tensor parallel size 4 would cut .*\(96\).* below that .* is 2$"),
        ("self_attn.o_proj", 4, 64, r"o_proj: tensor parallel size 4 would cut .*\(64\).* below that .* is 2$"),
    ],
)
def test_ranks_that_would_cut_a_block(ranks, name, size, block, message):
    ranks(0, size)
    with pytest.raises(FormatError, match=message):
        build(tiny.quant_config(block_size={"default": block}), name)


def test_ranks_that_would_cut_a_group(ranks):
    ranks(0, 2)
    with pytest.raises(FormatError, match=r"down_proj: tensor parallel size 2 would cut .* a group \(64\).* is 1$"):
        build(tiny.quant_config(group_size=64), "mlp.down_proj")


@pytest.mark.parametrize(
    ("options", "in_features", "message"),
    [
        ({}, 160, r"mlp\.down_proj: rotation block size 96 does not divide its 160 input features"),
        ({"group_size": 128}, 192, r"mlp\.down_proj: 192 input features cannot be cut into groups of 128"),
    ],
)
def test_block_or_group_that_does_not_divide(options, in_features, message):
    with pytest.raises(FormatError, match=message):
        build(tiny.quant_config(**options), "mlp.down_proj", in_features=in_features)


def test_fused_on_disk():
    """As Phi-3 stores them: one q,k,v tensor, without a shard id."""
    quant, name = tiny.quant_config(), "self_attn.qkv_proj"
    tensors = tiny.random_tensors(quant)
    parts = load(build(quant, name), name, tensors)
    whole = build(quant, name)
    for suffix in ("qweight", "scales"):
        param = getattr(whole, suffix)
        param.weight_loader(param, torch.cat([tensors[f"{LAYER}{module}.{suffix}"] for module in QKV]))
    whole.angles.weight_loader(whole.angles, tensors[f"{LAYER}self_attn.q_proj.angles"])
    whole.quant_method.process_weights_after_loading(whole)
    x = torch.randn(3, tiny.HIDDEN)
    assert torch.equal(whole.quant_method.apply(whole, x), parts.quant_method.apply(parts, x))


def test_dummy_weights():
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    layer = build(tiny.quant_config(zero_point="float"), "self_attn.qkv_proj")
    for param in layer.parameters():
        initialize_single_dummy_weight(param)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.isfinite(layer.quant_method.apply(layer, torch.randn(3, tiny.HIDDEN))).all()


def test_dequantize_weight(dense):
    quant, name = tiny.quant_config(), "mlp.down_proj"
    layer = build(quant, name)
    layer.quant_method.process_weights_after_loading = lambda layer: None
    load(layer, name, tiny.random_tensors(quant))
    torch.testing.assert_close(layer.quant_method.dequantize_weight(layer), dense(quant, name))


@pytest.mark.parametrize("cpu", ["dense", "reference"], indirect=True)
def test_what_is_kept(cpu):
    """LoRA looks for `weight` or `qweight`, reloading for parameters; nothing unpacked stays beside the packed."""
    quant, name = tiny.quant_config(), "self_attn.qkv_proj"
    layer = load(build(quant, name), name, tiny.random_tensors(quant))
    kept = {"weight"} if layer.quant_method.backend == "dense" else {"qweight", "scales", "cos_sin", "mix"}
    assert set(dict(layer.named_parameters())) == kept
    assert not dict(layer.named_buffers())


NAN = torch.full((tiny.KV_HEADS * tiny.HEAD, tiny.HIDDEN // 32), float("nan"), dtype=torch.float16)
K_PROJ = LAYER + "self_attn.k_proj."


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"scales": None}, r"k_proj\.scales: missing from the checkpoint; expected torch\.float16 \[64, 4\]"),
        ({"qweight": None}, r"k_proj\.qweight: missing from the checkpoint; expected torch\.int32 \[64, 8\]"),
        ({"angles": None}, r"k_proj\.angles: missing from the checkpoint; expected torch\.float16 \[2, 192\]"),
        ({"scales": NAN}, r"k_proj\.scales: holds NaN or infinity"),
        ({"scales": NAN.nan_to_num(0)}, r"k_proj\.scales: holds zero or a negative number"),
        ({"scales": NAN.nan_to_num(-1)}, r"k_proj\.scales: holds zero or a negative number"),
        ({"scales": NAN[:, :2].nan_to_num(1)}, r"k_proj\.scales: expected .*\[64, 4\], found .*\[64, 2\]"),
        ({"scales": NAN.nan_to_num(1).float()}, r"k_proj\.scales: expected torch\.float16 .* found torch\.float32"),
        ({"angles": torch.ones(2, 192).half()}, r"q_proj\.angles and model.*k_proj\.angles differ"),
        ({"zeros": NAN.nan_to_num(1)}, r"k_proj .*surplus tensor torch\.float16 \[64, 4\]"),
        ({"weight": torch.ones(64, 128)}, r"k_proj .*surplus tensor torch\.float32 \[64, 128\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_tensors_are_refused(edits, message):
    quant, name = tiny.quant_config(), "self_attn.qkv_proj"
    tensors = tiny.random_tensors(quant) | {K_PROJ + suffix: value for suffix, value in edits.items()}
    with pytest.raises(FormatError, match=message):
        load(build(quant, name), name, {key: value for key, value in tensors.items() if value is not None})


def test_layer_without_any_tensor_is_refused():
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.down_proj\.qweight: missing from the checkpoint"):
        load(build(tiny.quant_config(), "mlp.down_proj"), "mlp.down_proj", {})


def test_decoding_knows_the_stream():
    """The oracle itself, on codes that can be told apart."""
    codes = torch.arange(64).remainder(8)[None]
    words = pack(codes, 3)[0].tolist()
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    assert [stream >> (3 * k) & 7 for k in range(64)] == codes[0].tolist()
