"""The parity matrix: its factors, their values, and what is refused. Everything else follows from this table."""

from __future__ import annotations

from dataclasses import dataclass

from .pairwise import Case, by_new_pairs, covering

OFF, ON = "off", "on"
LATENT = ("deepseek_v2", "deepseek_v3")  # with multi-head latent attention
MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", *LATENT, "gpt_oss")
FACTORS: dict[str, tuple] = {  # the first value of each is the one that most cases have
    "architecture": (
        *("llama", "llama, tied head", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"),
        *("gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3"),  # text decoders of multimodal models
        *MIXTURES,
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
        ignored: whether there is no error, but a line that says so, and the values have no effect.
    """

    values: dict[str, object]
    by: str
    message: str
    ignored: bool = False


SHARDS = ("the plugin", "tensor parallel size 2 would cut")
GEMMA_FLOAT16 = ("vLLM", "does not support float16")
SAME_BITS = ("bq-calibrate", "a mixture of experts has the same bits everywhere")
ITS_HEAD = ("bq-calibrate", "vLLM's GptOssForCausalLM keeps lm_head in 16 bits")
# without quantization too, wherever the adapters are: its experts then run in Triton
ADAPTERS = ("vLLM's CPU build", "module 'triton.language' has no attribute 'float32'")
ONE_PREFILL = ("vLLM's CPU build", "forcing chunked prefill and prefix caching to be disabled")
REFUSALS = (
    Refusal({"rotation": "full width", "tensor parallel": 2}, *SHARDS),
    Refusal({"group": 128, "tensor parallel": 2}, *SHARDS),  # of 128 features
    Refusal({"architecture": "gemma3_text", "dtype": "float16"}, *GEMMA_FLOAT16),
    Refusal({"architecture": "gemma3", "dtype": "float16"}, *GEMMA_FLOAT16),
    Refusal({"sleep mode": ON}, "vLLM's CPU build", "Sleep mode is not supported on current platform"),
    Refusal({"architecture": "gpt_oss", "head bits": 4}, *ITS_HEAD),
    *(Refusal({"architecture": name, "bits": "mixed"}, *SAME_BITS) for name in MIXTURES),
    *(Refusal({"architecture": name, "LoRA": ON}, *ADAPTERS) for name in MIXTURES),
    *(Refusal({"architecture": name, "prefix caching": ON}, *ONE_PREFILL, True) for name in LATENT),
    *(Refusal({"architecture": name, "chunked prefill": ON}, *ONE_PREFILL, True) for name in LATENT),
)


def default_case() -> Case:
    """The first value of every factor."""
    return {name: values[0] for name, values in FACTORS.items()}


EXCLUDED = [refusal.values for refusal in REFUSALS]


def cases() -> list[Case]:
    """All cases of the matrix; the first ones have most pairs of values."""
    return by_new_pairs(covering(FACTORS, EXCLUDED))
