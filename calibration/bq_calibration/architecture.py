"""The only per-model knowledge: which linear layers of a decoder block read the same input."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a decoder block that read one input and so share one rotation.

    `row_parallel` says that tensor parallelism cuts this input over the GPUs, so that a rotation block must lie
    inside a shard.
    """

    layers: tuple[str, ...]
    row_parallel: bool

    @property
    def name(self) -> str:
        """Short name for reports: `q_proj,k_proj,v_proj`."""
        return ",".join(layer.rsplit(".", 1)[-1] for layer in self.layers)


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

# model_type of config.json -> groups, in the order in which a block computes them
ARCHITECTURES: dict[str, tuple[InputGroup, ...]] = {
    "llama": _SEPARATE,
    "mistral": _SEPARATE,
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "gemma3_text": _SEPARATE,
    "phi3": _FUSED,
    # multimodal: groups of the text decoder's blocks
    "gemma3": _SEPARATE,
    "mistral3": _SEPARATE,
    "qwen2_5_vl": _SEPARATE,
    "qwen3_vl": _SEPARATE,
}
# those of them that take pictures: the text decoder is quantized, vision tower and projector stay as they are
MULTIMODAL = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl")


def input_groups(model_type: object) -> tuple[InputGroup, ...]:
    """Input groups of a decoder block of this architecture.

    Raises:
        UserError: if the architecture is not in the table.
    """
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"architecture {model_type!r} is not supported; supported are {', '.join(ARCHITECTURES)}. "
            "A LLaMA-like model needs one line in bq_calibration/architecture.py."
        )
    return ARCHITECTURES[model_type]
