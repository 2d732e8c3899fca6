"""What matters in end-to-end training, on a small real problem: the first layers of a model as a model of their own.

    python benchmarks/training.py MODEL --dataset c4 [--layers 6] [--tokens 128k] [--only QUESTION,…] [--json FILE]

One thing is changed at a time. Every arm starts from the same rounded model (but for arms on rounding), sees the same
tokens in the same order, and is measured by its KL to the 16-bit model on text that none has seen. Test text plays no
part. OUT keeps starts and measurements; an interrupted run goes on there.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bq_calibration import end_to_end
from bq_calibration.data import calibration_tokens, dataset_name
from bq_calibration.end_to_end import TrainingText, held_out, train_model
from bq_calibration.model import SourceModel
from bq_calibration.pipeline import Calibration
from bq_calibration.quantize_blocks import BLOCKS, quantize_blocks
from bq_calibration.recipes import Recipe, make_recipe
from bq_calibration.schedule import parse_tokens
from bq_calibration.sensitivity import mixed_bits
from bq_calibration.store import TensorStore
from bq_calibration.teacher import StoredTeacher, teacher_states
from bq_calibration.train import Curve
from bq_calibration.training_plan import training_plan
from bq_calibration.workspace import Workspace
from bq_kernels.format import QuantConfig
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.provenance import claim_folder, command, cpu, versions
from benchmarks.harness.results import finish
from benchmarks.harness.settings import parsed
from benchmarks.training_ablations.arms import ARMS, Arm
from benchmarks.training_ablations.report import table_of
from benchmarks.training_ablations.truncate import truncate
from benchmarks.training_ablations.variants import Vocabulary, in_place

# what all arms share unless they say otherwise
COMMON: dict[str, Any] = {
    "group_size": 64,
    "rotation": "hadamard",
    "compare": False,
    "refine": 2,
    "samples": 32,
    "train_samples": 120,
    "seqlen": 512,
    "train_codes": True,
    "tokens_per_step": 1024,
    "code_lr": 2e-3,
}
HELD_OUT = 8  # windows

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """The small model, and the text of its training."""

    source: SourceModel
    folder: Path
    text: TrainingText
    teacher: StoredTeacher
    vocabulary: Vocabulary
    common: dict[str, Any]
    out: Path

    def recipe(self, arm: Arm, tokens: int, seed: int) -> Recipe:
        """All settings of one training."""
        return make_recipe("fast", self.common | {"train_tokens": tokens, "seed": seed} | arm.recipe)

    def start(self, recipe: Recipe, progress: Progress) -> tuple[QuantConfig, Path]:
        """The rounded model of a recipe, made unless it is there, seed 0: its format and the folder of its tensors."""
        base = Recipe()
        training = (
            "train_tokens",
            "train_codes",
            "tokens_per_step",
            "schedule",
            "train_lr",
            "code_lr",
            "optimizer_bits",
            "seed",
        )
        rounding = dataclasses.replace(recipe, **{name: getattr(base, name) for name in training})
        name = "-".join(f"{key}={value}" for key, value in rounding.to_dict().items() if value != getattr(base, key))
        work = Workspace(self.out / "starts" / name.replace("/", "_"), resume=True)
        work.path.mkdir(parents=True, exist_ok=True)
        tokens = self.text.tokens[self.text.held_out :]
        config = Calibration(str(self.folder), str(self.out / "unused"), rounding, "cpu").config
        if recipe.target_bpw is not None:
            bits = work.json("module_bits", lambda: mixed_bits(self.source, config, rounding, tokens, progress))
            config = dataclasses.replace(config, module_bits=bits)
        fitted = dataclasses.replace(rounding, held_out=0, train_samples=len(tokens))
        quantize_blocks(self.source, config, fitted, tokens, work, progress)
        return config, work.path / BLOCKS

    def measure(self, arm: Arm, tokens: int, seed: int, progress: Progress) -> dict[str, Any]:
        """Train one arm: its divergence on held-out text before and after, and its time."""
        recipe = self.recipe(arm, tokens, seed)
        config, folder = self.start(recipe, progress)
        packed = TensorStore(folder)
        plan = training_plan(self.source, recipe, 10**11)
        curve, started = Curve(), time.monotonic()
        with in_place(arm, recipe.train_steps, self.vocabulary) as made:
            before = held_out(end_to_end.Student(self.source, config, packed), self.text, self.teacher)
            _, report = train_model(
                self.source,
                config,
                recipe,
                packed,
                self.text,
                self.teacher,
                plan,
                (None, None),
                curve,
                progress,
                arm.rates,
            )
        seconds = time.monotonic() - started
        made[-1].take_average()
        after = held_out(made[-1], self.text, self.teacher) if arm.average else report["held_out_divergence"]
        course = [report["losses"][0], sum(report["losses"][-10:]) / len(report["losses"][-10:])]
        return {"before": before, "after": after, "training_loss": course, "seconds": round(seconds, 1)}


def make_small_model(
    model: Path,
    dataset: str,
    layers: int,
    tokens: int,
    vocabulary: int,
    common: dict[str, Any],
    out: Path,
    progress: Progress,
) -> SmallModel:
    """The small model and its text, computed unless they are there."""
    windows = -(-tokens // common["seqlen"])
    folder = truncate(model, layers, out)
    source = SourceModel(str(folder), torch.device("cpu"))
    rows = calibration_tokens(source.tokenizer(), dataset, windows + HELD_OUT, common["seqlen"], 0)
    if len(rows) < windows + HELD_OUT:
        raise typer.BadParameter(f"{dataset}: fills {len(rows)} windows, {windows + HELD_OUT} are needed")
    work = Workspace(out / "teacher", resume=True)
    work.path.mkdir(parents=True, exist_ok=True)
    states = work.tensors("states", lambda: {"states": teacher_states(source, rows, progress)})["states"]
    teacher = StoredTeacher(states, source.device)
    frequent = Vocabulary(rows, vocabulary, source.vocabulary)
    return SmallModel(source, folder, TrainingText(rows, HELD_OUT, shuffled=True), teacher, frequent, common, out)


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Argument(help="The 16-bit model.")],
    dataset: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "c4",
    layers: Annotated[int, typer.Option(help="Decoder layers of the small model.")] = 6,
    tokens: Annotated[str, typer.Option(help="Tokens per arm; no window is seen twice.")] = "128k",
    vocabulary: Annotated[int, typer.Option(help="Most frequent tokens, between which the models choose.")] = 12_288,
    changes: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a setting that all share.")] = None,
    only: Annotated[str, typer.Option(help=f"Of {', '.join(ARMS)}; all by default.")] = "",
    minutes: Annotated[float, typer.Option(help="No arm is begun after that time.")] = float("inf"),
    out: Annotated[Path, typer.Option(help="Folder that keeps starts and measurements.")] = Path("build/training"),
    as_json: Annotated[Path | None, typer.Option("--json", help="Results; OUT/results.json by default.")] = None,
) -> None:
    """The command."""
    chosen = [name for name in only.split(",") if name] or list(ARMS)
    if unknown := sorted(set(chosen) - set(ARMS)):
        raise typer.BadParameter(f"--only {unknown[0]}: expected one of {', '.join(ARMS)}")
    count, console, common = parse_tokens(tokens), Console(), COMMON | parsed(changes or [])
    settings = {"model": str(model.resolve()), "dataset": dataset, "layers": layers, "tokens": count}
    settings |= {"vocabulary": vocabulary}
    claim_folder(out, settings | {"common": common})
    results: dict[str, dict[str, Any]] = {}
    left_out, started = {}, time.monotonic()
    with Progress(console=Console(stderr=True)) as progress:
        small = make_small_model(model, dataset, layers, count, vocabulary, common, out, progress)
        for question in chosen:
            results[question] = {}
            for name, arm in ARMS[question].items():
                rows = []
                for seed in (0, *arm.seeds):
                    file = out / "measured" / f"{question}-{name}-{seed}.json".replace(" ", "-").replace("/", "_")
                    if not file.exists() and time.monotonic() - started > 60 * minutes:
                        left_out[f"{question}, {name}, seed {seed}"] = "not measured yet; run again to go on"
                        continue
                    if not file.exists():
                        file.parent.mkdir(exist_ok=True)
                        file.write_text(json.dumps(small.measure(arm, count, seed, progress)))
                    rows.append(json.loads(file.read_text()))
                if not rows:
                    continue
                results[question][name] = rows
                console.print(f"{question}, {name}: {[round(row['after'], 4) for row in rows]}")
    record = {
        "command": command(),
        "device": cpu(),
        "versions": versions("torch", "transformers"),
        "share_of_vocabulary": small.vocabulary.share,
        "settings": settings | {"model": model.name, "dataset": dataset_name(dataset), "common": common},
        "results": results,
        "left_out": left_out,
    }
    finish(console, record, as_json or out / "results.json", [table := table_of(record)], markdown=table)
