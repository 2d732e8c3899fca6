"""Tiny checkpoints in the formats of other packages, packed by hand from their published layouts, and what they mean.

Nothing here uses bq_kernels or bq_calibration.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from .conftest import EXPERTS, SIZES, make_model

WIDTH = 256  # of hidden states and of the MLP: TQ1_0 has groups of 256
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
Table = dict[str, torch.Tensor]


@dataclass
class Layer:
    """A quantized linear layer: codes [N, K], scales and zeros [N, G]; W = s·(q − z)."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def weight(self) -> torch.Tensor:
        """float64 [N, K]: exact."""
        spread = [values.double().repeat_interleave(self.group, dim=1) for values in (self.scales, self.zeros)]
        return spread[0] * (self.codes.double() - spread[1])


def base_model(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float16) -> Path:
    """A random 16-bit model: one layer, two key/value heads for four heads."""
    sizes = SIZES | dict(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False)
    configs = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "qwen3_moe": functools.partial(transformers.Qwen3MoeConfig, **EXPERTS, moe_intermediate_size=64),
        "mixtral": functools.partial(transformers.MixtralConfig, **EXPERTS),
    }
    return make_model(folder, architecture, dtype, configs[architecture](**sizes))


def random_layers(model: Path, bits: int, group: int, symmetric: bool = False, seed: int = 0) -> dict[str, Layer]:
    """Random codes, float16 scales and integer zero points for every linear layer of a model."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.startswith("model.layers.") and weight.dim() == 2 and not name.endswith(".gate.weight"):  # a router
            rows, columns = weight.shape
            shape = rows, columns // group
            codes = torch.randint(0, 2**bits, (rows, columns), generator=g)
            scales = (0.02 + 0.04 * torch.rand(shape, generator=g)).half()
            zeros = torch.randint(1, 2**bits, shape, generator=g)
            layers[name.removesuffix(".weight")] = Layer(
                codes, scales, torch.full(shape, 2 ** (bits - 1)) if symmetric else zeros, bits
            )
    return layers


def write(
    model: Path, out: Path, layers: dict[str, Layer], pack: Callable[[Layer], Table], config: dict | None
) -> Path:
    """A copy of a model with packed tensors in place of the weights of some layers."""
    out.mkdir()
    tensors = load_file(model / "model.safetensors")
    for name, layer in layers.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in pack(layer).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (out / file.name).write_bytes(file.read_bytes())
    own = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(own | ({"quantization_config": config} if config else {})))
    return out


# ---- words, from bit streams written as Python integers


def streams(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C·bits/32]: every row as one number, the first code in its lowest bits."""
    words = codes.shape[1] * bits // 32
    rows = [sum(code << (bits * i) for i, code in enumerate(row)) for row in codes.tolist()]
    return to_int32([[row >> (32 * i) & 0xFFFFFFFF for i in range(words)] for row in rows])


def whole_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, ⌈C / (32 // bits)⌉]: as many whole codes per word as fit."""
    per_word = 32 // bits
    return to_int32(
        [
            [
                sum(code << (bits * i) for i, code in enumerate(row[begin : begin + per_word]))
                for begin in range(0, len(row), per_word)
            ]
            for row in codes.tolist()
        ]
    )


def to_int32(words: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


# ---- packers


def dense(layer: Layer) -> Table:
    """Not packed: the weight itself."""
    return {"weight": layer.weight().float()}


def gptq(offset: int) -> Callable[[Layer], Table]:
    """GPTQ with zero points stored less `offset`."""

    def pack(layer: Layer) -> Table:
        return {
            "qweight": streams(layer.codes, layer.bits).t(),
            "qzeros": streams(layer.zeros.t() - offset, layer.bits),
            "scales": layer.scales.t(),
            "g_idx": torch.arange(layer.codes.shape[1], dtype=torch.int32) // layer.group,
        }

    return pack


def efficientqat(layer: Layer) -> Table:
    return {
        "qweight": whole_words(layer.codes, layer.bits).t(),
        "qzeros": whole_words(layer.zeros.t(), layer.bits),
        "scales": layer.scales.t(),
        "g_idx": torch.arange(layer.codes.shape[1], dtype=torch.int32) // layer.group,
    }


def awq(layer: Layer) -> Table:
    def pack(values: torch.Tensor) -> torch.Tensor:  # [R, N]: eight neighbours per word, even ones in the lower half
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return whole_words(values.reshape(len(values), -1, 8)[..., order].flatten(1), 4)

    return {"qweight": pack(layer.codes.t()), "qzeros": pack(layer.zeros.t()), "scales": layer.scales.t()}


def compressed(words: Callable = whole_words) -> Callable[[Layer], Table]:
    """compressed-tensors: `whole_words` or, in newer versions, `streams`."""

    def pack(layer: Layer) -> Table:
        tensors = {
            "weight_packed": words(layer.codes, layer.bits),
            "weight_scale": layer.scales,
            "weight_shape": torch.tensor(layer.codes.shape),
        }
        if bool((layer.zeros != 2 ** (layer.bits - 1)).any()):
            tensors["weight_zero_point"] = words(layer.zeros.t(), layer.bits).t()
        return tensors

    return pack


def compressed_config(bits: int, group: int, symmetric: bool) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


# ---- GGUF: blocks by hand; element order as in llama.cpp's dequantize_row_*


def half_bytes(scales: torch.Tensor) -> np.ndarray:
    return scales.half().numpy().reshape(-1, 1).view(np.uint8)


def base3(codes: np.ndarray, places: list[list[int]]) -> np.ndarray:
    """A byte per list of places: its digits, the first the most significant of five, as ⌈256·number / 243⌉."""
    columns = []
    for place in places:
        digits = [codes[:, p].astype(int) for p in place] + [0] * (5 - len(place))
        number = sum(digit * 3 ** (4 - n) for n, digit in enumerate(digits))
        columns.append((number * 256 + 242) // 243)
    return np.stack(columns, axis=1).astype(np.uint8)


def q2_0(codes: np.ndarray, scales: torch.Tensor) -> np.ndarray:
    quads = codes.reshape(len(codes), -1, 4).astype(np.uint8)
    data = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return np.concatenate([half_bytes(scales), data], axis=1)


def ptq1_0(codes: np.ndarray, scales: torch.Tensor) -> np.ndarray:
    places = [[16 * n + m for n in range(5)] for m in range(16)]
    places += [[80 + 8 * n + m for n in range(5)] for m in range(8)]
    places += [[120 + 2 * n + m for n in range(4)] for m in range(2)]
    return np.concatenate([base3(codes, places), half_bytes(scales)], axis=1)


def q1_0(codes: np.ndarray, scales: torch.Tensor) -> np.ndarray:
    """Codes 1 and 2 of mid-rise levels: −d and d with d half of the step."""
    data = np.packbits((codes - 1).astype(np.uint8), axis=1, bitorder="little")
    return np.concatenate([half_bytes(scales / 2), data], axis=1)


# name -> type id, group, zero, largest code, packer; None: the package `gguf` packs the dense weight itself
GGUF_TYPES = {
    "Q4_0": (2, 32, 8, 15, None),
    "TQ1_0": (34, 256, 1, 2, None),
    "TQ2_0": (35, 256, 1, 2, None),
    "Q1_0": (41, 128, 1.5, 2, q1_0),
    "Q2_0": (42, 64, 1, 3, q2_0),
    "PQ2_0": (142, 128, 1, 3, q2_0),
    "PTQ1_0": (143, 128, 1, 2, ptq1_0),
}


def gguf_layers(model: Path, kind: str) -> dict[str, Layer]:
    """Random layers that a GGUF type holds; a block of Q4_0 and of a ternary type has its largest level somewhere."""
    _, group, zero, largest, _ = GGUF_TYPES[kind]
    layers = random_layers(model, 4 if kind == "Q4_0" else 2, group)
    for number, layer in enumerate(layers.values()):
        g = torch.Generator().manual_seed(number)
        layer.codes = torch.randint(1 if kind == "Q1_0" else 0, largest + 1, layer.codes.shape, generator=g)
        layer.codes[:, ::group] = 0  # −8·d, or −d: from it the package takes the scale
        layer.zeros = torch.full_like(layer.scales, zero)
        if kind == "Q1_0":
            layer.codes[:, ::group] = 1
        if kind == "Q4_0":
            layer.scales *= torch.where(torch.rand(layer.scales.shape, generator=g) < 0.5, -1, 1)
    return layers


def interleave(weight: np.ndarray, heads: int | None) -> np.ndarray:
    """Rows of a head as llama.cpp's converter orders them for architecture llama: (0, d/2), (1, d/2 + 1), …."""
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: Path, file: Path, layers: dict[str, Layer], kind: str | int, extra: Callable | None = None
) -> Path:
    """A GGUF file with the metadata of a model, its layers in blocks of one type, all else in float32."""
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize

    config = transformers.AutoConfig.from_pretrained(model)
    architecture = config.model_type
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, model)
    if extra:
        extra(writer)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    type_id, group, _, _, packer = GGUF_TYPES[kind]
    for name, tensor in load_file(model / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        place = f"{names.get_name(module)}.{suffix}"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(module.split(".")[-1]) if architecture == "llama" else None
        order = functools.partial(interleave, heads=count)
        if (layer := layers.get(module)) is None:
            writer.add_tensor(place, order(tensor.float().numpy()))
        elif packer is None:
            data = quantize(order(layer.weight().float().numpy()), GGMLQuantizationType(type_id))
            writer.add_tensor(place, data, raw_dtype=GGMLQuantizationType(type_id))
        else:
            codes, scales = order(layer.codes.numpy()), torch.from_numpy(order(layer.scales.numpy()))
            blocks = packer(codes.reshape(-1, group), scales).reshape(len(codes), -1)
            add_unknown(writer, place, np.ascontiguousarray(blocks), type_id, layer.codes.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_unknown(writer, name: str, data: np.ndarray, type_id: int, shape: torch.Size) -> None:
    """Add a tensor whose type the package may not know: its record is what the writer makes of any tensor."""
    from gguf.gguf_writer import TensorInfo

    writer.tensors[-1][name] = TensorInfo(shape=tuple(shape), dtype=type_id, nbytes=data.nbytes, tensor=data)


def yarn():
    from gguf import RopeScalingType

    return RopeScalingType.YARN


def add_tokenizer(writer, model: Path) -> None:
    """The tokenizer of a tiny model, byte-level BPE."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "ab"])
    writer.add_token_merges(["a b"])  # GGUF has no tokenizer without merges
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    writer.add_unk_token_id(vocabulary["<unk>"])
