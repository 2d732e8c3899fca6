"""The quantization config that a recipe gives a model's checkpoint."""

from __future__ import annotations

from bq_kernels.format import HEAD, FormatError, QuantConfig, RotationConfig

from .architecture import InputGroup
from .errors import UserError
from .recipes import UNPACKED, Recipe

KEPT_SHARE = 16  # a table keeps at most one row of so many in 16 bits


def embedding_bits(recipe: Recipe, names: tuple[str, ...], model: str) -> dict[str, int]:
    """Bits of the embedding and the LM head, by full name, where they are packed.

    Args:
        recipe: settings of the run.
        names: full names of those that the model stores: of one, where they are tied.
        model: its name.

    Raises:
        UserError: if a tied model is to have two numbers of bits.
    """
    if len(names) == 1 and recipe.embedding_bits != recipe.head_bits:
        raise UserError(
            f"--embedding-bits {recipe.embedding_bits}, --head-bits {recipe.head_bits}: {model} ties its LM head to "
            "its embedding, which is stored once; give both the same"
        )
    bits = {name: recipe.bits_of_embedding(name) for name in names}
    return {name: value for name, value in bits.items() if value != UNPACKED}


def shard_widths(recipe: Recipe, widths: dict[InputGroup, int]) -> dict[InputGroup, int]:
    """Input features of every group of layers on one of `tensor_parallel` GPUs.

    Args:
        recipe: settings of the run.
        widths: input features of every group.
    """
    return {group: width // recipe.tensor_parallel if group.row_parallel else width for group, width in widths.items()}


def quant_config(
    recipe: Recipe, widths: dict[InputGroup, int], embeddings: dict[str, int], vocabulary: int
) -> QuantConfig:
    """The checkpoint's quantization config, checked against the widths of the model's inputs.

    Args:
        recipe: settings of the run.
        widths: input features of every group of layers; the first group reads the hidden states.
        embeddings: from `embedding_bits`.
        vocabulary: rows of the embedding.

    Raises:
        UserError: if a group or a rotation block does not divide a width, or a tensor-parallel shard of one.
    """
    table: dict[str, int] = {}
    shards = shard_widths(recipe, widths)
    for group, width in widths.items():
        if group.row_parallel and width % recipe.tensor_parallel:
            raise UserError(
                f"--tensor-parallel {recipe.tensor_parallel} does not divide {width} inputs of {group.name}"
            )
        block = recipe.rotation_block or shards[group]
        sizes = {"--group-size": recipe.group_size} | ({} if recipe.rotation == "none" else {"--rotation-block": block})
        for name, size in sorted(sizes.items(), reverse=True):
            if size > 0 and shards[group] % size:
                shard = f" ({width} / {recipe.tensor_parallel} in a shard)" if shards[group] != width else ""
                raise UserError(f"{name} {size} does not divide the {shards[group]} inputs of {group.name}{shard}")
        for kind in {layer.rsplit(".", 1)[-1] for layer in group.layers}:
            if table.setdefault(kind, block) != block:
                raise UserError(f"--rotation-block full: {kind} has {table[kind]} and {block} inputs; give a number")
    hidden = next(iter(widths.values()))
    table |= {name.rpartition(".")[2]: recipe.rotation_block or hidden for name in embeddings}
    sizes = list(table.values())
    default = max(set(sizes), key=sizes.count)
    blocks = {"default": default} | {name: size for name, size in table.items() if size != default}
    try:
        rotation = RotationConfig(recipe.rotation, blocks if recipe.rotation != "none" else {})
        kept = () if recipe.head_bits != UNPACKED else (HEAD,)
        rows = min(recipe.kept_tokens, vocabulary // KEPT_SHARE)
        tokens = dict.fromkeys(embeddings, rows) if rows else {}
        return QuantConfig(recipe.bits, recipe.group_size, recipe.zero_point, rotation, kept, embeddings, tokens)
    except FormatError as error:
        raise UserError(str(error)) from error
