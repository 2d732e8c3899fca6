"""The settings of a calibration run, each a flag of `bq-calibrate`, and the named recipes.

Nothing here imports torch: the flags of the command are generated from `Recipe`, and help has to be quick.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bq_kernels.format import BITS, HEAD, ROTATION_KINDS, ZERO_POINTS

from .errors import UserError
from .schedule import SCHEDULES

USUAL_GROUP = 64  # columns that share a scale, unless a flag says otherwise
SENSITIVITY_SAMPLES = 8  # sequences that decide which layers get more bits
TRAINED_GROUP = 256  # most columns that share a scale with --group-size auto where scales train end to end
UNPACKED = 16  # bits of an embedding or LM head that stays as it is
FORMAT, ROTATION, ROUNDING, TRAINING, DATA = "Format", "Rotation", "Rounding", "Training", "Data"  # sections of --help
OPTIMIZER_BITS = (32, 8)


def _setting(
    default: Any,
    section: str,
    text: str,
    *,
    choices: tuple = (),
    least: float | None = None,
    most: float | None = None,
    tokens: bool = False,
    unset: str = "none",
) -> Any:
    """A field of Recipe.

    Args:
        default: value of a recipe that does not name it.
        section: of --help.
        text: in --help.
        choices: values it takes, if these are few.
        least: value it takes.
        most: value it takes.
        tokens: whether it counts tokens.
        unset: word for None.
    """
    metadata = {"section": section, "text": text, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata | {"tokens": tokens, "unset": unset})


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; each is a flag of `bq-calibrate` with `-` for `_`."""

    bits: int = _setting(2, FORMAT, "Bits per weight code.", choices=BITS)
    target_bpw: float | None = _setting(
        None,
        FORMAT,
        "Bits per weight, all that is stored counted, up to which sensitive layers get more bits.",
        least=2,
        most=8,
    )
    group_size: int | None = _setting(
        USUAL_GROUP,
        FORMAT,
        "Columns that share a scale; -1 for the whole row; auto: the whole row, or up to "
        f"{TRAINED_GROUP} if scales train end to end, and what that saves against groups of {USUAL_GROUP} gives "
        "sensitive layers more bits.",
        unset="auto",
    )
    zero_point: str = _setting(
        "midrise", FORMAT, "Levels: symmetric ones without a zero, or a float zero per group.", choices=ZERO_POINTS
    )
    embedding_bits: int = _setting(
        UNPACKED, FORMAT, "Bits of the embedding; 16 leaves it unquantized.", choices=(*BITS, UNPACKED)
    )
    head_bits: int = _setting(
        UNPACKED,
        FORMAT,
        "Bits of the LM head; where it is tied to the embedding, both have the same.",
        choices=(*BITS, UNPACKED),
    )
    kept_tokens: int = _setting(
        768,
        FORMAT,
        "Most frequent tokens, up to a sixteenth of all, whose rows of a quantized embedding or LM head keep 16 bits.",
        least=0,
    )
    unquantized_dtype: str = _setting(
        "auto",
        FORMAT,
        "What is not quantized: bfloat16 where the source is float32, or as in the source.",
        choices=("auto", "source"),
    )
    tensor_parallel: int = _setting(
        1, FORMAT, "GPUs: rotation blocks and groups stay inside the shards of row-parallel layers.", least=1
    )
    rotation: str = _setting("butterfly", ROTATION, "Kind of rotation.", choices=ROTATION_KINDS)
    rotation_block: int | None = _setting(
        64, ROTATION, "Features that a rotation mixes, or full.", least=2, unset="full"
    )
    init: str = _setting(
        "hadamard", ROTATION, "Angles that learning starts from.", choices=("identity", "hadamard", "random")
    )
    objective: str = _setting(
        "output",
        ROTATION,
        "The angles minimise the output error (the paper's) or the error to expect of GPTQ.",
        choices=("output", "gptq"),
    )
    optimizer: str = _setting("adam", ROTATION, "Adam, or SGD with a cosine schedule.", choices=("adam", "sgd"))
    lr: float = _setting(0.01, ROTATION, "Learning rate of the angles.", least=1e-9, most=1e3)
    steps: int = _setting(60, ROTATION, "Most steps of learning per rotation.", least=0)
    uniformity: float = _setting(0.0, ROTATION, "Weight λ of the paper's uniformity term.", least=0, most=1e6)
    rounding: str = _setting("gptq", ROUNDING, "To the nearest level, or with error feedback.", choices=("rtn", "gptq"))
    correction: float = _setting(
        0.0,
        ROUNDING,
        "Share, 0 to 1, of the inputs' error from earlier layers that a layer's rounding makes up for (GPTAQ).",
        least=0,
        most=1,
    )
    refine: int = _setting(0, ROUNDING, "Sweeps that refine codes and scales after rounding.", least=0)
    compare: bool = _setting(
        True, ROUNDING, "Also measure simpler rotations for the report, up to a third of the time of rounding."
    )
    block_tokens: int = _setting(
        0, TRAINING, "Block-wise QAT (Block-AP): tokens per decoder layer.", least=0, tokens=True
    )
    train_tokens: int = _setting(0, TRAINING, "End-to-end training: tokens.", least=0, tokens=True)
    train_codes: bool = _setting(
        False, TRAINING, "Codes move in end-to-end training; else only scales, zeros, angles and norms."
    )
    tokens_per_step: int = _setting(2048, TRAINING, "End-to-end training: tokens per step.", least=1, tokens=True)
    schedule: str = _setting(
        "cosine",
        TRAINING,
        "Learning rates fall all the way, or (wsd) in the last fifth: such a run can be extended.",
        choices=SCHEDULES,
    )
    train_lr: float = _setting(
        5e-3,
        TRAINING,
        "Peak learning rate of scales and zeros in end-to-end training; angles take 0.4 of it, 0.1 norms, and scales "
        "and zeros of an embedding and LM head.",
        least=0,
        most=1,
    )
    code_lr: float = _setting(
        5e-3, TRAINING, "Peak learning rate of codes in end-to-end training, in steps of theirs.", least=0, most=1
    )
    optimizer_bits: int | None = _setting(
        None,
        TRAINING,
        "Bits of the moments of codes, with 8 the codes themselves take 16; auto takes 32 where they fit into memory.",
        choices=OPTIMIZER_BITS,
        unset="auto",
    )
    compile: str = _setting(
        "auto",
        TRAINING,
        "Compile decoder layers for end-to-end training; auto does on a GPU.",
        choices=("auto", "on", "off"),
    )
    dataset: str = _setting("c4", DATA, "wikitext2, c4, self, a .txt/.jsonl/.parquet file; or several: A,B.")
    mix: str | None = _setting(
        None,
        DATA,
        "Text of end-to-end training, rows shared out by weight: NAME[:WEIGHT],…, each as for --dataset or org/name of "
        "the Hub; else the sequences of --dataset.",
    )
    decontaminate: str | None = _setting(
        None,
        DATA,
        "Evaluation texts to keep out of --mix: A,B, or none; wikitext2 and c4 if it takes text from the Hub.",
        unset="by --mix",
    )
    samples: int = _setting(128, DATA, "Sequences for rounding.", least=1)
    train_samples: int = _setting(128, DATA, "Sequences for training, those for rounding among them.", least=1)
    held_out: int = _setting(8, DATA, "Further sequences on which the report measures what training gains.", least=0)
    seqlen: int = _setting(2048, DATA, "Tokens per sequence.", least=2)
    block_seqlen: int | None = _setting(
        None,
        DATA,
        "Tokens per sequence in rounding and block-wise training: parts of the sequences, or whole ones.",
        least=2,
        unset="whole",
    )
    seed: int = _setting(0, DATA, "Seed of everything random.", least=0, most=2**63 - 1)

    @property
    def trains(self) -> bool:
        """Whether blocks or the whole model are trained."""
        return bool(self.block_tokens or self.train_tokens)

    @property
    def shares_windows(self) -> bool:
        """Whether end-to-end training reads the windows that block-wise training leads through the 16-bit model."""
        return bool(self.block_tokens and self.train_tokens and self.mix is None and self.parts == 1)

    @property
    def parts(self) -> int:
        """Into how many parts rounding and block-wise training cut a sequence."""
        return 1 if self.block_seqlen is None else self.seqlen // self.block_seqlen

    def of_blocks(self) -> Recipe:
        """The recipe for rounding and block-wise training: sequences cut into parts of `block_seqlen`."""
        counts = {name: self.parts * getattr(self, name) for name in ("samples", "train_samples", "held_out")}
        return dataclasses.replace(self, **counts, seqlen=self.seqlen // self.parts, block_seqlen=None)

    def bits_of_embedding(self, name: str) -> int:
        """Bits of the embedding or the LM head, by its name."""
        return self.head_bits if name.endswith(HEAD) else self.embedding_bits

    @property
    def read_windows(self) -> int:
        """Sequences to round and train on; they come first."""
        return max(self.samples, self.train_samples) if self.trains else self.samples

    @property
    def windows(self) -> int:
        """Sequences that the run asks for, those that are held out among them."""
        return self.read_windows + self.held_out * self.trains

    @property
    def samples_per_step(self) -> int:
        """Sequences per step of end-to-end training."""
        return max(1, self.tokens_per_step // self.seqlen)

    @property
    def train_steps(self) -> int:
        """Steps of end-to-end training."""
        return -(-self.train_tokens // (self.samples_per_step * self.seqlen))

    @property
    def text_samples(self) -> int:
        """Sequences of the text of end-to-end training, those that are held out among them."""
        return self.windows if self.mix is None else self.held_out + self.train_steps * self.samples_per_step

    def fitted(self, windows: int) -> Recipe:
        """The recipe for data of fewer sequences than it asks for: nothing that is held out is rounded or trained on.

        Raises:
            UserError: if not even one sequence is left to train on.
        """
        if windows >= self.windows:
            return self
        held_out = min(self.held_out, windows // 4) if self.trains else self.held_out
        rest = windows - held_out if self.trains else windows
        return dataclasses.replace(
            self, samples=min(self.samples, rest), train_samples=min(self.train_samples, rest), held_out=held_out
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the report holds them."""
        return dataclasses.asdict(self)


RECIPES: dict[str, Recipe] = {
    # the most accurate within a few minutes on two cores. Learned angles gain 1 % where a row has one scale
    "fast": Recipe(group_size=None, rotation="hadamard", refine=4, samples=64, seqlen=512),
    # every block rounded behind a Hadamard and then trained, codes and all; then all but the codes end to end. Angles
    # that are learned and trained too end no lower, so their bits are saved
    "best": Recipe(
        rotation="hadamard",
        refine=4,
        samples=128,
        train_samples=640,
        seqlen=512,
        block_tokens=245_760,
        train_tokens=327_680,
    ),
    # codes trained end to end on as many tokens as a GPU gets through in minutes to hours; blocks need no training of
    # their own then. The rates are those that a study on an H100 found for so many steps (docs/results.md)
    "max": Recipe(
        rotation="hadamard",
        refine=2,
        compare=False,
        held_out=16,
        train_tokens=30_000_000,
        train_codes=True,
        tokens_per_step=32_768,
        train_lr=1e-3,
        code_lr=2e-3,
        schedule="wsd",
        mix="c4:2,wikitext2:1,self:4",
    ),
    # arXiv 2509.09679: full width, identity start, Adam at 0.01 for at most 500 steps, uniformity on, 128 samples
    "paper": Recipe(
        rotation_block=None,
        init="identity",
        steps=500,
        uniformity=0.1,
    ),
}


def flag(field: str) -> str:
    """The flag of a setting."""
    return "--" + field.replace("_", "-")


def make_recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    """A named recipe with some settings replaced.

    Raises:
        UserError: for an unknown recipe or setting, or a value that a setting does not take.
    """
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: unknown; known are {', '.join(RECIPES)}")
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if unknown := sorted(set(overrides) - set(fields)):
        raise UserError(f"{flag(unknown[0])}: no such setting; known are {', '.join(map(flag, fields))}")
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    for field in fields.values():
        value, allowed = getattr(recipe, field.name), field.metadata
        least, most, choices = allowed["least"], allowed["most"], allowed["choices"]
        if value is None:
            if field.type.endswith("None"):
                continue
            raise UserError(f"{flag(field.name)}: expected a value")
        if choices and value not in choices:
            raise UserError(f"{flag(field.name)} {value}: expected one of {', '.join(map(str, choices))}")
        if least is not None and not value >= least:  # NaN is not
            raise UserError(f"{flag(field.name)} {value}: expected at least {least}")
        if most is not None and not value <= most:
            raise UserError(f"{flag(field.name)} {value}: expected at most {most}")
    if recipe.block_seqlen is not None and recipe.seqlen % recipe.block_seqlen:
        raise UserError(f"--block-seqlen {recipe.block_seqlen} does not divide --seqlen {recipe.seqlen}")
    return recipe
