"""The rows of the accuracy table: a name, the program that makes the row's checkpoint, and its arguments."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

CALIBRATE, BASELINE, PACKAGES = "bq-calibrate", "baselines/", "baselines/third_party/packages.py"
_FOLDER = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    `(our implementation)` in a name marks a published method that this project implements; rows of packages get the
    package's name and version.

    Attributes:
        label: its name.
        program: `bq-calibrate`, a module of benchmarks/baselines, or the script that runs packages.
        arguments: of the program, what all rows share left out.
    """

    label: str
    program: str
    arguments: str

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.label)

    @property
    def of_package(self) -> bool:
        """Whether the method is a package's own."""
        return self.program == PACKAGES

    def call(self, packages_python: Path) -> list[object]:
        """The command without arguments.

        Args:
            packages_python: interpreter of the environment that has the packages.
        """
        if self.program == CALIBRATE:
            return [Path(sys.executable).parent / CALIBRATE]
        if self.of_package:
            return [packages_python, _FOLDER / self.program]
        return [sys.executable, "-m", baseline_module(self.program)]


def baseline_module(program: str) -> str:
    """Name for `python -m` of `baselines/awq.py` and the like."""
    return f"benchmarks.{program.removesuffix('.py').replace('/', '.')}"


TOKENS, AWQ, OMNIQUANT, SPINQUANT = (f"{BASELINE}{name}.py" for name in ("tokens", "awq", "omniquant", "spinquant"))
_GPTQ = "--rounding gptq --refine 0 --rotation"
# levels are mid-rise with searched scales unless a name says otherwise; `min-max` is a range and an integer zero point
ROWS = [
    Row("RTN (our implementation)", CALIBRATE, "--rotation none --rounding rtn --refine 0"),
    Row("RTN, min-max", PACKAGES, "llm-compressor --method rtn --asym"),
    Row("GPTQ (our implementation)", CALIBRATE, f"{_GPTQ} none"),
    Row("GPTQ, min-max", PACKAGES, "llm-compressor --method gptq --asym"),
    Row("AWQ (our implementation)", AWQ, ""),
    Row("AWQ, min-max (our implementation)", AWQ, "--levels minmax"),
    Row("AWQ without clipping, min-max", PACKAGES, "llm-compressor --method awq --asym"),
    Row("OmniQuant-style clipping (our implementation)", OMNIQUANT, ""),
    Row("OmniQuant-style clipping, min-max (our implementation)", OMNIQUANT, "--levels minmax"),
    Row("AutoRound, symmetric", PACKAGES, "auto-round"),
    Row("AutoRound, asymmetric", PACKAGES, "auto-round --asym"),
    Row(
        "EfficientQAT-style: blocks, then all but the codes trained (our implementation)",
        CALIBRATE,
        "--recipe best --rotation none",
    ),
    Row(
        "QuIP-style: random butterfly + GPTQ (our implementation)",
        CALIBRATE,
        f"{_GPTQ} butterfly --rotation-block full --init random --steps 0",
    ),
    Row("Hadamard + GPTQ, full width (our implementation)", CALIBRATE, f"{_GPTQ} hadamard --rotation-block full"),
    Row("Hadamard + GPTQ, blocks of 64 (our implementation)", CALIBRATE, f"{_GPTQ} hadamard --rotation-block 64"),
    # what learned angles gain: `fast` without, `best` with them
    Row("Hadamard as `fast`", CALIBRATE, "--recipe fast"),
    Row("butterfly as `best`", CALIBRATE, "--recipe best --rotation butterfly"),
    Row("QuaRot: random Hadamard of the stream + GPTQ (our implementation)", SPINQUANT, "--steps 0"),
    Row("SpinQuant-style: learned rotation of the stream + GPTQ (our implementation)", SPINQUANT, ""),
    Row("butterfly `paper`", CALIBRATE, "--recipe paper"),
    Row("butterfly `fast`", CALIBRATE, "--recipe fast --rotation butterfly"),
    Row("`best`: Hadamard in blocks of 64", CALIBRATE, "--recipe best"),
    Row("`best` at 2.3 bits, all counted", CALIBRATE, "--recipe best --target-bpw 2.3"),
]
