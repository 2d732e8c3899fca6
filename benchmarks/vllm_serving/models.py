"""Models without weights: configs of known shapes, their quantization by row, and a tokenizer of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from bq_kernels.format import QuantConfig, RotationConfig

# hidden, MLP, layers, heads, key/value heads, vocabulary, positions; `bench latency` wants 10,000 tokens or more
SHAPES = {
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 4096),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000, 4096),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000, 4096),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, 8192),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151936, 32768),
    "qwen3-30b-a3b": (2048, 6144, 48, 32, 4, 151936, 40960),
    "qwen3-235b-a22b": (4096, 12288, 94, 64, 4, 151936, 40960),
    "smoke": (128, 256, 1, 2, 1, 10240, 512),
}
SHAPE_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128}
MIXTURES = {  # what their configs have beside
    "qwen3-30b-a3b": EXPERTS | {"moe_intermediate_size": 768},
    "qwen3-235b-a22b": EXPERTS | {"moe_intermediate_size": 1536},
}
GROUP = 128
LEAST_VOCABULARY = 10000  # `bench latency` draws from so many tokens

Config = dict[str, Any]


def _butterfly(kind: str, wide: bool = False) -> Callable[[Config], Config]:
    def quantization(config: Config) -> Config:
        heads = config["num_attention_heads"]
        attention = heads * (config.get("head_dim") or config["hidden_size"] // heads)
        down = config.get("moe_intermediate_size", config["intermediate_size"])
        full = {"default": config["hidden_size"], "o_proj": attention, "down_proj": down}
        rotation = RotationConfig(kind, full if wide else {"default": GROUP})
        routers = ("mlp.gate",) if "num_experts" in config else ()
        return QuantConfig(2, GROUP, "midrise", rotation, modules_to_not_convert=("lm_head", *routers)).to_dict()

    return quantization


def _compressed_tensors(bits: int, hadamard: bool = False) -> Callable[[Config], Config]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    online = {"targets": ["Linear"], "location": "input", "ignore": ["lm_head"]}
    transform = {"config_groups": {"R": {"type": "hadamard", "head_dim": GROUP, "apply": [online]}}}
    return lambda config: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        **({"transform_config": transform} if hadamard else {}),
    }


# most important first: the quantization_config for a model's config
ROWS: dict[str, Callable[[Config], Config | None]] = {
    "fp16": lambda config: None,
    "butterfly-128": _butterfly("butterfly"),
    "hadamard-128": _butterfly("hadamard"),
    "vllm-w4": _compressed_tensors(4),
    "no-rotation": _butterfly("none"),
    "butterfly-128-norm": _butterfly("butterfly"),
    "butterfly-full": _butterfly("butterfly", wide=True),
    "hadamard-full": _butterfly("hadamard", wide=True),
    "vllm-hadamard-w2": _compressed_tensors(2, hadamard=True),
}
VARIABLES = {"butterfly-128-norm": {"BQ_VLLM_FUSE_NORM": "1"}}  # of the environment, by row
# may fail where vLLM or the machine lacks something; the other rows of ours may not
OTHERS = ("fp16", "vllm-w4", "butterfly-128-norm", "vllm-hadamard-w2")
CHECKPOINT = "checkpoint"  # the row of a model with weights


def read_config(model: str) -> tuple[Config, Path | None]:
    """config.json of the model, without quantization, and its folder if that holds weights.

    Raises:
        typer.BadParameter: if there is no such model, or its vocabulary is too small for the tools.
    """
    if model in SHAPES:
        config = dict(zip(SHAPE_NAMES, SHAPES[model], strict=True))
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
        if model in MIXTURES:
            kind |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | MIXTURES[model]
        return config | kind | {"dtype": "float16", "bos_token_id": 1, "eos_token_id": 2}, None
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        raise typer.BadParameter(f"{model}: neither one of {', '.join(SHAPES)} nor a config.json")
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    if config["vocab_size"] < LEAST_VOCABULARY:
        raise typer.BadParameter(
            f"{model}: `bench latency` draws from {LEAST_VOCABULARY:,} tokens, this vocabulary is smaller"
        )
    return config, path.parent if list(path.parent.glob("*.safetensors")) else None


def write_tokenizer(folder: Path, config: Config) -> Path:
    """Write a tokenizer whose words are its tokens' numbers, so that prompts have exactly the length asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps(config))  # vLLM looks for it beside a tokenizer
    return folder


def write_row(name: str, config: Config, checkpoint: Path | None, folder: Path) -> tuple[str, ...]:
    """Write the config of a row into its folder, if weights are to be dummies; returns the engine's flags for it."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == CHECKPOINT:
        return "--model", str(checkpoint)
    quantization = ROWS[name](config)
    full = config | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(full, indent=1))
    return "--model", str(folder), "--load-format", "dummy"
