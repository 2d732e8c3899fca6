"""Whole engines on the CPU against transformers running the independently decoded dense model."""

import contextlib
import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch

from .engine import ONE_PROCESS, PROMPTS, TOKENS, environment, run_engines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these run vLLM's CPU build"),
]

VARIANTS = {
    "3 bits, zeros, bias": {"bits": 3, "zero_point": "float", "group_size": 64},
    "4 bits, hadamard, full width": {
        "bits": 4,
        "kind": "hadamard",
        "block_size": {"default": 128, "down_proj": 192},
        "group_size": 64,
    },
    "mixed bits": {
        "module_bits": {
            "model.layers.0.mlp.down_proj": 3,
            **{f"model.layers.1.self_attn.{name}_proj": 4 for name in "qkv"},
        },
    },
    "one scale per row, no rotation, o_proj skipped": {
        "group_size": -1,
        "kind": "none",
        "skip": ("lm_head", "o_proj"),
    },
    "embedding and head packed": {
        "skip": (),
        "zero_point": "float",
        "module_bits": {"model.embed_tokens": 4, "lm_head": 3},
    },
    "tied, packed": {"skip": (), "module_bits": {"model.embed_tokens": 4}, "kept_tokens": {"model.embed_tokens": 100}},
}


def expected(state: dict[str, torch.Tensor], bias: bool = False, experts: int = 0) -> list[dict]:
    """What transformers generates greedily with a dense state dict."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings, state = tiny.model_config(bias, experts=experts), tiny.stacked(state)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32).eval()
    model.load_state_dict({"lm_head.weight": state.get("model.embed_tokens.weight")} | state)  # tied or not
    answers = []
    for prompt in PROMPTS:
        tokens, logprobs = list(prompt), []
        for _ in range(TOKENS):
            with torch.no_grad():
                step = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(step.argmax()))
            logprobs.append(float(step.max()))
        with torch.no_grad():
            steps = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        of_prompt = steps.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0].tolist()
        answers.append({"tokens": tokens[len(prompt) :], "logprobs": logprobs, "prompt": of_prompt})
    return answers


def assert_same(found: list[dict], wanted: list[dict], atol: float = 0.05) -> None:
    """Same tokens, and log-probabilities that close if there are any.

    The default is what vLLM's attention on the CPU leaves between its own unquantized model and transformers.
    """
    assert [answer["tokens"] for answer in found] == [answer["tokens"] for answer in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"][: len(one["logprobs"])], abs=atol)
        if one["prompt"]:
            assert one["prompt"] == pytest.approx(other["prompt"], abs=atol)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return tiny.write_lora(tmp_path_factory.mktemp("adapter"), tiny.linears())


@pytest.fixture(scope="module")
def wanted(base) -> list[dict]:
    return expected(tiny.decode(base))


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    return {
        name: tiny.write_checkpoint(
            folder / str(i), tiny.quant_config(**options), bias="bias" in name, tied="tied" in name
        )
        for i, (name, options) in enumerate(VARIANTS.items())
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory, base, other, adapter, variants) -> dict[str, dict]:
    """Everything that the default backend of a CPU answers, from one process."""
    folder = tmp_path_factory.mktemp("dense")
    unquantized = tiny.write_dense(folder / "unquantized", tiny.decode(base))
    jobs = {
        "base": {"model": str(base), "reload": [str(other), str(base)]},
        "unquantized": {"model": str(unquantized)},
        "lora": {"model": str(base), "lora": str(adapter), "options": {"enable_lora": True, "max_lora_rank": 8}},
        "dummy": {"model": str(base), "options": {"load_format": "dummy", "quantization": "butterfly"}},
        "no config": {"model": str(unquantized), "options": {"quantization": "butterfly"}, "fails": True},
    } | {name: {"model": str(path), "prompt_logprobs": 0} for name, path in variants.items()}
    jobs["tied, packed"] |= {"reload": [str(variants["tied, packed"])]}
    found, _ = run_engines(folder, [*jobs.values()], **ONE_PROCESS)
    return dict(zip(jobs, found, strict=True))


def test_generation(answers, wanted):
    assert_same(answers["base"]["base"], wanted)
    assert_same(answers["base"]["base"], answers["unquantized"]["base"], atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_formats(answers, variants, name):
    assert_same(answers[name]["base"], expected(tiny.decode(variants[name]), bias="bias" in name))


def test_reload_of_a_tied_head(answers):
    assert answers["tied, packed"]["reload 0"] == answers["tied, packed"]["base"]


def test_reload(answers, wanted, other):
    assert_same(answers["base"]["reload 0"], expected(tiny.decode(other)))
    assert answers["base"]["reload 1"] == answers["base"]["base"]


def test_lora(answers, base, adapter, wanted):
    assert_same(answers["lora"]["base"], wanted)
    assert_same(answers["lora"]["lora"], expected(tiny.merge_lora(tiny.decode(base), adapter)))


def test_dummy_weights(answers):
    assert [len(answer["tokens"]) for answer in answers["dummy"]["base"]] == [TOKENS] * len(PROMPTS)


def test_model_without_quantization_config(answers):
    assert "Cannot find the config file for butterfly" in answers["no config"]["error"]


def test_fused_norms(tmp_path, base, wanted):
    """vLLM compiles the model with the pass that fuses norms; each layer has two, and four packed linears."""
    pytest.importorskip("triton")
    options = {"enforce_eager": False, "max_num_batched_tokens": 16, "max_model_len": 16, "max_num_seqs": 2}
    job = {"model": str(base), "options": options, "compiles": True}
    job |= {"prompts": PROMPTS[:2], "max_tokens": 1, "logprobs": None}
    variables = {"BQ_VLLM_BACKEND": "triton", "TRITON_INTERPRET": "1", "BQ_VLLM_FUSE_NORM": "1"}
    [answer], log = run_engines(tmp_path, [job], VLLM_ENABLE_V1_MULTIPROCESSING="0", **variables)
    counts = [tuple(map(int, found)) for found in re.findall(r"fused into (\d+) of the (\d+) packed", log)]
    assert tuple(map(sum, zip(*counts, strict=True))) == (2 * tiny.LAYERS, 4 * tiny.LAYERS)
    assert [one["tokens"] for one in answer["base"]] == [one["tokens"][:1] for one in wanted[:2]]


@pytest.fixture(scope="module")
def head_adapter(tmp_path_factory) -> Path:
    layers = tiny.linears() | {"lm_head": (tiny.VOCABULARY, tiny.HIDDEN)}
    return tiny.write_lora(tmp_path_factory.mktemp("head adapter"), layers)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_backends(tmp_path, base, other, wanted, variants, head_adapter, backend):
    """Traced by torch.compile as one graph, and run eagerly (VLLM_CPU_CI_ENV), which saves compiling it."""
    if backend == "triton" and find_spec("triton") is None:
        pytest.skip("triton is not installed")
    job = {"model": str(base), "options": {"enforce_eager": False}, "reload": [str(other)]}
    # few and without log-probabilities, since an interpreted kernel is slow, and so is compiling vLLM's sampler
    short = {"prompts": PROMPTS[:2], "max_tokens": 3, "logprobs": None}
    tied, untied = (str(variants[name]) for name in ("tied, packed", "embedding and head packed"))
    lora = {"lora": str(head_adapter), "options": {"enable_lora": True, "max_lora_rank": 8}}
    jobs = [job | short, {"model": tied} | short, {"model": untied} | lora | short]
    variables = {"BQ_VLLM_BACKEND": backend, "VLLM_CPU_CI_ENV": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if backend == "triton":
        variables["TRITON_INTERPRET"] = "1"
    (answer, of_tied, of_untied), _ = run_engines(tmp_path, jobs, **variables)
    dense = tiny.decode(Path(untied))
    for found, state in (
        (answer["base"], wanted),
        (answer["reload 0"], expected(tiny.decode(other))),
        (of_tied["base"], expected(tiny.decode(Path(tied)))),
        (of_untied["base"], expected(dense)),
        (of_untied["lora"], expected(tiny.merge_lora(dense, head_adapter))),
    ):
        assert [one["tokens"] for one in found] == [one["tokens"][:3] for one in state[:2]]


def ask_server(folder: Path, model: Path, prompts: list[list[int]], tokens: int, *flags: str) -> list[list[int]]:
    """Greedy tokens that the OpenAI server gives to all prompts at once.

    The server is as users start it, with torch.compile; in 32-bit floats, so that answers can be compared.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", *flags]

    def complete(prompt: list[int]) -> list[int]:
        body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, "detokenize": False}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["choices"][0]["token_ids"]

    printed = folder / "server.log"
    with printed.open("w+") as log:
        server = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log)
        try:
            for _ in range(300):
                assert server.poll() is None, printed.read_text()[-6000:]
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                time.sleep(1)
            with ThreadPoolExecutor(len(prompts)) as pool:
                return list(pool.map(complete, prompts))
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def processes(tmp_path_factory, base, variants) -> tuple[list[dict], str]:
    """Engines in processes of their own, as users start them: two ranks, and checkpoints that are refused."""
    folder = tmp_path_factory.mktemp("processes")
    name = "model.layers.1.self_attn.k_proj.scales"
    missing = tiny.write_checkpoint(folder / "missing", edits={name: None})
    packed = variants["tied, packed"], variants["embedding and head packed"]
    unknown = tiny.write_checkpoint(folder / "unknown", table=tiny.quant_config().to_dict() | {"sign": "random"})
    jobs = [
        *({"model": str(path), "options": {"tensor_parallel_size": 2}} for path in (base, *packed)),
        {"model": str(unknown), "fails": True},
        {"model": str(missing), "fails": True},
    ]
    return run_engines(folder, jobs, VLLM_CPU_OMP_THREADS_BIND="0|1", TORCHDYNAMO_DISABLE="1")


def test_tensor_parallel(processes, wanted, variants):
    assert_same(processes[0][0]["base"], wanted)
    for answer, name in zip(processes[0][1:3], ("tied, packed", "embedding and head packed"), strict=True):
        assert_same(answer["base"], expected(tiny.decode(variants[name])))


def test_errors_reach_the_user(processes):
    (*_, unknown, _), printed = processes
    assert "unknown key 'sign'" in unknown["error"]
    assert "model.layers.1.self_attn.k_proj.scales: missing from the checkpoint; expected torch.float16" in printed


def test_sixteen_clients(tmp_path, base, wanted):
    prompts = list(itertools.islice(itertools.cycle(PROMPTS), 16))
    found = ask_server(tmp_path, base, prompts, TOKENS, "--skip-tokenizer-init", "--max-model-len", "128")
    assert found == [answer["tokens"] for answer in itertools.islice(itertools.cycle(wanted), 16)]
