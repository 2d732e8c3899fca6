"""OmniQuant's learned clipping (arXiv 2308.13137), as it is published for weights alone.

python -m benchmarks.baselines.omniquant MODEL -o OUT --tokens tokens.safetensors [--bits 2] [--levels minmax]
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from bq_calibration.block import Block
from bq_calibration.model import SourceModel
from bq_calibration.quantize import search_scale
from bq_calibration.sampling import batch_of

from benchmarks.baselines.levels import MIDRISE, Levels, LevelsOption
from benchmarks.baselines.stream import TOKENS_PER_STEP, Run, training_autocast
from benchmarks.baselines.third_party.packages import Bits, GroupSize, Model, Out, Tokens

CLIPPING_RATE = 1e-2  # as published
FIRST_LOGIT, MOST_SHARE = 4.0, 0.99

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _first_logits(w: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Logits of the shares of every group's range, [2, N, groups]; w [N, groups, group].

    Min-max levels start as published, mid-rise ones from searched scales.
    """
    logits = torch.full((2, *w.shape[:2]), FIRST_LOGIT, device=w.device)
    if levels.kind == MIDRISE:
        searched = search_scale(w, levels.bits, MIDRISE)[0].float()
        logits[1] = (searched / levels.clipped_range(w, 1, 1)[0]).clamp(max=MOST_SHARE).logit()
    return logits.requires_grad_(True)


def quantize_block(
    block: Block, hidden: torch.Tensor, targets: torch.Tensor, source: SourceModel, levels: Levels, steps: int
) -> None:
    """Learned clipping of one decoder block.

    The shares of every group's range are sigmoids, trained with AdamW, 2,048 tokens per step, so that the block gives
    the outputs of the 16-bit one on 16-bit inputs. Published are 2,560 steps at 2 bits; the default is about as long
    as other methods take that train blocks.

    Args:
        block: left quantized.
        hidden: its inputs, [samples, seqlen, hidden].
        targets: outputs of the 16-bit model behind it.
        source: the model that it is of.
        levels: to round to.
        steps: of training.
    """
    block.module.requires_grad_(False)
    weights = {name: levels.grouped(layer.weight.float()) for name, layer in block.linears().items()}
    logits = {name: _first_logits(weight, levels) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(logits.values(), lr=CLIPPING_RATE, weight_decay=0)
    batch = max(1, TOKENS_PER_STEP // hidden.shape[1])
    for step in range(steps):
        rows = batch_of(step, batch, len(hidden), block.index)
        with torch.enable_grad():
            replaced = {
                f"{name}.weight": levels.rounded(weight, *levels.clipped_range(weight, *logits[name].sigmoid()))
                for name, weight in weights.items()
            }
            with training_autocast(source):
                output = torch.func.functional_call(block.module, replaced, (hidden[rows],), block.kwargs)
            output = output[0] if isinstance(output, tuple) else output
            F.mse_loss(output.float(), targets[rows].float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights.items():
        learned = levels.clipped_range(weight, *logits[name].detach().sigmoid())
        block.set_weight(name, levels.quantized(weight, *learned).weight())


@app.command(help=__doc__)
def main(
    model: Model,
    out: Out,
    tokens: Tokens,
    bits: Bits = 2,
    group_size: GroupSize = 64,
    levels: LevelsOption = MIDRISE,
    steps: Annotated[int, typer.Option(help="Steps per block.")] = 200,
) -> None:
    """Quantize a model by OmniQuant's learned clipping and write it."""
    grid = Levels(bits, group_size, levels)

    def prepare(source, _tokens, _staging):
        return lambda *block: quantize_block(*block, source, grid, steps)

    Run("OmniQuant", model, out, tokens, grid, with_targets=True).run(prepare)


if __name__ == "__main__":
    app()
