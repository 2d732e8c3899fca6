"""Experts of a mixture: their method on layers of its own, and whole engines against transformers."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from bq_kernels.format import FormatError

pytest.importorskip("vllm")

from bq_vllm.experts import PackedExpertsMethod, layer_names

from .engine import ONE_PROCESS, PROMPTS, run_engines
from .test_engine import assert_same, expected

MODULE = "model.layers.0.mlp.experts"
FORMATS = {
    "2 bits": {},
    "3 bits, zeros": {"bits": 3, "zero_point": "float", "kind": "hadamard"},
    "one scale per row, no rotation": {"group_size": -1, "kind": "none"},
}


class Layer(torch.nn.Module):
    """What the method sees of vLLM's experts."""

    activation, apply_router_weight_on_input, expert_map = "silu", False, None
    local_num_experts, params_dtype = tiny.EXPERTS, torch.float32

    def __init__(self, config, rank=0, ranks=1, backend="reference", has_bias=False):
        super().__init__()
        self.moe_config = SimpleNamespace(tp_rank=rank, tp_size=ranks, has_bias=has_bias)
        self.intermediate_size_per_partition = tiny.INTERMEDIATE // ranks
        self.quant_method = PackedExpertsMethod(config, MODULE, self.moe_config, backend)
        sizes = tiny.EXPERTS, tiny.HIDDEN, self.intermediate_size_per_partition
        self.quant_method.create_weights(self, *sizes, torch.float32)

    def _map_global_expert_id_to_local_expert_id(self, number):
        return number

    def load(self, tensors):
        """As vLLM's loader does it: by expert and shard."""
        shards = {last: shard for shard, last in layer_names(MODULE).items()}
        for name, tensor in tensors.items():
            if name.startswith(MODULE):
                expert, last, suffix = name.removeprefix(f"{MODULE}.").split(".")
                param = getattr(self, f"{'w2' if last == 'down_proj' else 'w13'}_{suffix}")
                arguments = {"shard_id": shards[last], "expert_id": int(expert), "return_success": True}
                assert param.weight_loader(param=param, loaded_weight=tensor, weight_name=name, **arguments)
        self.quant_method.process_weights_after_loading(self)
        return self

    def forward(self, x, weights, numbers):
        return self.quant_method.apply(self, x, weights, numbers, None, None)


@pytest.fixture(params=FORMATS)
def stored(request, tmp_path):
    """Config and tensors of a mixture, and its dense weights by the independent decode."""
    config = tiny.quant_config(skip=("lm_head", "mlp.gate"), **FORMATS[request.param])
    folder = tiny.write_checkpoint(tmp_path / "mixture", config, experts=tiny.EXPERTS)
    return config, tiny.random_tensors(config, experts=tiny.EXPERTS), tiny.decode(folder, f"{MODULE}.")


def routed(tokens=7):
    logits = torch.randn(tokens, tiny.EXPERTS)
    logits[:, 3] = -100  # an expert without tokens
    weights, numbers = logits.softmax(-1).topk(2, dim=-1)
    return torch.randn(tokens, tiny.HIDDEN), weights, numbers


def by_hand(dense, x, weights, numbers):
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, number in zip(weights[token], numbers[token].tolist(), strict=True):
            gate, up, down = (dense[f"{MODULE}.{number}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            out[token] += weight * (down @ (F.silu(gate @ x[token]) * (up @ x[token])))
    return out


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_output(stored, backend):
    """`triton` on a CPU is the torch twin of its kernel."""
    config, tensors, dense = stored
    inputs = routed()
    want, layer = by_hand(dense, *inputs), Layer(config, backend=backend).load(tensors)
    torch.testing.assert_close(layer(*inputs), want, rtol=1e-4, atol=1e-4 * want.abs().max())


def test_experts_of_another_rank(stored):
    """vLLM's map has -1 for them; those that are here have other numbers."""
    config, tensors, dense = stored
    x, weights, numbers = routed()
    layer = Layer(config).load(tensors)
    layer.expert_map = torch.tensor([2, 0, -1, -1, 5, 1])
    local = layer.expert_map[numbers]
    want = by_hand(dense, x, weights.masked_fill(local < 0, 0), local.clamp(min=0))
    torch.testing.assert_close(layer(x, weights, numbers), want, rtol=1e-4, atol=1e-4 * want.abs().max())


def test_ranks_add_up(stored):
    config, tensors, dense = stored
    inputs = routed()
    found = sum(Layer(config, rank, 2).load(tensors)(*inputs) for rank in range(2))
    want = by_hand(dense, *inputs)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * want.abs().max())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("2.up_proj.scales", lambda tensor: None, r"experts\.2\.up_proj\.scales: missing from the checkpoint"),
        ("5.down_proj.angles", lambda tensor: tensor + 0.5, r"experts\.5\.down_proj\.angles differs"),
        ("1.gate_proj.qweight", lambda tensor: tensor[:-1], r"experts\.1\.gate_proj\.qweight: expected torch\.int32"),
        ("0.down_proj.scales", lambda tensor: -tensor, r"experts\.0\.down_proj\.scales: holds zero or a negative"),
    ],
)
def test_bad_tensors_are_refused(name, change, message):
    config = tiny.quant_config(skip=("lm_head", "mlp.gate"))
    tensors = tiny.random_tensors(config, experts=tiny.EXPERTS)
    tensors[f"{MODULE}.{name}"] = change(tensors[f"{MODULE}.{name}"])
    with pytest.raises(FormatError, match=message):
        Layer(config).load({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_shard_that_would_cut_a_block():
    with pytest.raises(FormatError, match=r"down_proj: tensor parallel size 4 would cut"):
        Layer(tiny.quant_config(skip=("lm_head", "mlp.gate")), 0, 4)


MISSING = f"{MODULE}.4.up_proj.qweight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Mixtures by name: one, its like with other weights, one of another format, one without a tensor."""
    folder = tmp_path_factory.mktemp("mixtures")
    config = tiny.quant_config(skip=("lm_head", "mlp.gate"), **FORMATS["3 bits, zeros"])
    return {
        "base": tiny.write_checkpoint(folder / "base", experts=tiny.EXPERTS),
        "like": tiny.write_checkpoint(folder / "like", experts=tiny.EXPERTS, seed=2),
        "other": tiny.write_checkpoint(folder / "other", config, experts=tiny.EXPERTS, seed=1),
        "missing": tiny.write_checkpoint(folder / "missing", experts=tiny.EXPERTS, edits={MISSING: None}),
    }


def run_or_skip(folder, jobs, backend):
    """As `run_engines`, in one process; all jobs may fail."""
    jobs = [job | {"fails": True} for job in jobs]
    answers, printed = run_engines(folder, jobs, BQ_VLLM_BACKEND=backend, **ONE_PROCESS)
    if backend != "dense" and any("topk_softmax" in answer.get("error", "") for answer in answers):
        pytest.skip("this CPU build of vLLM routes tokens only to its own experts")
    return answers, printed


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "reference"])
def test_engines(checkpoints, tmp_path, backend):
    base, like, other, missing = (str(checkpoints[name]) for name in ("base", "like", "other", "missing"))
    jobs = [{"model": base, "reload": [like]}, {"model": other}, {"model": missing}]
    (first, second, refused), printed = run_or_skip(tmp_path, jobs, backend)
    assert_same(first["base"], expected(tiny.decode(checkpoints["base"]), experts=tiny.EXPERTS))
    assert_same(first["reload 0"], expected(tiny.decode(checkpoints["like"]), experts=tiny.EXPERTS))
    assert_same(second["base"], expected(tiny.decode(checkpoints["other"]), experts=tiny.EXPERTS))
    assert f"{MISSING}: missing from the checkpoint" in refused["error"] + printed
    assert len(first["base"]) == len(PROMPTS)


@pytest.mark.slow
def test_adapters_beside_packed_experts(checkpoints, tmp_path):
    """Attention may have some; for experts they are refused by name."""
    state = tiny.decode(checkpoints["base"])
    attention = [name.removesuffix(".weight") for name in state if name.endswith(("q_proj.weight", "o_proj.weight"))]
    adapter = tiny.write_lora(tmp_path / "adapter", {name: tuple(state[f"{name}.weight"].shape) for name in attention})
    options = {"enable_lora": True, "max_lora_rank": 8}
    job = {"model": str(checkpoints["base"])}
    jobs = [
        job | {"lora": str(adapter), "options": options | {"lora_target_modules": ["qkv_proj", "o_proj"]}},
        job | {"options": options},
    ]
    (adapted, refused), printed = run_or_skip(tmp_path, jobs, "reference")
    assert_same(adapted["lora"], expected(tiny.merge_lora(state, adapter), experts=tiny.EXPERTS))
    assert "packed experts take no LoRA adapters" in refused["error"] + printed


@pytest.mark.slow
def test_two_ranks(checkpoints, tmp_path):
    jobs = [{"model": str(checkpoints["base"]), "options": {"tensor_parallel_size": 2}}]
    (answer,), _ = run_engines(tmp_path, jobs, VLLM_CPU_OMP_THREADS_BIND="0|1", TORCHDYNAMO_DISABLE="1")
    assert_same(answer["base"], expected(tiny.decode(checkpoints["base"]), experts=tiny.EXPERTS))
