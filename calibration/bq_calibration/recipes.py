"""What a calibration run is told: every setting with its name on the command line, and the named recipes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bq_kernels.format import FormatError, QuantConfig, RotationConfig

from .architecture import InputGroup
from .errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; each is a flag of `bq-calibrate`.

    Attributes:
        target_bpw: bits a weight, all that is stored counted, up to which layers get more than `bits`, by sensitivity.
        rotation_block: features that a rotation mixes; None stands for the full width of the input.
        objective: what the angles minimise: `output`, the paper's ‖W x − W′_q Q x‖² through a straight-through
            quantizer, or `gptq`, the error to expect of GPTQ.
        uniformity: weight λ of the paper's uniformity term.
        refine: sweeps of coordinate descent over codes and least squares for scales after rounding.
        reconstruct: steps of training of a decoder block after it is rounded: codes, scales, zeros, angles, norms.
        finetune: steps of end-to-end training of the same, once all blocks are done. Holds 18 bytes a weight.
        distill: steps of end-to-end training of all but the codes, at the end. Holds packed codes and 20 bytes
            a group.
        samples: sequences that rounding looks at.
        train_samples: sequences for training, of blocks and end to end, those of `samples` among them.
        held_out: further sequences, never trained on, on which the report measures what training gains.
        tensor_parallel: rotation blocks and groups of row-parallel layers stay inside a shard at this many GPUs.
    """

    bits: int = 2
    target_bpw: float | None = None
    group_size: int = 64
    zero_point: str = "midrise"
    rotation: str = "butterfly"
    rotation_block: int | None = 64
    init: str = "hadamard"
    objective: str = "output"
    optimizer: str = "adam"
    lr: float = 0.01
    steps: int = 60
    uniformity: float = 0.0
    rounding: str = "gptq"
    refine: int = 0
    reconstruct: int = 0
    finetune: int = 0
    distill: int = 0
    tensor_parallel: int = 1
    dataset: str = "c4"
    samples: int = 128
    train_samples: int = 128
    held_out: int = 8
    seqlen: int = 2048
    seed: int = 0

    @property
    def trains(self) -> bool:
        """Whether blocks or the whole model are trained."""
        return bool(self.reconstruct) or self.trains_end_to_end

    @property
    def trains_end_to_end(self) -> bool:
        """Whether the whole model is trained once its blocks are done."""
        return bool(self.finetune or self.distill)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the report holds them."""
        return dataclasses.asdict(self)


RECIPES: dict[str, Recipe] = {
    # what is best within a few minutes on two cores
    "fast": Recipe(refine=4, samples=64, seqlen=512),
    # every block rounded behind a Hadamard and then trained, codes and all; then all but the codes end to end. Angles
    # that are learned and trained too end no lower, so their bits are saved
    "best": Recipe(
        rotation="hadamard",
        refine=4,
        samples=128,
        train_samples=640,
        seqlen=512,
        reconstruct=480,
        distill=160,
    ),
    # arXiv 2509.09679: full width, identity start, Adam at 0.01 for at most 500 steps, uniformity on, 128 samples
    "paper": Recipe(
        rotation_block=None,
        init="identity",
        steps=500,
        uniformity=0.1,
    ),
}
CHOICES = {
    "bits": (2, 3, 4),
    "zero_point": ("midrise", "float"),
    "rotation": ("butterfly", "hadamard", "none"),
    "init": ("identity", "hadamard", "random"),
    "objective": ("output", "gptq"),
    "optimizer": ("adam", "sgd"),
    "rounding": ("rtn", "gptq"),
}


def make_recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    """A named recipe with some settings replaced.

    Raises:
        UserError: for an unknown recipe or a value that a setting does not take.
    """
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: unknown; known are {', '.join(RECIPES)}")
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    for field, allowed in CHOICES.items():
        if getattr(recipe, field) not in allowed:
            flag = field.replace("_", "-")
            raise UserError(f"--{flag} {getattr(recipe, field)}: expected one of {', '.join(map(str, allowed))}")
    for field, least in {
        "samples": 1,
        "seqlen": 2,
        "steps": 0,
        "refine": 0,
        "reconstruct": 0,
        "finetune": 0,
        "distill": 0,
        "train_samples": 1,
        "held_out": 0,
        "tensor_parallel": 1,
    }.items():
        if getattr(recipe, field) < least:
            raise UserError(f"--{field.replace('_', '-')}: expected at least {least}")
    if not recipe.lr > 0:
        raise UserError("--lr: expected a positive number")
    return recipe


def quant_config(recipe: Recipe, widths: dict[InputGroup, int]) -> QuantConfig:
    """The checkpoint's quantization config, checked against the widths of the model's inputs.

    Args:
        recipe: settings of the run.
        widths: input features of every group of layers.

    Raises:
        UserError: if a group or a rotation block does not divide a width, or a tensor-parallel shard of one.
    """
    table: dict[str, int] = {}
    shards = {
        group: width // recipe.tensor_parallel if group.row_parallel else width for group, width in widths.items()
    }
    for group, width in widths.items():
        if group.row_parallel and width % recipe.tensor_parallel:
            raise UserError(
                f"--tensor-parallel {recipe.tensor_parallel} does not divide {width} inputs of {group.name}"
            )
        block = recipe.rotation_block or shards[group]
        for what, size in (("--rotation-block", block), ("--group-size", recipe.group_size)):
            if size > 0 and shards[group] % size and not (what == "--rotation-block" and recipe.rotation == "none"):
                shard = f" ({width} / {recipe.tensor_parallel} in a shard)" if shards[group] != width else ""
                raise UserError(f"{what} {size} does not divide the {shards[group]} inputs of {group.name}{shard}")
        for layer in group.layers:
            table[layer.rsplit(".", 1)[-1]] = block
    sizes = list(table.values())
    default = max(set(sizes), key=sizes.count)
    blocks = {"default": default} | {name: size for name, size in table.items() if size != default}
    try:
        rotation = RotationConfig(recipe.rotation, blocks if recipe.rotation != "none" else {})
        return QuantConfig(recipe.bits, recipe.group_size, recipe.zero_point, rotation, ("lm_head",))
    except FormatError as error:
        raise UserError(str(error)) from error
