"""Runs vLLM engines in a process of its own: a list of jobs as JSON in, a list of answers as JSON out.

A job names a model and what to do with it. Engines of one process follow each other, which saves imports; environment
variables such as BQ_VLLM_BACKEND apply to the process.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path


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


def run(job: dict) -> dict:
    """Start an engine, do the job, stop it. A job that `fails` returns the error's text."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if job.get("compiles"):
        compile_as_on_a_gpu()

    options = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 16, "enforce_eager": True}
    options |= {"skip_tokenizer_init": True} | job.get("options", {})
    try:
        llm = LLM(model=job["model"], **options)
    except Exception as error:
        if not job.get("fails"):
            raise
        return {"error": str(error)}
    answer = {"base": generate(llm, job)}
    if lora := job.get("lora"):
        answer["lora"] = generate(llm, job, lora)
    for number, path in enumerate(job.get("reload", [])):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
        llm.reset_prefix_cache()
        answer[f"reload {number}"] = generate(llm, job)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answer


if __name__ == "__main__":
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    out.write_text(json.dumps([run(job) for job in jobs]))
