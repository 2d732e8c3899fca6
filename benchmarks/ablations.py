"""What of the learned rotation matters: start, uniformity term, steps, block size, optimiser, samples, objective.

    python benchmarks/ablations.py MODEL [--dataset c4] [--blocks 3,15,27] [--out build/ablations] [--json FILE]

One setting is changed at a time, from those of the paper (arXiv 2509.09679) at blocks of --rotation-block. The rotation
of every input of some decoder blocks is learned on the inputs of the 16-bit model, the weights behind it are rounded by
GPTQ, and their output error is measured on windows that neither has seen. The last two lines learn any orthogonal
matrix in place of a butterfly, by Cayley SGD as SpinQuant (arXiv 2405.16406) does, on the same objective.

OUT keeps what has been measured; an interrupted run goes on there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from bq_calibration.data import calibration_tokens
from bq_calibration.model import SourceModel, block_output
from bq_calibration.quantize import output_error, round_gptq
from bq_calibration.rotation import MOST_ROWS, OBJECTIVES, Problem, Turn, initial_angles, learn
from provenance import claim, command, name_of, versions
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.append(str(Path(__file__).parent / "peers"))
from ours import cayley_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOKENS_A_FORWARD = 2048
CURVE_EVERY = 10  # steps between the points of a curve in the results
CAYLEY_RATES = (0.1, 1.0, 10.0)  # the best is shown


@dataclass(frozen=True)
class Setting:
    """How a rotation is learned.

    Attributes:
        block_size: features a block; None for the full width.
        samples: calibration windows; 0 for all.
        matrix: learn an orthogonal matrix by Cayley SGD, not a butterfly; lr and optimizer then do not count.
    """

    init: str = "identity"
    uniformity: float = 0.1
    steps: int = 500
    block_size: int | None = 64
    optimizer: str = "adam"
    lr: float = 0.01
    samples: int = 0
    objective: str = "output"
    matrix: bool = False


STEPS = {f"{steps} steps": {"steps": steps} for steps in (500, 200, 100, 50, 0)}
SIZES = {"full width": {"block_size": None}} | {f"blocks of {b}": {"block_size": b} for b in (192, 64, 32, 16)}
HADAMARD = {"init": "hadamard"}
# what is changed, and to what; the goal of a group is what its first line reaches
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "start": {kind: {"init": kind} for kind in ("identity", "hadamard", "random")},
    "uniformity": {f"λ = {weight}": {"uniformity": weight} for weight in (0.1, 0.0, 1.0)},
    "steps": STEPS,
    "steps from Hadamard": {name: change | HADAMARD for name, change in STEPS.items()},
    "optimiser": {"Adam": {}} | {f"SGD, {lr}": {"optimizer": "sgd", "lr": lr} for lr in (0.1, 1.0, 10.0)},
    "samples": {"all": {}} | {f"{samples} windows": {"samples": samples} for samples in (32, 8, 2)},
    "objective": {
        "output error": {},
        "expected GPTQ error": {"objective": "gptq"},
        "expected GPTQ error, from Hadamard": {"objective": "gptq"} | HADAMARD,
    },
    "block size": SIZES,
    "block size from Hadamard": {name: change | HADAMARD for name, change in SIZES.items()},
    "any orthogonal matrix": {
        "butterfly, Adam": {"uniformity": 0.0} | HADAMARD,
        "matrix, Cayley SGD": {"uniformity": 0.0, "matrix": True} | HADAMARD,
    },
}


@dataclass
class Case:
    """The layers of a decoder block that share an input.

    Attributes:
        name: block and layers.
        weight: float32 [N, K].
        hessians: float32 [K, K], mean of x xᵀ over the first so many windows.
        held_out: the same over windows that no setting sees.
        inputs: float32 [tokens, K], for the uniformity term.
    """

    name: str
    weight: torch.Tensor
    hessians: dict[int, torch.Tensor]
    held_out: torch.Tensor
    inputs: torch.Tensor


@torch.no_grad()
def cases(source: SourceModel, tokens: torch.Tensor, ends: list[int], blocks: list[int], progress: Progress):
    """Cases of some decoder blocks of the 16-bit model, one after the other.

    Args:
        tokens: int64 [windows, seqlen].
        ends: how many windows each Hessian is of, rising; windows after the last are held out.
        blocks: which.
    """
    hidden, arguments = source.embed(tokens)
    size = max(1, TOKENS_A_FORWARD // tokens.shape[1])
    task = progress.add_task("inputs", total=max(blocks) + 1)
    for index in range(max(blocks) + 1):
        with source.block(index) as block:
            found: dict[str, list[torch.Tensor]] = {group.layers[0]: [] for group in source.groups}
            kept: dict[str, torch.Tensor] = {}

            def hook(name, _module, args, found=found, kept=kept):
                x = args[0].flatten(0, -2).float()
                found[name][-1] += x.T @ x
                kept.setdefault(name, x[:: max(1, len(x) // (MOST_ROWS // 4))])

            handles = [
                source.linear(block, name).register_forward_pre_hook(partial(hook, name))
                for name in (found if index in blocks else ())
            ]
            for start, end in zip([0, *ends], [*ends, len(tokens)], strict=True):
                for name, sums in found.items():
                    sums.append(torch.zeros((source.linear(block, name).in_features,) * 2, device=source.device))
                for part in hidden[start:end].split(size):
                    part.copy_(block_output(block, part, arguments[index]))
            for handle in handles:
                handle.remove()
            for group in source.groups if index in blocks else ():
                *sums, last = found[group.layers[0]]
                totals = dict(zip(ends, torch.stack(sums).cumsum(0), strict=True))
                yield Case(
                    f"block {index}, {group.name}",
                    torch.cat([source.linear(block, name).weight for name in group.layers]).float(),
                    {end: total / end / tokens.shape[1] for end, total in totals.items()},
                    last / (len(tokens) - ends[-1]) / tokens.shape[1],
                    kept[group.layers[0]],
                )
        progress.advance(task)


class MatrixTurn(Turn):
    """A rotation by any orthogonal matrix a block, [blocks, b, b]; what Turn is for angles."""

    def __init__(self, matrices: torch.Tensor):
        self.transposed = matrices.mT


def learn_matrix(problem: Problem, setting: Setting, rate: float) -> tuple[Turn, list[float]]:
    """Cayley SGD with a cosine schedule, from the Hadamard matrix of the butterfly; loss at every step."""
    features = problem.weight.shape[1]
    start = initial_angles(setting.init, features, problem.block_size, torch.Generator().manual_seed(0))
    units = torch.eye(problem.block_size).repeat(1, len(start))
    rotated = Turn(start, problem.block_size).forward(units)
    matrices = list(rotated.unflatten(1, (len(start), -1)).permute(1, 2, 0).contiguous().unbind())
    losses: list[float] = []
    for step in range(setting.steps + 1):
        for matrix in matrices:
            matrix.requires_grad_(True)
        loss = OBJECTIVES[setting.objective](problem, MatrixTurn(torch.stack(matrices)))
        losses.append(loss.item())
        if step == setting.steps:
            break
        (loss / losses[0]).backward()
        for matrix in matrices:
            cayley_step(matrix, rate * 0.5 * (1 + math.cos(math.pi * step / setting.steps)))
    return MatrixTurn(torch.stack(matrices).detach()), losses


def measure(case: Case, setting: Setting, bits: int, group: int) -> dict[str, Any]:
    """Learn, round, and measure: held-out error relative to the output, loss at every step, seconds."""
    features = case.weight.shape[1]
    hessian = case.hessians[setting.samples or max(case.hessians)]
    block_size = setting.block_size or features
    rows = case.weight[:: max(1, len(case.weight) // MOST_ROWS)]
    problem = Problem(rows, hessian, case.inputs, block_size, bits, group)
    started, rate = time.monotonic(), None
    if setting.matrix:
        runs = {rate: learn_matrix(problem, setting, rate) for rate in CAYLEY_RATES}
        rate = min(runs, key=lambda rate: runs[rate][1][-1])
        turn, losses = runs[rate]
        seconds = (time.monotonic() - started) / len(runs)
    else:
        start = initial_angles(setting.init, features, block_size, torch.Generator().manual_seed(0))
        options = setting.objective, setting.optimizer, setting.lr, setting.steps, setting.uniformity
        angles, losses = learn(problem, start, *options)
        turn, seconds = Turn(angles.float(), block_size), time.monotonic() - started
    with torch.no_grad():
        turned = turn.forward(case.weight)
        rounded = round_gptq(turned, turn.hessian(hessian), bits, group, "midrise").weight()
        error = output_error(turned, rounded, turn.hessian(case.held_out))
    return {"case": case.name, "error": error, "losses": losses, "seconds": seconds, "rate": rate}


def share_by(losses: list[float], step: int) -> float:
    """Share of the whole gain that is there after some steps."""
    gain = losses[0] - min(losses)
    return (losses[0] - min(losses[: step + 1])) / gain if gain > 0 else 1.0


def steps_to(losses: list[float], goal: float) -> int | None:
    """The first step with a loss of `goal` or less."""
    return next((step for step, loss in enumerate(losses) if loss <= goal), None)


def summary(found: list[dict[str, Any]], goals: list[float]) -> dict[str, float | None]:
    """Geometric mean of the held-out errors; means over cases of the rest; None where a case misses its goal."""
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    reached = [steps_to(one["losses"], goal) for one, goal in zip(found, goals, strict=True)]
    return {
        "error": math.exp(mean([math.log(one["error"]) for one in found])),
        "gain by step 200": mean([share_by(one["losses"], 200) for one in found]),
        "steps": mean([len(one["losses"]) - 1 for one in found]),
        "steps to goal": None if None in reached else mean(reached),
        "seconds": mean([one["seconds"] for one in found]),
    }


def table_of(groups: dict[str, list[dict[str, Any]]]) -> Table:
    """A line a setting; `goal` is 1 % above the lowest loss of the group's first line, case by case."""
    names = (
        "what is changed",
        "to",
        "held-out error",
        "gain by step 200",
        "steps",
        "steps to goal",
        "seconds a rotation",
    )
    table = Table(*names)
    for name, lines in groups.items():
        for line in lines:
            s = line["summary"]
            goal = "not reached" if s["steps to goal"] is None else f"{s['steps to goal']:.0f}"
            cells = f"{s['error']:.4f}", f"{s['gain by step 200']:.0%}", f"{s['steps']:.0f}", goal
            table.add_row(name, line["value"], *cells, f"{s['seconds']:.1f}")
        table.add_section()
    return table


def curve(found: list[dict[str, Any]]) -> list[float]:
    """Geometric mean over cases of the objective at every step; a case that has converged stays where it is."""
    longest = max(len(one["losses"]) for one in found)
    padded = [one["losses"] + one["losses"][-1:] * (longest - len(one["losses"])) for one in found]
    return torch.tensor(padded).log().mean(0).exp()[::CURVE_EVERY].tolist()


def plot(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Objective against the step; a picture a group."""
    columns = 3
    lines = math.ceil(len(groups) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(15, 4 * lines), squeeze=False)
    for axis, (name, found) in zip(axes.flat, groups.items(), strict=False):
        for line in found:
            steps = range(0, CURVE_EVERY * len(line["curve"]), CURVE_EVERY)
            axis.plot(steps, line["curve"], marker="." if len(steps) == 1 else None, label=line["value"])
        axis.set(title=name, xlabel="step", ylabel="objective, geometric mean")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    model: Annotated[Path, typer.Argument(help="The 16-bit model.")],
    bits: Annotated[int, typer.Option(help="Bits per code.")] = 2,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 64,
    rotation_block: Annotated[int, typer.Option(help="Features a block where nothing else is said.")] = 64,
    dataset: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    held_out: Annotated[int, typer.Option(help="Windows on which errors are measured.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    blocks: Annotated[str, typer.Option(help="Decoder blocks, separated by commas.")] = "3,15,27",
    steps: Annotated[int, typer.Option(help="Most steps of learning.")] = 500,
    only: Annotated[list[str], typer.Option(help="Groups of settings; all by default.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder for what is measured.")] = Path("build/ablations"),
    as_json: Annotated[Path, typer.Option("--json", help="Results; a .png lies beside.")] = Path(
        "benchmarks/results/ablations.json"
    ),
) -> None:
    """Measure every setting on every case, print the table, write the results and draw the curves."""
    console, base = Console(width=140), Setting(block_size=rotation_block, steps=steps)
    chosen = {name: changes for name, changes in CHANGES.items() if not only or name in only}
    settings = {
        (name, value): dataclasses.replace(base, **change | {"steps": min(steps, change.get("steps", steps))})
        for name, changes in chosen.items()
        for value, change in changes.items()
    }
    shared = {
        "model": str(model.resolve()),
        "dataset": dataset,
        "samples": samples,
        "held_out": held_out,
        "seqlen": seqlen,
        "bits": bits,
        "group": group_size,
    }
    claim(out, shared)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in settings}
    source = SourceModel(str(model), torch.device("cpu"))
    tokens = calibration_tokens(source.tokenizer(), dataset, samples + held_out, seqlen, 0)
    ends = sorted({samples, *(setting.samples for setting in settings.values() if 0 < setting.samples < samples)})
    with Progress() as progress:
        wanted = [int(index) for index in blocks.split(",")]
        task = progress.add_task("settings", total=len(settings) * len(wanted) * len(source.groups))
        for case in cases(source, tokens, ends, wanted, progress):
            for key, setting in settings.items():
                setting = dataclasses.replace(setting, samples=min(setting.samples, samples) % samples)
                name = "_".join(map(str, dataclasses.astuple(setting)))
                file = out / case.name.replace(",", "").replace(" ", "-") / f"{name}.json"
                if not file.exists():
                    file.parent.mkdir(exist_ok=True)
                    file.write_text(json.dumps(measure(case, setting, bits, group_size)))
                found[key].append(json.loads(file.read_text()))
                progress.advance(task)
    groups = {}
    for name, changes in chosen.items():
        first = found[name, next(iter(changes))]
        goals = [1.01 * min(one["losses"]) for one in first]
        groups[name] = [
            {
                "value": value,
                "setting": dataclasses.asdict(settings[name, value]),
                "summary": summary(found[name, value], goals),
                "errors": {one["case"]: one["error"] for one in found[name, value]},
                "curve": curve(found[name, value]),
            }
            for value in changes
        ]
    console.print(table_of(groups))
    as_json.parent.mkdir(parents=True, exist_ok=True)
    named = {"model": model.name, "dataset": name_of(dataset), "blocks": blocks}
    result = {"command": command(), "versions": versions("torch"), "settings": shared | named, "groups": groups}
    as_json.write_text(json.dumps(result) + "\n")
    plot(groups, as_json.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
