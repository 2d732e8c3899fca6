"""Writes the tokens on which `bq-calibrate` with the same settings calibrates, for every baseline.

python -m benchmarks.baselines.tokens MODEL -o tokens.safetensors [--dataset c4] [--samples 128] [--seqlen 512]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from bq_calibration.data import calibration_tokens
from bq_calibration.files import write_tensors
from bq_calibration.model import SourceModel

from benchmarks.baselines.third_party.packages import Model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    model: Model,
    out: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    dataset: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "c4",
    samples: int = 128,
    train_samples: int = 640,
    seqlen: int = 512,
    seed: int = 0,
) -> None:
    """Write `tokens`, for rounding and block-wise training: the first of `train_tokens`, for end-to-end training."""
    tokenizer = SourceModel(str(model), torch.device("cpu")).tokenizer()
    rows = calibration_tokens(tokenizer, dataset, max(samples, train_samples), seqlen, seed)
    write_tensors(out, {"tokens": rows[:samples].clone(), "train_tokens": rows[:train_samples].clone()})


if __name__ == "__main__":
    app()
