"""Ask a running server, as any OpenAI client would: `vllm serve CKPT --quantization butterfly`, then

python examples/client.py "The capital of France is" [--url http://localhost:8000/v1] [--max-tokens 64]
"""

from __future__ import annotations

from typing import Annotated

import typer
from openai import OpenAI


def main(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    url: str = "http://localhost:8000/v1",
    max_tokens: int = 64,
    temperature: float = 0.0,
) -> None:
    """Print the continuation as it arrives."""
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id  # a server serves one
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=temperature, stream=True
    )
    print(prompt, end="")
    for part in stream:
        print(part.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    typer.run(main)
