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
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and text; the model's by default.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of activations; on a CPU without bfloat16 instructions float32 is several times faster."),
    ] = "auto",
    eager: Annotated[bool, typer.Option(help="Start sooner, run slower: no torch.compile, no CUDA graphs.")] = False,
) -> None:
    """Generate and write the results in the order of the prompts; a prompt that is too long gets an "error" instead."""
    lines = read_lines(source)
    from vllm import LLM, SamplingParams

    # config.json says that it is a butterfly checkpoint
    llm = LLM(model=checkpoint, dtype=dtype, max_model_len=max_model_len, enforce_eager=eager)
    limit, tokenizer = llm.llm_engine.model_config.max_model_len, llm.get_tokenizer()
    lengths = [len(tokenizer.encode(line["prompt"])) for line in lines]
    fitting = [line["prompt"] for line, length in zip(lines, lengths, strict=True) if 0 < length < limit]
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=0)
    results = iter(llm.generate(fitting, sampling) if fitting else [])  # draws a progress bar
    with target.open("w") as file:
        for line, length in zip(lines, lengths, strict=True):
            if 0 < length < limit:
                answer = {"text": next(results).outputs[0].text}
            else:
                answer = {"error": f"the prompt has {length} tokens, the model takes 1 to {limit - 1}"}
            file.write(json.dumps(line | answer) + "\n")
    if len(fitting) < len(lines):
        typer.echo(
            f"{len(lines) - len(fitting)} of {len(lines)} prompts were too long or empty: see {target}", err=True
        )


def read_lines(source: Path) -> list[dict]:
    """The objects of a jsonl file, each with a prompt.

    Raises:
        BadParameter: naming the line that is not one.
    """
    lines = []
    for number, text in enumerate(source.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            raise typer.BadParameter(f"{source}, line {number}: not valid JSON ({error})") from error
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            raise typer.BadParameter(f'{source}, line {number}: expected an object like {{"prompt": "..."}}')
        lines.append(line)
    if not lines:
        raise typer.BadParameter(f"{source}: holds no prompt")
    return lines


if __name__ == "__main__":
    typer.run(main)
