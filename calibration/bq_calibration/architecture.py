"""The only per-model knowledge: which linear layers of a decoder block read the same input."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:  # commands read the flags before they load torch and transformers
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a decoder block that read one input and so share one rotation.

    Attributes:
        layers: their names inside the block. In the table below `*` stands for the number of an expert.
        row_parallel: whether tensor parallelism cuts this input over the GPUs, so that a rotation block must lie
            inside a shard.
        experts: of a mixture, each of which has as many of these layers, one expert's after the other's, and reads only
            the tokens that are routed to it; 0 where all layers read all tokens.
    """

    layers: tuple[str, ...]
    row_parallel: bool
    experts: int = 0

    @property
    def name(self) -> str:
        """Short name for reports: `q_proj,k_proj,v_proj`, `experts.down_proj`."""
        names = dict.fromkeys(layer.rsplit(".", 1)[-1] for layer in self.layers)
        return ("experts." if self.experts else "") + ",".join(names)

    def parts(self) -> tuple[InputGroup, ...]:
        """The layers of each expert as a group of their own; the group itself where there are none."""
        if not self.experts:
            return (self,)
        count = len(self.layers) // self.experts
        cuts = range(0, len(self.layers), count)
        return tuple(InputGroup(self.layers[i : i + count], self.row_parallel) for i in cuts)

    def of_experts(self, modules: Mapping[str, nn.Module]) -> InputGroup:
        """The group in a decoder layer with these modules: `*` replaced by the numbers of experts, if it has any."""
        stacked = modules.get(self.layers[0].partition(".*.")[0])
        if "*" not in self.layers[0] or stacked is None:
            return self
        layers = tuple(layer.replace("*", str(expert)) for expert in range(len(stacked)) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, experts=len(stacked))


# what a decoder layer is put together of; groups stand in the order in which it computes them
Groups = tuple[InputGroup, ...]
_ATTENTION: Groups = (
    InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), row_parallel=False),
    InputGroup(("self_attn.o_proj",), row_parallel=True),
)
_FUSED: Groups = (
    InputGroup(("self_attn.qkv_proj",), row_parallel=False),
    InputGroup(("self_attn.o_proj",), row_parallel=True),
    InputGroup(("mlp.gate_up_proj",), row_parallel=False),
    InputGroup(("mlp.down_proj",), row_parallel=True),
)
# multi-head latent attention: queries, keys and values behind low-rank layers; small models have the queries directly
_LATENT: Groups = (
    InputGroup(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), row_parallel=False),
    InputGroup(("self_attn.q_b_proj",), row_parallel=False),
    InputGroup(("self_attn.kv_b_proj",), row_parallel=False),
    InputGroup(("self_attn.o_proj",), row_parallel=True),
)
_LATENT_KEYS: Groups = (
    InputGroup(("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), row_parallel=False),
    *_LATENT[2:],
)


def _experts(module: str = "mlp.experts", names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Groups:
    """Experts as the model's files call them, and their gate, up and down."""
    gate, up, down = names
    return (
        InputGroup((f"{module}.*.{gate}", f"{module}.*.{up}"), row_parallel=False),
        InputGroup((f"{module}.*.{down}",), row_parallel=True),
    )


def _feed_forward(module: str) -> Groups:
    """An MLP of that name, or an expert that reads all tokens."""
    return (
        InputGroup((f"{module}.gate_proj", f"{module}.up_proj"), row_parallel=False),
        InputGroup((f"{module}.down_proj",), row_parallel=True),
    )


_DENSE = (_ATTENTION + _feed_forward("mlp"),)
_MIXTURE = (_ATTENTION + _experts(), *_DENSE)  # the config may leave out the experts of some layers
_DEEPSEEK = tuple(
    attention + rest
    for attention in (_LATENT, _LATENT_KEYS)
    for rest in (_experts() + _feed_forward("mlp.shared_experts"), _feed_forward("mlp"))
)

# model_type of config.json -> the kinds of decoder layers that the model may have; routers stay as they are
ARCHITECTURES: dict[str, tuple[Groups, ...]] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE,
    "gemma3_text": _DENSE,
    "phi3": (_FUSED,),
    # mixtures of experts
    "mixtral": (_ATTENTION + _experts("block_sparse_moe.experts", ("w1", "w3", "w2")),),
    "olmoe": _MIXTURE,
    "qwen2_moe": (_ATTENTION + _experts() + _feed_forward("mlp.shared_expert"), *_DENSE),
    "qwen3_moe": _MIXTURE,
    "gpt_oss": (_ATTENTION + _experts(),),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    # multimodal: layers of the text decoder
    "gemma3": _DENSE,
    "mistral3": _DENSE,
    "qwen2_5_vl": _DENSE,
    "qwen3_vl": _DENSE,
}
# those of them whose files hold one tensor for all experts: here each has layers of its own, called as in other models
STACKED = ("gpt_oss",)
# those of them whose embedding or LM head vLLM holds in 16 bits, whatever a checkpoint's config says
UNPACKED_IN_VLLM = {"mixtral": ("embed_tokens",), "gpt_oss": ("embed_tokens", "lm_head")}
# those of them that take pictures: the text decoder is quantized, vision tower and projector stay as they are
MULTIMODAL = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl")


def check_architecture(model_type: object) -> None:
    """Refuse an architecture that is not in the table.

    Raises:
        UserError: naming those that are.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"architecture {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}. "
            "A LLaMA-like model needs one line in bq_calibration/architecture.py."
        )


def expert_layers(model_type: str) -> tuple[str, tuple[str, str, str]] | None:
    """Experts as the model's files call them: their module in a decoder layer, and an expert's gate, up and down.

    None for an architecture without experts.
    """
    names = [layer for groups in ARCHITECTURES.get(model_type, ()) for group in groups for layer in group.layers]
    found = dict.fromkeys(name for name in names if "*" in name)
    if not found:
        return None
    gate, up, down = (name.rsplit(".", 1)[-1] for name in found)
    return next(iter(found)).partition(".*.")[0], (gate, up, down)


def input_groups(model: PreTrainedModel) -> list[Groups]:
    """Input groups of every decoder layer of a model, which may be empty.

    Raises:
        UserError: if the architecture is not in the table, or a layer is of no kind that is known of it.
    """
    kind = model.config.model_type
    check_architecture(kind)
    return [_groups_of(layer, kind, index) for index, layer in enumerate(model.get_decoder().layers)]


def other_matrices(layer: nn.Module, groups: Groups) -> tuple[str, ...]:
    """Names of modules of a decoder layer with a matrix that belong to no group: routers, which stay unquantized."""
    packed = {name for group in groups for name in group.layers}
    matrices = (name.removesuffix(".weight") for name, p in layer.named_parameters() if p.dim() == 2)
    return tuple(name for name in matrices if name not in packed)


def _groups_of(layer: nn.Module, model_type: str, index: int) -> Groups:
    there, missing = dict(layer.named_modules()), []
    for groups in ARCHITECTURES[model_type]:
        groups = tuple(group.of_experts(there) for group in groups)
        absent = [name for group in groups for name in group.layers if name not in there]
        if not absent:
            return groups
        missing.append(absent[0])
    raise UserError(f"decoder layer {index} of a {model_type} model has no {' and no '.join(dict.fromkeys(missing))}")
