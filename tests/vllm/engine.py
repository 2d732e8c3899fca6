"""Runs vLLM engines in a process of its own: a list of jobs as JSON in, a list of answers as JSON out.

A job names a model and what to do with it. Engines of one process follow each other, which saves imports. Environment
variables such as BQ_VLLM_BACKEND apply to the process, or are a job's own.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

# an engine starts in seconds where it has no process of its own, which imports vLLM again, and without dynamo vLLM
# does not compile its sampler either
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
TOKENS = 6
PROMPTS = [[5, 9, 100, 33], [7, 8, 9] * 5, [400], list(range(50, 90))]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Variables for a process that runs vLLM: offline, on the CPU, with our plugin only.

    All processes share a cache: what one backend compiled must not be run by another.
    """
    ours = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "butterfly",
        "VLLM_CACHE_ROOT": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("BQ_VLLM_BACKEND", "TRITON_INTERPRET")}
    return inherited | ours | variables


def run_engines(folder: Path, jobs: list[dict], timeout: int = 800, **variables: str) -> tuple[list[dict], str]:
    """Run jobs in a process of their own; returns the answers and everything that it printed.

    Args:
        folder: for the files of the process.
        jobs: see `run`; greedy tokens of `PROMPTS` where they say nothing else.
        timeout: seconds for all of them.
        variables: of the environment, for the process.
    """
    source, out = folder / "jobs.json", folder / "answers.json"
    source.write_text(json.dumps([{"prompts": PROMPTS, "max_tokens": TOKENS, "logprobs": 0} | job for job in jobs]))
    process = subprocess.run(
        [sys.executable, __file__, source, out],
        env=environment(folder, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    (folder / "printed.log").write_text(process.stdout)
    assert process.returncode == 0, process.stdout[-6000:]
    return json.loads(out.read_text()), process.stdout


def prompt_of(prompt: list[int] | dict) -> dict:
    """A prompt as vLLM takes it, from token ids or from a text with a random picture of 32 x 32 pixels."""
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt}
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(prompt["picture"]).integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
    return {"prompt": prompt["text"], "multi_modal_data": {"image": Image.fromarray(pixels)}}


def generate(llm, job: dict, lora: str | None = None) -> list[dict]:
    """Greedy tokens for every prompt of a job; log-probabilities of them, and of the prompt's, if it wants those."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        logprobs=job["logprobs"],
        prompt_logprobs=job.get("prompt_logprobs"),
        detokenize=False,
    )
    prompts = [prompt_of(prompt) for prompt in job["prompts"]]
    request = LoRARequest("adapter", 1, lora) if lora else None
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=request)
    return [
        {
            "tokens": list(answer.token_ids),
            "logprobs": [step[answer.token_ids[i]].logprob for i, step in enumerate(answer.logprobs or ())],
            "prompt": [
                step[output.prompt_token_ids[i]].logprob for i, step in enumerate(output.prompt_logprobs or ()) if step
            ],
            "cached": output.num_cached_tokens,
        }
        for output, answer in ((output, output.outputs[0]) for output in outputs)
    ]


def compile_as_on_a_gpu() -> None:
    """Let vLLM's CPU platform compile models as that of a GPU does: in pieces, with vLLM's own passes."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    set_defaults = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config):
        set_defaults(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
        compilation.ir_enable_torch_wrap, compilation.compile_sizes = True, []

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)


def override_kernels_once() -> None:
    """Let vLLM's CPU platform replace Triton kernels for the first engine of the process only.

    Every engine does it anew, by a walk over all modules, which fails on the library of numba that n-gram speculation
    of an earlier engine has loaded: `'_lib_fn_wrapper' object has no attribute 'get'`.
    """
    from vllm.platforms.cpu import CpuPlatform

    if override := getattr(CpuPlatform, "register_triton_kernel_overrides", None):  # not in vLLM 0.28
        CpuPlatform.register_triton_kernel_overrides = staticmethod(functools.cache(override))


def drafted_tokens(llm) -> int:
    """Tokens that speculative decoding has proposed."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens")


def answer(llm, job: dict) -> dict:
    """Everything that a job asks of a running engine."""
    by_itself = [job | {"prompts": [prompt], "prompt_logprobs": 0} for prompt in job["prompts"][: job.get("alone", 0)]]
    found = {"alone": [generate(llm, one)[0] for one in by_itself], "base": generate(llm, job)}
    if job.get("options", {}).get("speculative_config"):
        found["drafted"] = drafted_tokens(llm)
    if lora := job.get("lora"):
        found["lora"] = generate(llm, job, lora)
    for number, path in enumerate(job.get("reload", [])):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        llm.reset_prefix_cache()
        found[f"reload {number}"] = generate(llm, job)
    return found


def run(job: dict) -> dict:
    """Start an engine, do the job, stop it. A job that `fails` may end in an error, and returns its text."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if job.get("compiles"):
        compile_as_on_a_gpu()

    os.environ.update(job.get("variables", {}))
    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 16, "enforce_eager": True}
    options |= {"skip_tokenizer_init": True} | job.get("options", {})
    llm = None
    try:
        llm = LLM(model=job["model"], **options)
        return answer(llm, job)
    except Exception as error:
        if not job.get("fails"):
            raise
        traceback.print_exc()
        return {"error": str(error)}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    override_kernels_once()
    out.write_text(json.dumps([run(job) for job in jobs]))
