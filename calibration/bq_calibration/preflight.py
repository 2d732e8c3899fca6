"""The gate in front of the first block: the source read and hashed, its activations in range, room for the results."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from bq_kernels.format import BITS, HEAD, QuantConfig
from rich.progress import Progress

from . import parallel
from .block import TOKENS_PER_BATCH, Block
from .compute import dtype_name, operations_per_second
from .errors import UserError, explain
from .files import carried_files
from .mix import parse_mix
from .model import SourceModel
from .quantize_embeddings import ROWS
from .recipes import SENSITIVITY_SAMPLES, UNPACKED, Recipe
from .rotation import MOST_ROWS
from .training_plan import PROCESS, training_plan

MOST_STATES = 2**34  # bytes of the teacher's states on disk: larger ones are rarely within a budget of memory
PACE = 1.5  # time over operations at the rate of products: of the widest input timed (docs/experiment-log.md)
_CHUNK = 2**24  # bytes that are hashed at a time


def fingerprint(files: list[Path], progress: Progress, title: str) -> str:
    """SHA-256 over names and contents of files, in their order.

    Raises:
        UserError: naming a file that cannot be read.
    """
    total = hashlib.sha256()
    task = progress.add_task(title, total=sum(file.stat().st_size for file in files))
    for file in files:
        total.update(file.name.encode() + b"\0")
        with explain(f"{file}: cannot be read"), open(file, "rb") as handle:
            while chunk := handle.read(_CHUNK):
                total.update(chunk)
                progress.advance(task, len(chunk))
    progress.remove_task(task)
    return total.hexdigest()


def source_fingerprint(source: SourceModel, progress: Progress) -> str:
    """SHA-256 of everything in the source that a checkpoint is made of: weights, config, files that come along."""
    beside = [source.folder / name for name in (Path("config.json"), *carried_files(source.folder))]
    return fingerprint([*source.store.files, *beside], progress, "fingerprint of the model")


def data_fingerprint(recipe: Recipe, progress: Progress) -> str | None:
    """SHA-256 of the local files among data sets; None where there are none."""
    names = [*recipe.dataset.split(","), *(recipe.decontaminate or "").split(",")]
    names += [part.name for part in parse_mix(recipe.mix)] if recipe.mix else []
    files = [Path(name) for name in names if Path(name).is_file()]
    return fingerprint(files, progress, "fingerprint of the data") if files else None


def check_weights(source: SourceModel, progress: Progress) -> None:
    """Refuse NaN and infinity in any tensor of the source, before hours of work on the others.

    Raises:
        UserError: naming the tensor.
    """
    task = progress.add_task("checking the weights", total=len(source.store.names()))
    for name in source.store.names():
        source.read(name)
        progress.advance(task)
    progress.remove_task(task)


def check_activations(source: SourceModel, tokens: torch.Tensor, progress: Progress) -> None:
    """Run one sample through the first layer; where the run computes in float16, through all, for they may overflow.

    Args:
        source: the 16-bit model.
        tokens: int64 [samples, seqlen].

    Raises:
        UserError: if a layer does not run, or naming the first whose activations are not finite.
    """
    count = source.num_blocks if source.dtype == torch.float16 else min(1, source.num_blocks)
    task = progress.add_task("checking the activations", total=count)
    with explain(f"{source.folder / 'config.json'}: the model does not run with it"):
        hidden = source.embed(tokens[:1])
        for index in range(count):
            with source.block(index) as block:
                block.run(hidden, out=hidden)
            if not bool(torch.isfinite(hidden).all()):
                raise UserError(
                    f"the activations behind block {index} overflow {dtype_name(source.dtype)}; "
                    "use --compute-dtype bfloat16 or float32, also to serve (vllm serve --dtype bfloat16)"
                )
            progress.advance(task)
    progress.remove_task(task)


@dataclass(frozen=True)
class Plan:
    """The cost of a run, before it begins.

    Attributes:
        bits_per_weight: of the linear layers, all that is stored counted.
        file_bits_per_weight: of all tensors over all weights.
        checkpoint_bytes: of all tensors of the checkpoint.
        disk_bytes: free space that the run needs, unfinished work included.
        memory_bytes: main memory, or memory of the GPU, about; per process.
        operations: floating-point operations, about.
    """

    bits_per_weight: float
    file_bits_per_weight: float
    checkpoint_bytes: int
    disk_bytes: int
    memory_bytes: int
    operations: float

    def seconds(self, device: torch.device) -> float | None:
        """Time on this CPU, about; None for other devices, whose rate is not known before they work."""
        return PACE * self.operations / operations_per_second() if device.type == "cpu" else None


def plan(source: SourceModel, config: QuantConfig, recipe: Recipe, memory_budget: int) -> Plan:
    """Estimate the cost of a run from the model's shapes and the recipe.

    Raises:
        UserError: if it does not fit into `memory_budget` bytes.
    """
    packed, shared, weights = _linear_layers(source, config)
    shapes = {name: source.store.shape(name) for name in source.store.names() if name not in source.linear_weights}
    embeddings = {name: shapes.pop(f"{name}.weight") for name in source.embedding_names if config.packs(name)}
    if embeddings and len(source.embedding_names) == 1:
        shapes.pop(f"{HEAD}.weight", None)
    rest = sum(math.prod(shape) * source.kept_dtype(name).itemsize for name, shape in shapes.items())
    tables = sum(sum(_stored_bytes(config, name, *shape).values()) for name, shape in embeddings.items())
    everything = weights + sum(map(math.prod, [*shapes.values(), *embeddings.values()]))
    bits = recipe.target_bpw or 8 * (packed - shared) / weights
    layers = int(bits * weights / 8) + shared
    checkpoint = layers + tables + rest
    counts = weights, sum(map(math.prod, embeddings.values()))
    return Plan(
        bits,
        8 * checkpoint / everything,
        checkpoint,
        _disk(source, config, recipe, checkpoint, layers + tables, *counts),
        max(
            _memory(source, recipe, memory_budget),
            _embedding_memory(source, recipe, embeddings),
        ),
        sum(count * _operations(source, block, recipe) for block, count in source.kinds)
        + sum(_rounding_operations(recipe, *shape) for shape in embeddings.values())
        + 6 * source.vocabulary * source.text_config.hidden_size * recipe.train_tokens,  # logits of both, a way back
    )


def bits_per_weight(source: SourceModel, config: QuantConfig) -> float:
    """Bits per weight of the linear layers, all that is stored counted."""
    packed, again, weights = _linear_layers(source, config)
    return 8 * (packed - again) / weights


def _linear_layers(source: SourceModel, config: QuantConfig) -> tuple[int, int, int]:
    """Bytes of the packed linear layers; those of them that are angles once more; number of weights."""
    packed = again = weights = 0
    for block, count in source.kinds:
        stored, angles = _layer_bytes(block, config)
        packed, again, weights = packed + count * stored, again + count * angles, weights + count * block.weights()
    return packed, again, weights


def _layer_bytes(block: Block, config: QuantConfig) -> tuple[int, int]:
    """Bytes of the packed linear layers of a decoder layer; and those of them that are angles once more."""
    stored = again = 0
    for group in block.groups:
        for name, layer in block.linears(group).items():
            sizes = _stored_bytes(config, block.prefix + name, layer.out_features, layer.in_features)
            stored += sum(sizes.values())
            again += sizes.get("angles", 0) if name != group.layers[0] else 0
    return stored, again


def _stored_bytes(config: QuantConfig, name: str, rows: int, columns: int) -> dict[str, int]:
    """Bytes of the tensors of a packed layer, by suffix."""
    specs = config.tensors(name, columns, rows).items()
    return {suffix: math.prod(spec.shape) * spec.dtype.itemsize for suffix, spec in specs}


def _states(source: SourceModel, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens."""
    return tokens * source.text_config.hidden_size * source.dtype.itemsize


def _disk(
    source: SourceModel, config: QuantConfig, recipe: Recipe, checkpoint: int, packed: int, weights: int, tables: int
) -> int:
    """Checkpoint, other files, finished blocks, tokens; end to end the teacher's states, stages, Adam's moments too.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        recipe: settings of the run.
        checkpoint: bytes of its tensors.
        packed: bytes of those that are packed.
        weights: of the linear layers.
        tables: weights of a packed embedding and LM head.
    """
    carried = sum((source.folder / name).stat().st_size for name in carried_files(source.folder))
    needed = checkpoint + carried + packed + recipe.windows * recipe.seqlen * 8
    if recipe.train_tokens:
        scales = (weights + tables) // config.group(source.text_config.hidden_size)
        trained = weights + scales if recipe.train_codes else scales
        moments = 5 if recipe.optimizer_bits == 8 else 12  # value and moments, per parameter
        files = 2 + (recipe.schedule == "wsd")  # while a file is replaced it is there twice
        text = recipe.text_samples * recipe.seqlen
        needed += min(_states(source, text), MOST_STATES) + 4 * text + packed + files * moments * trained
    return needed


def _memory(source: SourceModel, recipe: Recipe, budget: int) -> int:
    """Memory of rounding and block-wise training, or of end-to-end training where that takes more.

    Where a decoder layer does not fit with all of its experts, it lets the source read their weights on demand.

    Raises:
        UserError: if it is more than the budget.
    """
    corrects = bool(recipe.correction)
    states = _states(source, recipe.windows * recipe.seqlen)
    states = states * (1 + bool(recipe.block_tokens or corrects) + corrects) // parallel.size()
    if recipe.target_bpw is not None:  # sensitivities: in front of every decoder layer, and behind the last
        of_samples = _states(source, SENSITIVITY_SAMPLES * recipe.seqlen // recipe.parts)
        states = max(states, (source.num_blocks + 1) * of_samples)

    def needed(on_demand: bool) -> int:
        layers = (_layer_memory(block, recipe, source.dtype.itemsize, on_demand) for block, _ in source.kinds)
        return PROCESS + states + max(layers)

    blocks, fewer = needed(on_demand=False), needed(on_demand=True)
    if blocks > budget >= fewer and not (recipe.block_tokens or corrects):  # which keep copies of a layer's weights
        source.experts_on_demand, blocks = True, fewer
    if blocks > budget:
        raise UserError(
            f"a decoder layer needs {blocks / 1e9:.1f} GB, {budget / 1e9:.1f} GB may be taken: "
            "lower --samples, --train-samples or --seqlen, or raise --memory-budget"
        )
    if not recipe.train_tokens:
        return blocks
    return max(blocks, training_plan(source, recipe, budget).memory_bytes)


def _layer_memory(block: Block, recipe: Recipe, item: int, on_demand: bool) -> int:
    """Memory of rounding and block-wise training of a decoder layer; `item` bytes per value of its 16-bit weights.

    On demand, those of one expert are there at a time.
    """
    widest = max(block.in_features(group) for group in block.groups)
    rounded = features = held = 0
    for group in block.groups:
        part = group.parts()[0]  # one expert is rounded at a time, and few of them read a token
        weights = block.weights(part)
        rounded += weights
        held += weights * max(group.experts - 1, 0)
        features += sum(layer.in_features + layer.out_features for layer in block.linears(part).values())
    at_work = 18 if recipe.block_tokens else 10 + item * bool(recipe.correction)
    kept = 1 if on_demand else item + 1  # packed, and as the layer computes with them
    layer = at_work * rounded + (at_work if recipe.block_tokens else kept) * held
    return layer + 40 * widest**2 + TOKENS_PER_BATCH * features * item + _routed(block, recipe, item)


def _routed(block: Block, recipe: Recipe, item: int) -> int:
    """Bytes of the inputs of all experts."""
    widths = [block.in_features(group) for group in block.groups if group.experts]
    return max(widths, default=0) * recipe.samples * recipe.seqlen * item // parallel.size()


def _embedding_memory(source: SourceModel, recipe: Recipe, embeddings: dict[str, tuple[int, int]]) -> int:
    """The weight in float32, its codes, and copies of the rows that are rounded at a time."""
    rounding = [6 * rows * columns + 40 * columns * (columns + ROWS) for rows, columns in embeddings.values()]
    return PROCESS + max(rounding, default=0) + _states(source, recipe.windows * recipe.seqlen) // parallel.size()


def _operations(source: SourceModel, block: Block, recipe: Recipe) -> float:
    """Of a decoder layer: sensitivities, statistics, the angles, rounding, passes, training."""
    total, tokens = 0.0, recipe.samples * recipe.seqlen
    for group in block.groups:
        parts, k = len(group.parts()), block.in_features(group)
        n = sum(layer.out_features for layer in block.linears(group).values())
        read = source.share_of_tokens(group)
        twice = 1 + bool(group.experts)  # statistics of all experts, then of each
        total += twice * k * k * tokens * read * parts + _rounding_operations(recipe, n, k)
        total += parts * (k**3 / 3 + recipe.compare * (2 / 3 * k**3 + 2 * MOST_ROWS * k * k))
        if recipe.rotation == "butterfly":
            total += recipe.steps * 2 * MOST_ROWS * k * k
        if recipe.correction:
            total += 2 * k * k * (n + tokens)
        if recipe.target_bpw is not None:
            total += len(BITS) * (k**3 / 3 + _rounding_operations(recipe, min(n, MOST_ROWS), k))
        passes = 2 * (twice + bool(recipe.correction)) * tokens  # for statistics, and with rounded layers
        passes += tokens * (min(recipe.embedding_bits, recipe.head_bits) < UNPACKED)  # to the LM head
        passes += 2 * recipe.windows * recipe.seqlen * recipe.trains  # of both models
        passes += 3 * (recipe.block_tokens + recipe.train_tokens)  # forward, backward twice
        passes += recipe.train_tokens * (not recipe.shares_windows)  # the 16-bit model's
        total += 2 * k * n * read * passes
    return total


def _rounding_operations(recipe: Recipe, rows: int, columns: int) -> float:
    """GPTQ and refinement of a weight."""
    return rows * columns**2 * (1 + 2 * recipe.refine)
