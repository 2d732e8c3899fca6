"""Scripts run as users run them, and a tiny model with tokens for the benchmarks of accuracy."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script below benchmarks/ to its end, with further environment variables."""

    def start(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        call = [str(part) for part in (sys.executable, BENCHMARKS / script, *arguments)]
        environment = os.environ | variables
        return subprocess.run(call, capture_output=True, text=True, timeout=300, check=False, env=environment)

    return start


@pytest.fixture(scope="session")
def run(start) -> Callable[..., str]:
    """The same for a script that succeeds; gives what it printed."""

    def run(script: str, *arguments: object, **variables: str) -> str:
        done = start(script, *arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A tiny Llama whose inputs have outlier channels, with heads that share values."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,  # 32·3: not a power of two
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(torch.rand(96) + 0.5)
                parameter[::7] *= 6
            else:
                parameter.normal_()
                parameter.copy_(
                    0.5 * parameter if "embed" in name else 0.1 * parameter * parameter.abs()
                )  # tails to clip
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    vocabulary = {f"t{n}": n for n in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Tokens of a skewed distribution."""
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    torch.manual_seed(0)
    rows = torch.randint(0, 64, (16, 64)).minimum(torch.randint(0, 64, (16, 64)))
    save_file({"tokens": rows, "train_tokens": rows.clone()}, file)
    return file
