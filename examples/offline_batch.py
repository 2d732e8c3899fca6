"""Generate for every line of a jsonl file, offline.

    python examples/offline_batch.py CKPT in.jsonl out.jsonl [--max-tokens 128] [--temperature 0.7]

Each line of in.jsonl is an object with a "prompt"; out.jsonl repeats it with a "text" beside it. vLLM batches as many
prompts at once as fit the KV cache, so there is nothing to tune here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def main(
    checkpoint: Annotated[str, typer.Argument(help="Folder that bq-calibrate wrote.")],
    source: Annotated[Path, typer.Argument(help="jsonl file with one prompt per line.")],
    target: Annotated[Path, typer.Argument(help="jsonl file to write.")],
    max_tokens: int = 128,
    temperature: float = 0.7,
    max_model_len: int = 2048,
    dtype: Annotated[
        str,
        typer.Option(help="Of activations; on a CPU without bfloat16 instructions float32 is several times faster."),
    ] = "auto",
    eager: Annotated[bool, typer.Option(help="Start sooner, run slower: no torch.compile, no CUDA graphs.")] = False,
) -> None:
    """Generate and write the results in the order of the prompts."""
    lines = [json.loads(line) for line in source.read_text().splitlines() if line.strip()]
    if not lines or any("prompt" not in line for line in lines):
        raise typer.BadParameter(f'{source}: expected lines like {{"prompt": "..."}}')
    from vllm import LLM, SamplingParams

    # config.json says that it is a butterfly checkpoint
    llm = LLM(model=checkpoint, dtype=dtype, max_model_len=max_model_len, enforce_eager=eager)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=0)
    results = llm.generate([line["prompt"] for line in lines], sampling)  # draws a progress bar
    with target.open("w") as file:
        for line, result in zip(lines, results, strict=True):
            file.write(json.dumps(line | {"text": result.outputs[0].text}) + "\n")


if __name__ == "__main__":
    typer.run(main)
