"""gpt-oss: experts with biases and their own activation, loaded by their names in the checkpoint."""

import pytest
import tiny
import torch
from bq_kernels.format import FormatError

pytest.importorskip("vllm")

from vllm.model_executor.models.gpt_oss import GptOssModel

from bq_vllm.experts import in_turn
from bq_vllm.gpt_oss import load_single_experts

from .test_experts import MODULE, Layer, routed

CONFIG = tiny.quant_config(skip=("lm_head", "mlp.router"))


class BiasedLayer(Layer):
    """Experts of gpt-oss."""

    activation = "swigluoai"

    def __init__(self, rank=0, ranks=1, backend="reference"):
        super().__init__(CONFIG, rank, ranks, backend, has_bias=True)


class Model(torch.nn.Module):
    """What `GptOssModel.load_weights` sees of a model of one decoder layer."""

    def __init__(self, experts):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].mlp = torch.nn.Module()
        self.layers[0].mlp.experts = torch.nn.Module()
        self.layers[0].mlp.experts.routed_experts = experts
        self.rest = []

    def butterfly_load_weights(self, weights):
        self.rest += [name for name, _ in weights]
        return set(self.rest)


@pytest.fixture
def tensors():
    """As a checkpoint has them, and biases."""
    found = {
        name: tensor
        for name, tensor in tiny.random_tensors(CONFIG, experts=tiny.EXPERTS).items()
        if name.startswith(MODULE)
    }
    for name in [name for name in found if name.endswith(".qweight")]:
        found[name.replace("qweight", "bias")] = torch.randn(len(found[name]))
    return found


def load(experts, tensors):
    """As vLLM calls them behind its renaming, beside a tensor that is none of ours."""
    load_single_experts()
    named = [
        (name.removeprefix("model.").replace(".down_proj.bias", ".w2_bias"), tensor) for name, tensor in tensors.items()
    ]
    model = Model(experts)
    loaded = GptOssModel.load_weights(model, [*named, ("norm.weight", torch.ones(3))])
    assert model.rest == ["norm.weight"] and "layers.0.mlp.experts.routed_experts.w2_bias" in loaded
    experts.quant_method.process_weights_after_loading(experts)
    return experts


def by_hand(tensors, folder, x, weights, numbers):
    dense = tiny.decode(tiny.write_checkpoint(folder, CONFIG, experts=tiny.EXPERTS), f"{MODULE}.")
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, number in zip(weights[token], numbers[token].tolist(), strict=True):
            gate, up, down = (
                (dense[f"{MODULE}.{number}.{name}_proj.weight"], tensors[f"{MODULE}.{number}.{name}_proj.bias"])
                for name in ("gate", "up", "down")
            )
            g = (gate[0] @ x[token] + gate[1]).clamp(max=7)
            u = (up[0] @ x[token] + up[1]).clamp(-7, 7)
            out[token] += weight * (down[0] @ (g * torch.sigmoid(1.702 * g) * (u + 1)) + down[1])
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_output(backend, ranks, tensors, tmp_path):
    x, *rest = routed()
    x = 3 * x  # beyond the limits
    want = by_hand(tensors, tmp_path / "mixture", x, *rest)
    found = sum(load(BiasedLayer(rank, ranks, backend), tensors)(x, *rest) for rank in range(ranks))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * want.abs().max())


def test_experts_of_another_rank_have_no_bias_here(tensors):
    x, weights, numbers = routed()
    layer = load(BiasedLayer(), tensors)
    whole = layer(x, weights, numbers)
    first, second = torch.full((2, tiny.EXPERTS), -1)
    half = tiny.EXPERTS // 2
    first[:half], second[half:] = torch.arange(half), torch.arange(half, tiny.EXPERTS)
    parts = []
    for layer.expert_map in (first, second):
        parts.append(layer(x, weights, numbers))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5 * whole.abs().max())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("2.up_proj.bias", lambda tensor: None, r"experts\.2\.up_proj\.bias: missing from the checkpoint; expected \["),
        ("1.down_proj.bias", lambda tensor: tensor[:-1], r"experts\.1\.down_proj\.bias: expected \[\d+\], found \["),
        ("0.gate_proj.weight", lambda tensor: torch.ones(2), r"experts\.0\.gate_proj\.weight: no tensor of a packed"),
    ],
)
def test_bad_tensors_are_refused(name, change, message, tensors):
    tensors[f"{MODULE}.{name}"] = change(tensors.get(f"{MODULE}.{name}"))
    with pytest.raises(FormatError, match=message):
        load(BiasedLayer(), {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_packed_embedding_is_refused():
    load_single_experts()
    with pytest.raises(FormatError, match="vLLM's gpt-oss takes no packed embedding"):
        GptOssModel.load_weights(Model(torch.nn.Module()), [("embed_tokens.qweight", torch.zeros(1))])


def test_gates_and_ups_in_turn():
    pairs = torch.tensor([[1, 3, 2, 4]])
    assert in_turn(pairs).tolist() == [[1, 2, 3, 4]]
    assert in_turn(pairs[..., None]).shape == (1, 4, 1)
