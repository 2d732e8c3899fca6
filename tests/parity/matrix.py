"""The parity matrix: its factors, their values, and what is refused. Everything else follows from this table."""

from __future__ import annotations

from dataclasses import dataclass

from .pairwise import Case, by_new_pairs, covering

OFF, ON = "off", "on"
FACTORS: dict[str, tuple] = {  # the first value of each is the one that most cases have
    "architecture": (
        *("llama", "llama, tied head", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"),
        *("gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3"),  # text decoders of multimodal models
    ),
    "bits": (2, 3, 4, "mixed"),
    "group": (64, 32, 128, "per channel"),
    "zero point": ("midrise", "float"),
    "rotation": ("blocks of 64", "full width", "Hadamard, blocks of 64", "none"),
    "head bits": (16, 4),
    "dtype": ("float32", "bfloat16", "float16"),
    "tensor parallel": (1, 2),
    "LoRA": (OFF, ON),
    "reload_weights": (OFF, ON),
    "prefix caching": (OFF, ON),
    "chunked prefill": (OFF, ON),
    "n-gram speculation": (OFF, ON),
    "sleep mode": (OFF, ON),
}


@dataclass(frozen=True)
class Refusal:
    """Values that do not go together.

    Attributes:
        values: by factor.
        by: who refuses them.
        message: a part of the error's text.
    """

    values: dict[str, object]
    by: str
    message: str


SHARDS = ("the plugin", "tensor parallel size 2 would cut")
GEMMA_FLOAT16 = ("vLLM", "does not support float16")
REFUSALS = (
    Refusal({"rotation": "full width", "tensor parallel": 2}, *SHARDS),
    Refusal({"group": 128, "tensor parallel": 2}, *SHARDS),  # of 128 features
    Refusal({"architecture": "gemma3_text", "dtype": "float16"}, *GEMMA_FLOAT16),
    Refusal({"architecture": "gemma3", "dtype": "float16"}, *GEMMA_FLOAT16),
    Refusal({"sleep mode": ON}, "vLLM's CPU build", "Sleep mode is not supported on current platform"),
)


def default_case() -> Case:
    """The first value of every factor."""
    return {name: values[0] for name, values in FACTORS.items()}


EXCLUDED = [refusal.values for refusal in REFUSALS]


def cases() -> list[Case]:
    """All cases of the matrix; the first ones have most pairs of values."""
    return by_new_pairs(covering(FACTORS, EXCLUDED))
