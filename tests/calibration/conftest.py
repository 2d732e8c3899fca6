"""Tiny models of every supported architecture, with a tokenizer and text, all made here."""

import json
import random
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=320,
    hidden_size=96,  # 2⁵·3: odd factor in a full-width rotation
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
EXPERTS = dict(num_experts=6, num_experts_per_tok=2)
LATENT = dict(  # the first layer is dense
    q_lora_rank=64,
    kv_lora_rank=512,  # with the 64 below the only size of latent attention that vLLM computes on a CPU
    qk_nope_head_dim=32,
    qk_rope_head_dim=64,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=32),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES | dict(intermediate_size=64), num_local_experts=6, num_experts_per_tok=2
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES | dict(intermediate_size=64), **EXPERTS),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **EXPERTS, moe_intermediate_size=64, shared_expert_intermediate_size=128, mlp_only_layers=[0]
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=64, head_dim=32),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES | dict(intermediate_size=64),
        num_local_experts=6,
        num_experts_per_tok=2,
        head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **SIZES, **LATENT | dict(q_lora_rank=None), topk_method="group_limited_greedy"
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SIZES, **LATENT, topk_method="noaux_tc", scoring_func="sigmoid"
    ),
}
# multimodal models: a picture of 32 x 32 pixels is 4 x 4 patches, of which 2 x 2 each become a token
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
VISION = dict(hidden_size=64, intermediate_size=96, patch_size=8)
SIGLIP = VISION | dict(num_hidden_layers=2, num_attention_heads=2, image_size=32)
QWEN_VISION = VISION | dict(depth=2, num_heads=2, out_hidden_size=SIZES["hidden_size"])
QWEN_TOKENS = dict(vision_start_token_id=259, vision_end_token_id=260, image_token_id=261, video_token_id=262)
MULTIMODAL_CONFIGS = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=CONFIGS["gemma3_text"](),
        vision_config=SIGLIP | dict(vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=259,
        eoi_token_index=260,
        image_token_index=261,
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=SIZES | dict(rope_parameters=MROPE),
        vision_config=QWEN_VISION | dict(window_size=32, fullatt_block_indexes=[1]),
        **QWEN_TOKENS,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config=SIZES | dict(rope_parameters=MROPE | dict(mrope_interleaved=True), head_dim=32),
        vision_config=QWEN_VISION | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
        **QWEN_TOKENS,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=SIZES | dict(model_type="mistral", sliding_window=None),
        vision_config=SIGLIP | dict(model_type="pixtral", head_dim=32),
        image_token_index=259,
        tie_word_embeddings=False,
    ),
}
QWEN_MEDIA = dict(start="<|vision_start|>", end="<|vision_end|>", image_token="<|image_pad|>", video="<|video_pad|>")
MEDIA_TOKENS = {  # from 259 on
    "gemma3": dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    | {f"newline_{n}": "\n" * n for n in (1, 2, 3, 4)},  # its processor puts some around a picture
    "qwen2_5_vl": QWEN_MEDIA,
    "qwen3_vl": QWEN_MEDIA,
    "mistral3": dict(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"),
}
QWEN_PROCESSOR = dict(patch_size=8, merge_size=2, temporal_patch_size=2)
PROCESSORS = {  # files of a multimodal model, beside those of its tokenizer
    "gemma3": {
        "preprocessor_config": dict(
            image_processor_type="Gemma3ImageProcessor",
            size=dict(height=32, width=32),
            processor_class="Gemma3Processor",
        ),
        "processor_config": dict(processor_class="Gemma3Processor", image_seq_length=4),
    },
    "qwen2_5_vl": {
        "preprocessor_config": QWEN_PROCESSOR
        | dict(image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2_5_VLProcessor")
        | dict(min_pixels=256, max_pixels=1024),
    },
    "qwen3_vl": {
        "preprocessor_config": QWEN_PROCESSOR
        | dict(image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen3VLProcessor")
        | dict(size=dict(shortest_edge=256, longest_edge=1024)),
        "video_preprocessor_config": QWEN_PROCESSOR
        | dict(video_processor_type="Qwen3VLVideoProcessor", processor_class="Qwen3VLProcessor")
        | dict(size=dict(shortest_edge=256, longest_edge=4096)),
    },
    "mistral3": {
        "preprocessor_config": dict(
            image_processor_type="PixtralImageProcessor", patch_size=8, size=dict(longest_edge=32)
        ),
        "processor_config": dict(processor_class="PixtralProcessor", patch_size=8, spatial_merge_size=2)
        | MEDIA_TOKENS["mistral3"],
    },
}
WORDS = [f"w{n}" for n in range(100)]


def make_text(words: int, seed: int = 0) -> str:
    """Words drawn from a skewed distribution: not uniform, so that a model and a Hessian have something to see."""
    chooser = random.Random(seed)
    return " ".join(WORDS[min(int(chooser.expovariate(0.08)), 99)] for _ in range(words))


def make_model(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, config=None) -> Path:
    """Write a random model with weights large enough that its outputs depend on its inputs."""
    torch.manual_seed(0)
    config = config or (CONFIGS | MULTIMODAL_CONFIGS)[architecture]()
    kind = "ImageTextToText" if architecture in MULTIMODAL_CONFIGS else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=dtype)
    with torch.no_grad():
        routers = [(name, bias) for name, bias in model.named_buffers() if name.endswith("correction_bias")]
        for name, parameter in [*model.named_parameters(), *routers]:
            if parameter.dim() == 2 or name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
                parameter.normal_(std=0.5 if "embed" in name else 0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder, MEDIA_TOKENS.get(architecture, {}))
    for name, settings in PROCESSORS.get(architecture, {}).items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return folder


def save_tokenizer(folder: Path, media_tokens: dict | None = None) -> None:
    """Write a tokenizer of bytes, and of tokens from 259 on for what is not text."""
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel

    # byte-level BPE without merges: transformers rebuilds the tokenizers of some architectures as just that
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=media_tokens or {},
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(2000))
    return path
