"""Numeric parity on a real model: the checkpoint that `make demo` leaves, or the one that BQ_CHECKPOINT names."""

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tiny
import torch
from bq_calibration.compute import dtype_name, native_dtype

from .engine import environment, run_engines
from .test_engine import ask_server

CHECKPOINT = Path(os.environ.get("BQ_CHECKPOINT", "build/demo/SmolLM2-135M-bq2")).resolve()
TEXTS = ["The capital of France is", "Once upon a time, in a small village,"]
TOKENS = 8
NAMES = ("independent decode", "transformers, packed", "vLLM, dense")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these run vLLM's CPU build"),
    pytest.mark.skipif(not CHECKPOINT.exists(), reason=f"{CHECKPOINT} is not there: run make demo"),
]


def generate(model, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens and the logits that they were chosen from, float32 [TOKENS, vocabulary] a prompt."""
    tokens, logits = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits).float())
    return tokens, logits


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)(TEXTS).input_ids


@pytest.fixture(scope="module")
def answers(prompts, tmp_path_factory) -> dict[str, tuple[list[list[int]], list[torch.Tensor]]]:
    """Tokens and logits of three computations in float32 that share no decoding code with each other."""
    import bq_calibration.hf  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(CHECKPOINT)
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = dense.load_state_dict(tiny.decode(CHECKPOINT), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    dense.tie_weights()
    answers = {"independent decode": generate(dense, prompts), "transformers, packed": generate(packed, prompts)}
    job = {
        "model": str(CHECKPOINT),
        "prompts": prompts,
        "max_tokens": TOKENS,
        "options": {"skip_tokenizer_init": False},
    }
    folder = tmp_path_factory.mktemp("engine")
    (served,), _ = run_engines(folder, [job])
    answers["vLLM, dense"] = (
        [a["tokens"] for a in served["base"]],
        [torch.tensor(a["logprobs"]) for a in served["base"]],
    )
    return answers


@pytest.mark.parametrize(
    "pair", itertools.combinations(["independent decode", "transformers, packed", "vLLM, dense"], 2)
)
def test_same_greedy_tokens(pair, answers):
    first, second = (answers[name][0] for name in pair)
    assert first == second, f"{pair[0]} and {pair[1]} differ"


def test_logits(answers):
    wanted, found = (answers[name][1] for name in ("independent decode", "transformers, packed"))
    for one, other in zip(wanted, found, strict=True):
        # 30 layers of float32 sums in another order; 1e-4 of the range of the logits
        assert (one - other).abs().max() < 1e-4 * one.abs().max()
    for logits, logprobs in zip(wanted, answers["vLLM, dense"][1], strict=True):
        # vLLM's attention on the CPU itself stays within 0.05 of transformers
        assert (logits.log_softmax(-1).amax(-1) - logprobs).abs().max() < 0.05


def test_perplexity_is_the_same_in_vllm(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "parity.py"
    text, scores = tmp_path / "text.txt", tmp_path / "scores.json"
    text.write_text("\n\n".join(text for _, text in sorted(topics.items())[:40]))
    call = [sys.executable, script, CHECKPOINT, "--perplexity", text, "--json", scores]
    call += ["--context", 512, "--windows", 4]
    done = subprocess.run([str(part) for part in call], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(scores.read_text())
    assert found["windows"] == 4
    # both in the dtype that this CPU multiplies natively: sums in another order, no bias
    assert abs(found["vllm"] / found["value"] - 1) < 0.005


def test_sixteen_clients_get_the_text_of_offline_generation(answers, prompts, tmp_path):
    wanted = list(itertools.islice(itertools.cycle(answers["vLLM, dense"][0]), 16))
    requests = list(itertools.islice(itertools.cycle(prompts), 16))
    flags = ("--max-model-len", "256", "--enforce-eager")
    assert ask_server(tmp_path, CHECKPOINT, requests, TOKENS, *flags) == wanted


def test_offline_example(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "offline_batch.py"
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [TEXTS[0], "word " * 400, TEXTS[1]]
    source.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(prompts)))
    dtype = dtype_name(native_dtype(torch.bfloat16, "cpu"))
    call = [sys.executable, script, CHECKPOINT, source, target, "--max-tokens", 4, "--eager", "--max-model-len", 256]
    call = [str(part) for part in (*call, "--dtype", dtype)]
    run = {"env": environment(tmp_path), "capture_output": True, "text": True, "timeout": 600, "check": False}
    done = subprocess.run(call, **run)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(line["prompt"], line["id"]) for line in lines] == [(text, i) for i, text in enumerate(prompts)]
    assert lines[0]["text"] and lines[2]["text"]
    assert "text" not in lines[1] and "the model takes 1 to 255" in lines[1]["error"]
    assert "1 of 3 prompts were too long or empty" in done.stderr
