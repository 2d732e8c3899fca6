"""Tiny models of every supported architecture, with a tokenizer and text, all made here."""

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
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=32),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
}
WORDS = [f"w{n}" for n in range(100)]


def make_text(words: int, seed: int = 0) -> str:
    """Words drawn from a skewed distribution: not uniform, so that a model and a Hessian have something to see."""
    chooser = random.Random(seed)
    return " ".join(WORDS[min(int(chooser.expovariate(0.08)), 99)] for _ in range(words))


def make_model(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model with weights large enough that its outputs depend on its inputs."""
    from tokenizers import Tokenizer, models
    from tokenizers.pre_tokenizers import ByteLevel

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5 if "embed" in name else 0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    # byte-level BPE without merges: transformers rebuilds the tokenizers of some architectures as just that
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


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
