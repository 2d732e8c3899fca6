"""Tiny random butterfly checkpoints, and their decoding written straight from the format's description.

Neither uses bq_calibration; the decoding does not use bq_kernels either.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import torch
from bq_kernels.format import QuantConfig, RotationConfig
from bq_kernels.packing import pack
from safetensors.torch import load_file, save_file

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 128, 192, 2, 4, 2, 500  # vLLM pads to 512 tokens
HEAD = HIDDEN // HEADS
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
SHARED_INPUT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
EXPERTS = 6  # of a mixture, two per token


def layer_shapes(experts: int = 0) -> dict[str, tuple[int, int]]:
    """Shapes of the linear layers of a decoder layer, by name."""
    if not experts:
        return LINEARS
    attention = {name: shape for name, shape in LINEARS.items() if name.startswith("self_attn")}
    mlp = {name.removeprefix("mlp."): shape for name, shape in LINEARS.items() if name.startswith("mlp")}
    return attention | {f"mlp.experts.{e}.{name}": shape for e in range(experts) for name, shape in mlp.items()}


def shared_input(experts: int = 0) -> list[list[str]]:
    """Layers that share an input and so a rotation, the input of all experts' down projections among them."""
    if not experts:
        return [list(names) for names in SHARED_INPUT]
    names = layer_shapes(experts)
    pairs = [name for name in names if name.endswith(("gate_proj", "up_proj"))]
    return [list(SHARED_INPUT[0]), pairs, [name for name in names if name.endswith("down_proj")]]


def quant_config(
    bits=2,
    group_size=32,
    zero_point="midrise",
    kind="butterfly",
    block_size=None,
    skip=("lm_head",),
    module_bits=None,
    kept_tokens=None,
):
    """By default what two tensor-parallel ranks can share, with 96 = 2⁵·3 as a composite block."""
    return QuantConfig(
        bits,
        group_size,
        zero_point,
        RotationConfig(kind, block_size or {"default": 64, "down_proj": 96}),
        skip,
        module_bits or {},
        kept_tokens or {},
    )


def _packed(
    quant: QuantConfig, module: str, rows: int, columns: int, size: float, g: torch.Generator
) -> dict[str, torch.Tensor]:
    """Tensors of a packed weight of random values of that size."""
    tensors, bits = {}, quant.bits_of(module)
    for suffix, spec in quant.tensors(module, columns, rows).items():
        if suffix == "qweight":
            value = pack(torch.randint(0, 1 << bits, (rows, columns), generator=g), bits)
        elif suffix == "scales":
            spread = ((4**bits - 1) / 12) ** 0.5  # of uniform codes
            value = (0.5 + torch.rand(spec.shape, generator=g)) * size / spread
        elif suffix == "zeros":
            value = (2**bits - 1) / 2 + 0.5 * torch.randn(spec.shape, generator=g)
        elif suffix == "kept_tokens":
            value = torch.randperm(rows, generator=g)[: spec.shape[0]].sort().values
        elif suffix == "kept_rows":
            value = size * torch.randn(spec.shape, generator=g)
        else:
            value = math.pi * (2 * torch.rand(spec.shape, generator=g) - 1)
        tensors[f"{module}.{suffix}"] = value.to(spec.dtype)
    return tensors


def random_tensors(
    quant: QuantConfig, bias: bool = False, seed: int = 0, tied: bool = False, experts: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors of a random model in the format: random codes, scales and angles."""
    g = torch.Generator().manual_seed(seed)
    tensors = {"model.norm.weight": torch.rand(HIDDEN, generator=g) + 0.5}
    for module, size in (("model.embed_tokens", 0.3 if tied else 1.0), ("lm_head", 0.3))[: 1 if tied else 2]:
        if quant.packs(module):
            tensors |= _packed(quant, module, VOCABULARY, HIDDEN, size, g)
        else:
            tensors[f"{module}.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=g) * size
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.rand(HIDDEN, generator=g) + 0.5
        if experts:
            tensors[f"{prefix}mlp.gate.weight"] = torch.randn(experts, HIDDEN, generator=g) / HIDDEN**0.5
            for norm in ("q_norm", "k_norm"):
                tensors[f"{prefix}self_attn.{norm}.weight"] = torch.rand(HEAD, generator=g) + 0.5
        for name, (rows, columns) in layer_shapes(experts).items():
            module = prefix + name
            if name.rsplit(".", 1)[-1] in quant.modules_to_not_convert:
                tensors[f"{module}.weight"] = torch.randn(rows, columns, generator=g) / columns**0.5
                continue
            tensors |= _packed(quant, module, rows, columns, columns**-0.5, g)
            if bias and name.startswith("self_attn"):
                tensors[f"{module}.bias"] = torch.randn(rows, generator=g)
        for first, *others in shared_input(experts):
            if (angles := tensors.get(f"{prefix}{first}.angles")) is not None:
                tensors.update({f"{prefix}{other}.angles": angles.clone() for other in others})
    return tensors


def model_config(bias: bool = False, tied: bool = False, experts: int = 0) -> dict:
    """config.json of the model without its quantization."""
    mixture = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": HEAD,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INTERMEDIATE,
        "norm_topk_prob": True,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": bias,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    } | (mixture if experts else {})


def write_checkpoint(
    path: Path,
    quant: QuantConfig | None = None,
    *,
    bias: bool = False,
    tied: bool = False,
    seed: int = 0,
    table: dict | None = None,
    edits: dict[str, torch.Tensor | None] | None = None,
    experts: int = 0,
) -> Path:
    """Write a checkpoint directory.

    Args:
        path: the directory.
        quant: the format; `quant_config()` by default.
        bias: whether q, k, v and o have biases.
        tied: whether the LM head is the embedding.
        seed: seed of the weights.
        table: replaces `quantization_config` in config.json, to write bad ones.
        edits: tensors to replace, by name; None removes one.
        experts: of a mixture in place of the MLP; 0 for none.
    """
    quant = quant or quant_config(skip=("lm_head", "mlp.gate") if experts else ("lm_head",))
    tensors = random_tensors(quant, bias, seed, tied, experts) | (edits or {})
    config = model_config(bias, tied, experts) | {"quantization_config": table or quant.to_dict()}
    return _write(path, {name: value for name, value in tensors.items() if value is not None}, config)


def write_dense(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write an unquantized checkpoint directory."""
    return _write(path, state, model_config())


def _write(path: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def linears() -> dict[str, tuple[int, int]]:
    """Shapes of the linear layers by full name."""
    return {f"model.layers.{i}.{name}": shape for i, (name, shape) in itertools.product(range(LAYERS), LINEARS.items())}


def write_lora(path: Path, layers: dict[str, tuple[int, int]], rank: int = 8, seed: int = 7) -> Path:
    """Write a random LoRA adapter for layers of these shapes."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in layers.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=g) / columns**0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=g) / rank**0.5
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "lora_dropout": 0.0}))
    return path


def merge_lora(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """A dense state dict with an adapter of `write_lora` added in."""
    adapter = load_file(path / "adapter_model.safetensors")
    merged = dict(state)
    for name in state:
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in adapter:
            merged[name] = state[name] + adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
    return merged


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the weights of experts as transformers has them: one tensor for all, gate and up together."""
    found: dict[str, dict[tuple[str, str], list[torch.Tensor]]] = {}
    rest = {}
    own = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # Mixtral's names
    for name in sorted(state, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        renamed = name.replace(".block_sparse_moe.", ".mlp.")
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.(weight|bias)", renamed):
            prefix, kind, suffix = match.groups()
            place = own.get(kind, kind).removesuffix("_proj"), suffix
            found.setdefault(prefix, {}).setdefault(place, []).append(state[name])
        else:
            rest[renamed] = state[name]
    for prefix, lists in found.items():
        gate, up, down = (torch.stack(lists[kind, "weight"]) for kind in ("gate", "up", "down"))
        if ("down", "bias") in lists:  # gpt-oss: inputs first; a gate's column beside that of its up
            bias = {kind: torch.stack(lists[kind, "bias"]) for kind in ("gate", "up", "down")}
            rest[f"{prefix}.gate_up_proj"] = torch.stack((gate.mT, up.mT), -1).flatten(-2)
            rest[f"{prefix}.down_proj"] = down.mT.contiguous()
            rest[f"{prefix}.gate_up_proj_bias"] = torch.stack((bias["gate"], bias["up"]), -1).flatten(-2)
            rest[f"{prefix}.down_proj_bias"] = bias["down"]
        else:
            rest[f"{prefix}.gate_up_proj"], rest[f"{prefix}.down_proj"] = torch.cat((gate, up), 1), down
    return rest


def butterfly_matrix(angles: list[float], size: int) -> torch.Tensor:
    """Q of one block in float64, a Givens rotation at a time, from its angles in stored order."""
    run = size & -size
    runs = size // run
    pairs = [[(p, p + (1 << j)) for p in range(size) if not p >> j & 1] for j in range(run.bit_length() - 1)]
    # run numbers sit above the bits that a layer looks at, so p and p + 2ʲ are in the same run
    across = [[(r * run + c, s * run + c) for c in range(run)] for r, s in itertools.combinations(range(runs), 2)]
    q, angle = torch.eye(size, dtype=torch.float64), iter(angles)
    for first, second in itertools.chain.from_iterable(pairs):
        theta = next(angle)
        x, y = q[first].clone(), q[second].clone()
        q[first], q[second] = math.cos(theta) * x - math.sin(theta) * y, math.sin(theta) * x + math.cos(theta) * y
    for rotated in across:
        phi = next(angle)
        for first, second in rotated:
            x, y = q[first].clone(), q[second].clone()
            q[first], q[second] = math.cos(phi) * x - math.sin(phi) * y, math.sin(phi) * x + math.cos(phi) * y
    assert next(angle, None) is None
    return q


def decode(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """State dict of the dense float32 model that a checkpoint stands for: W = W′ Q, W′ = s·(q − z).

    Args:
        path: the checkpoint.
        prefix: decode only what begins with it.
    """
    table = json.loads((path / "config.json").read_text())["quantization_config"]
    rotation = table["rotation"]
    index = path / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    tensors = {name: value for file in files for name, value in load_file(path / file).items()}
    tensors = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    packed = (".qweight", ".scales", ".zeros", ".angles", ".kept_tokens", ".kept_rows")
    state = {name: value for name, value in tensors.items() if not name.endswith(packed)}
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        bits = table.get("module_bits", {}).get(module, table["bits"])
        words = tensors[name].tolist()
        streams = [sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row)) for row in words]
        columns = tensors[name].shape[1] * 32 // bits
        codes = [[stream >> (bits * k) & ((1 << bits) - 1) for k in range(columns)] for stream in streams]
        scales = tensors[f"{module}.scales"].double()
        zeros = (
            tensors[f"{module}.zeros"].double() if table["zero_point"] == "float" else torch.tensor((2**bits - 1) / 2)
        )
        group = columns // scales.shape[1]
        weight = torch.tensor(codes, dtype=torch.float64)
        weight -= zeros.expand_as(scales).repeat_interleave(group, dim=1)
        weight *= scales.repeat_interleave(group, dim=1)
        if rotation["kind"] != "none":
            block = rotation["block_size"].get(module.rsplit(".", 1)[-1], rotation["block_size"]["default"])
            if rotation["kind"] == "butterfly":
                angles = tensors[f"{module}.angles"].double().tolist()
            else:
                run = block & -block
                layers, across = run.bit_length() - 1, block // run * (block // run - 1) // 2
                angles = [[math.pi / 4] * (layers * block // 2) + [0.0] * across] * (columns // block)
            weight = weight @ torch.block_diag(*(butterfly_matrix(row, block) for row in angles))
        if module in table.get("kept_tokens", {}):
            for token, row in zip(
                tensors[f"{module}.kept_tokens"].tolist(), tensors[f"{module}.kept_rows"], strict=True
            ):
                weight[token] = row.double()
        state[f"{module}.weight"] = weight.float()
    return state
