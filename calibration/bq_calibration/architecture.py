"""The only per-model knowledge: which linear layers of a decoder block read the same input."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:  # commands read the flags before they load transformers
    from transformers import PreTrainedConfig


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

    def of_experts(self, experts: int) -> InputGroup:
        """The group of a model with so many experts: `*` replaced by their numbers."""
        if "*" not in self.layers[0]:
            return self
        layers = tuple(layer.replace("*", str(expert)) for expert in range(experts) for layer in self.layers)
        return dataclasses.replace(self, layers=layers, experts=experts)


_SEPARATE = (
    InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), row_parallel=False),
    InputGroup(("self_attn.o_proj",), row_parallel=True),
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), row_parallel=False),
    InputGroup(("mlp.down_proj",), row_parallel=True),
)
_FUSED = (
    InputGroup(("self_attn.qkv_proj",), row_parallel=False),
    InputGroup(("self_attn.o_proj",), row_parallel=True),
    InputGroup(("mlp.gate_up_proj",), row_parallel=False),
    InputGroup(("mlp.down_proj",), row_parallel=True),
)
_EXPERTS = (
    *_SEPARATE[:2],
    InputGroup(("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), row_parallel=False),
    InputGroup(("mlp.experts.*.down_proj",), row_parallel=True),
)
_SHARED_EXPERT = (
    InputGroup(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), row_parallel=False),
    InputGroup(("mlp.shared_expert.down_proj",), row_parallel=True),
)

# model_type of config.json -> groups, in the order in which a block computes them
ARCHITECTURES: dict[str, tuple[InputGroup, ...]] = {
    "llama": _SEPARATE,
    "mistral": _SEPARATE,
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "gemma3_text": _SEPARATE,
    "phi3": _FUSED,
    # mixtures of experts; routers stay as they are
    "olmoe": _EXPERTS,
    "qwen2_moe": (*_EXPERTS, *_SHARED_EXPERT),
    "qwen3_moe": _EXPERTS,
    # multimodal: groups of the text decoder's blocks
    "gemma3": _SEPARATE,
    "mistral3": _SEPARATE,
    "qwen2_5_vl": _SEPARATE,
    "qwen3_vl": _SEPARATE,
}
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


def input_groups(config: PreTrainedConfig) -> tuple[InputGroup, ...]:
    """Input groups of a decoder block of the model of a config.

    Raises:
        UserError: if the architecture is not in the table.
    """
    check_architecture(config.model_type)
    experts = getattr(config.get_text_config(), "num_experts", 0)
    return tuple(group.of_experts(experts) for group in ARCHITECTURES[config.model_type])
