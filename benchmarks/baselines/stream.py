"""Quantizes a model block by block and writes it as a dense checkpoint: what the baselines written here share.

The checkpoint is fake-quantized, stored in the dtype of the model, one shard per decoder block, with `peer.json` beside
it. `OUT.partial` holds the finished blocks of an interrupted run, which goes on there. Each block sees inputs from the
blocks quantized before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bq_calibration.block import Block
from bq_calibration.errors import UserError
from bq_calibration.files import write_json, write_tensors
from bq_calibration.model import SourceModel
from safetensors.torch import load_file

from benchmarks.baselines.levels import MINMAX, Levels
from benchmarks.baselines.third_party.packages import write_facts

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # separate projections, norms that multiply and nothing else
# what makes the input of a group of layers, by the first of them: a norm, or a layer whose rows can be rescaled
PRECEDING = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
TOKENS_PER_STEP = 2048  # of training

# called with a block, its inputs [samples, seqlen, hidden] and targets; leaves the block quantized
QuantizeBlock = Callable[[Block, torch.Tensor, torch.Tensor | None], None]


def training_autocast(source: SourceModel) -> torch.autocast:
    """Context for the products of training, in the dtype that the source model's compute dtypes name for it."""
    dtype = source.training_dtype
    return torch.autocast(source.device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Run:
    """One baseline on one model.

    Attributes:
        name: of the method, for `peer.json`.
        model: folder of the 16-bit model.
        out: folder to write.
        tokens: safetensors file that `baselines.tokens` wrote.
        levels: to which weights are rounded.
        with_targets: whether blocks need the outputs of the 16-bit model.
        end_to_end: whether the method sees all training tokens.
    """

    name: str
    model: Path
    out: Path
    tokens: Path
    levels: Levels
    with_targets: bool = False
    end_to_end: bool = False

    def run(self, prepare: Callable[[SourceModel, torch.Tensor, Path], QuantizeBlock]) -> None:
        """Quantize the model and write it, whole or not at all.

        Args:
            prepare: called with the model, the training tokens and the folder of unfinished work; gives the function
                for a block.

        Raises:
            UserError: for an architecture that the baselines do not know.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source, data = SourceModel(str(self.model), device), load_file(self.tokens)
        if source.config.model_type not in FAMILIES:
            raise UserError(f"{source.config.model_type}: this baseline knows only {', '.join(FAMILIES)}")
        rows, train_rows = data["tokens"], data["train_tokens"]
        staging = self.out.with_name(self.out.name + ".partial")
        resumed = staging.exists()
        staging.mkdir(parents=True, exist_ok=True)
        quantize_model(source, rows, staging, prepare(source, train_rows, staging), self.with_targets)
        seen, asym = train_rows if self.end_to_end else rows, self.levels.kind == MINMAX
        write_facts(staging, self.name, seen, self.levels.bits, self.levels.group_size, asym, resumed)
        staging.rename(self.out)


@torch.no_grad()
def quantize_model(
    source: SourceModel, tokens: torch.Tensor, folder: Path, quantize: QuantizeBlock, with_targets: bool
) -> None:
    """Quantize the model block by block and write a dense checkpoint; shards that are there are used.

    Args:
        source: the 16-bit model.
        tokens: int64 [samples, seqlen].
        folder: to write; may hold shards already.
        quantize: quantizes a block in place.
        with_targets: whether to keep the outputs of the 16-bit model after each block; else targets are None.
    """
    ignored = shutil.ignore_patterns("*.safetensors*", "*.bin", "*.gguf", "*.pth")
    shutil.copytree(source.folder, folder, ignore=ignored, dirs_exist_ok=True)
    hidden = source.embed(tokens)
    targets = hidden.clone() if with_targets else None
    shards, weight_map = source.num_blocks + 1, {}
    for index in range(source.num_blocks):
        shard = folder / f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        with source.block(index) as block:
            if with_targets:
                block.run(targets, out=targets)
            if not shard.exists():
                quantize(block, hidden, targets)
                write_tensors(shard, _stored(source, block))
            kept = load_file(shard)
            block.module.load_state_dict({name.removeprefix(block.prefix): tensor for name, tensor in kept.items()})
            block.run(hidden, out=hidden)
        weight_map |= dict.fromkeys(kept, shard.name)
        print(f"block {index + 1} of {source.num_blocks}", flush=True)
    rest = {name: source.store.get(name) for name in source.store.names() if name not in weight_map}
    last = folder / f"model-{shards:05d}-of-{shards:05d}.safetensors"
    write_tensors(last, rest)
    weight_map |= dict.fromkeys(rest, last.name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _stored(source: SourceModel, block: Block) -> dict[str, torch.Tensor]:
    """The tensors of a block by full name, on the CPU, in the dtype in which the model stores them."""
    named = {block.prefix + name: tensor for name, tensor in block.module.state_dict().items()}
    return {name: tensor.to("cpu", source.store.dtype(name)) for name, tensor in named.items()}
