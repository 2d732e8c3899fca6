"""Accuracy of a model at a few bits by method: same model, calibration tokens and group size, all bits counted.

    python benchmarks/accuracy.py MODEL [--bits 2 --bits 3] [--dataset c4] [--perplexity wikitext2 --perplexity c4]
        [--tasks hellaswag,mmlu:20 [--limit 500]] [--seed 0 --seed 1] [--only AWQ] [--peers-python PATH]
        [--out build/accuracy] [--json FILE]

A row is one command that writes a checkpoint and one `bq-eval` for every data set and task. What OUT already holds is
used again, so an interrupted run goes on where it stopped. A row whose command fails is left out, with the reason; its
whole output is in OUT/BITS/ROW.log. Real packages run under --peers-python, for their requirements may not go together
with ours: pip install auto-round llmcompressor.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from rich import box
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator
from provenance import claim, command, name_of, versions

BIN, PEERS = Path(sys.executable).parent, Path(__file__).parent / "peers"
EDGE = 20  # times the perplexity of 16 bits: what is worse stands there in the plot
PEERS_MARKERS = "osD"  # a marker for every ten colours
CALIBRATE, OURS, PACKAGES = "bq-calibrate", "ours.py", "packages.py"


@dataclass(frozen=True)
class Row:
    """A row of the table: its name, the program that makes its checkpoint, and that program's arguments.

    `(ours)` in a name: a method of others that this repository implements; rows of packages get name and version.
    """

    label: str
    program: str
    arguments: str

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.label)


GPTQ = "--rounding gptq --refine 0 --rotation"
# levels are mid-rise with searched scales where no others are named; `min-max` is a range and an integer zero point
ROWS = [
    Row("RTN (ours)", CALIBRATE, "--rotation none --rounding rtn --refine 0"),
    Row("RTN, min-max", PACKAGES, "llm-compressor --method rtn --asym"),
    Row("GPTQ (ours)", CALIBRATE, f"{GPTQ} none"),
    Row("GPTQ, min-max", PACKAGES, "llm-compressor --method gptq --asym"),
    Row("AWQ (ours)", OURS, "awq"),
    Row("AWQ, min-max (ours)", OURS, "awq --levels minmax"),
    Row("AWQ without clipping, min-max", PACKAGES, "llm-compressor --method awq --asym"),
    Row("OmniQuant-style clipping (ours)", OURS, "omniquant"),
    Row("OmniQuant-style clipping, min-max (ours)", OURS, "omniquant --levels minmax"),
    Row("AutoRound, symmetric", PACKAGES, "auto-round"),
    Row("AutoRound, asymmetric", PACKAGES, "auto-round --asym"),
    Row(
        "EfficientQAT-style: blocks, then all but the codes trained (ours)", CALIBRATE, "--recipe best --rotation none"
    ),
    Row(
        "QuIP-style: random butterfly + GPTQ (ours)",
        CALIBRATE,
        f"{GPTQ} butterfly --rotation-block full --init random --steps 0",
    ),
    Row("Hadamard + GPTQ, full width (ours)", CALIBRATE, f"{GPTQ} hadamard --rotation-block full"),
    Row("Hadamard + GPTQ, blocks of 64 (ours)", CALIBRATE, f"{GPTQ} hadamard --rotation-block 64"),
    # what learned angles are worth: `fast` without, `best` with them
    Row("Hadamard as `fast` (ours)", CALIBRATE, "--recipe fast --rotation hadamard"),
    Row("butterfly as `best`", CALIBRATE, "--recipe best --rotation butterfly"),
    Row("QuaRot: random Hadamard of the stream + GPTQ (ours)", OURS, "spinquant --steps 0"),
    Row("SpinQuant-style: learned rotation of the stream + GPTQ (ours)", OURS, "spinquant"),
    Row("butterfly `paper`", CALIBRATE, "--recipe paper"),
    Row("butterfly `fast`", CALIBRATE, "--recipe fast"),
    Row("`best`: Hadamard in blocks of 64", CALIBRATE, "--recipe best"),
    Row("`best` at 2.3 bits, all counted", CALIBRATE, "--recipe best --target-bpw 2.3"),
]


class LeftOut(Exception):
    """Why a row is not in the table."""


def run(command: list[object], log: Path) -> None:
    """Run a command with its output in a file.

    Raises:
        LeftOut: if it fails, with the last line that it printed.
    """
    with open(log, "w") as output:
        try:
            call = [str(part) for part in command]
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            done = subprocess.run(call, **streams, check=False)
        except OSError as error:
            raise LeftOut(str(error)) from error
    if done.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise LeftOut(f"{lines[-1] if lines else 'no output'} (exit {done.returncode}, {log.name})")


@dataclass
class Bench:
    """What all rows have in common: the model, the calibration and what is measured.

    Attributes:
        samples: calibration sequences for rounding.
        train_samples: for training, of blocks and end to end, those of `samples` among them.
        context: tokens a perplexity window.
        windows: the first ones that are read; None for all.
        tasks: the first documents of each that are asked; None for all.
    """

    model: Path
    out: Path
    dataset: str
    samples: int
    train_samples: int
    seqlen: int
    group_size: int
    perplexity: list[str]
    context: int
    windows: int | None
    tasks: dict[str, int | None]
    include_path: Path | None
    peers_python: Path

    def calibrate(self, row: Row, bits: int, seed: int) -> Path:
        """The folder of the row's checkpoint, made if it is not there.

        Raises:
            LeftOut: if the program fails.
        """
        checkpoint = self.out / str(bits) / f"{row.slug}.seed{seed}"
        if checkpoint.exists():
            return checkpoint
        tokens = self.out / f"tokens.seed{seed}.safetensors"
        arguments = [
            *row.arguments.split(),
            self.model,
            "-o",
            checkpoint,
            "--bits",
            bits,
            "--group-size",
            self.group_size,
        ]
        data = ["--dataset", self.dataset, "--samples", self.samples, "--seqlen", self.seqlen]
        data += ["--train-samples", self.train_samples, "--seed", seed]
        log = checkpoint.with_name(checkpoint.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        if row.program == CALIBRATE:
            resume = ["--resume"] if checkpoint.with_name(checkpoint.name + ".partial").exists() else []
            run([BIN / CALIBRATE, *arguments, *data, *resume], log)
            return checkpoint
        if not tokens.exists():
            run([sys.executable, PEERS / OURS, "tokens", self.model, "-o", tokens, *data], log)
        python = self.peers_python if row.program == PACKAGES else sys.executable
        run([python, PEERS / row.program, *arguments, "--tokens", tokens], log)
        return checkpoint

    def score(self, checkpoint: Path, stem: Path) -> dict[str, Any]:
        """Perplexity by data set and accuracy by task of a checkpoint; files beside `stem` keep what was measured.

        Raises:
            LeftOut: if an evaluation fails.
        """
        context, windows = self.context, self.windows
        scores: dict[str, Any] = {"perplexity": {}, "tasks": {}}
        for dataset in self.perplexity:
            kept = stem.with_name(f"{stem.name}.{name_of(dataset).replace('/', '-')}.{context}x{windows or 'all'}.json")
            flags = ["--perplexity", dataset, "--context", context, *(["--windows", windows] if windows else [])]
            scores["perplexity"][name_of(dataset)] = self._evaluate(checkpoint, flags, kept)["perplexity"] | {
                "dataset": name_of(dataset)
            }
        for task, limit in self.tasks.items():
            kept = stem.with_name(f"{stem.name}.{task}.{limit or 'all'}.json")
            flags = ["--tasks", task, *(["--limit", limit] if limit else [])]
            flags += ["--include-path", self.include_path] if self.include_path else []
            scores["tasks"][task] = self._evaluate(checkpoint, flags, kept)["tasks"][task]
        return scores

    def _evaluate(self, checkpoint: Path, flags: list[object], kept: Path) -> dict[str, Any]:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            run([BIN / "bq-eval", checkpoint, *flags, "--json", kept], kept.with_suffix(".log"))
        return json.loads(kept.read_text())

    def measure(self, row: Row, bits: int, seed: int) -> dict[str, Any]:
        """Everything that the table says of a row with one seed, of its tokens and of whatever else it draws.

        Raises:
            LeftOut: if a command fails.
        """
        checkpoint = self.calibrate(row, bits, seed)
        facts = next(file for file in (checkpoint / "bq_report.json", checkpoint / "peer.json") if file.exists())
        report = json.loads(facts.read_text())
        label = f"{row.label} ({report['name']})" if row.program == PACKAGES else row.label
        return {
            "method": label,
            "bits": bits,
            "command": f"{row.program} {row.arguments}",
            "bits_per_weight": report["totals"]["bits_per_weight"],
            "calibration_tokens": report["calibration_tokens"],
            "seed": seed,
            "gains": report.get("gains", []),  # of our stages; peers have none
            "run": report["run"],
        } | self.score(checkpoint, checkpoint)


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several seeds: means, and for perplexities the standard deviation over seeds as `spread`."""
    row = runs[0] | {"perplexity": {}, "tasks": {}, "seeds": runs}
    for dataset, found in runs[0]["perplexity"].items():
        values = [run["perplexity"][dataset]["value"] for run in runs]
        row["perplexity"][dataset] = found | {"value": statistics.mean(values)}
        if len(values) > 1:
            row["perplexity"][dataset]["spread"] = statistics.stdev(values)
    for task, found in runs[0]["tasks"].items():
        row["tasks"][task] = found | {
            name: statistics.mean(run["tasks"][task][name] for run in runs) for name in ("value", "stderr")
        }
    return row


def mean_accuracy(tasks: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Mean over tasks and its standard error."""
    errors = math.sqrt(sum(task["stderr"] ** 2 for task in tasks.values()))
    return sum(task["value"] for task in tasks.values()) / len(tasks), errors / len(tasks)


def table_of(full: dict[str, Any], rows: list[dict[str, Any]], style: box.Box = box.HEAVY_HEAD) -> Table:
    """The table, the 16-bit model first."""
    table = Table("method", "bits per weight", box=style)
    for dataset in full["perplexity"]:
        table.add_column(f"perplexity {dataset}")
        table.add_column("× 16-bit")
    for task in full["tasks"]:
        table.add_column(task)
    if full["tasks"]:
        table.add_column("mean")
    for name in ("calibration tokens", "calibration, s", "peak memory, GB"):
        table.add_column(name)
    for row in [full, *rows]:
        cells = [row["method"], f"{row.get('bits_per_weight', 16):.3f}"]
        for dataset, found in row["perplexity"].items():
            spread = f" ± {found['spread']:.2f}" if "spread" in found else ""
            times = found["value"] / full["perplexity"][dataset]["value"]
            cells += [f"{found['value']:,.2f}{spread}", f"{times:,.2f}"]
        cells += [f"{task['value']:.4f} ± {task['stderr']:.4f}" for task in row["tasks"].values()]
        cells += ["{:.4f} ± {:.4f}".format(*mean_accuracy(row["tasks"]))] if row["tasks"] else []
        if made := row.get("run"):
            seconds = f"{made['wall_seconds']:.0f}" + (" (resumed)" if made["resumed"] else "")
            cells += [f"{row['calibration_tokens']}", seconds, f"{made['peak_memory_bytes'] / 1e9:.2f}"]
        table.add_row(*cells)
    return table


def plot(full: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against bits per weight and against calibration time, a line of pictures a data set."""
    datasets, methods = list(full["perplexity"]), list(dict.fromkeys(row["method"] for row in rows))
    size = 14, 4 * len(datasets)
    figure, axes = plt.subplots(len(datasets), 2, figsize=size, squeeze=False, layout="constrained")
    measures = {
        "bits per weight, all counted": lambda row: row["bits_per_weight"],
        "calibration, s": lambda row: None if row["run"]["resumed"] else row["run"]["wall_seconds"],
    }
    named = {}
    for line, dataset in zip(axes, datasets, strict=True):
        base = full["perplexity"][dataset]["value"]
        for axis, (name, measure) in zip(line, measures.items(), strict=True):
            for row in rows:
                place, value = measure(row), row["perplexity"][dataset]["value"]
                if place is None:  # the time of a run that was resumed may be only the last part's
                    continue
                method = row["method"]
                i = methods.index(method)
                marker = "^" if method.startswith("butterfly") else PEERS_MARKERS[i // 10]
                fill = f"C{i}" if value <= EDGE * base else "none"
                (point,) = axis.plot(place, min(value, EDGE * base), marker, color=f"C{i}", mfc=fill, linestyle="")
                named.setdefault(re.split(r" \(|:", method)[0], point)
            named["16-bit"] = axis.axhline(base, color="k", linestyle="--")
            axis.set(xlabel=name, ylabel=f"perplexity, {dataset}", yscale="log")
        line[1].set_xscale("log")
        for scale in (line[0].yaxis, line[1].yaxis, line[1].xaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:,.0f}")
            scale.set_minor_formatter("")
    title = f"open, at the upper edge:\n{EDGE} × 16-bit and more"
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=9, title=title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    model: Annotated[Path, typer.Argument(help="The 16-bit model.")],
    bits: Annotated[list[int], typer.Option(help="Bits per code; may be given several times.")] = [2],  # noqa: B006
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 64,
    dataset: Annotated[str, typer.Option(help="Calibration data, as for bq-calibrate.")] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration sequences for rounding.")] = 128,
    train_samples: Annotated[int, typer.Option(help="Sequences for training, those among them.")] = 640,
    seqlen: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    perplexity: Annotated[
        list[str], typer.Option(help="Evaluation data, as for bq-eval; may be given several times.")
    ] = ["wikitext2"],  # noqa: B006
    context: Annotated[int, typer.Option(help="Tokens a perplexity window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows; all by default.")] = None,
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks, separated by commas; mmlu:20 has a limit of its own, a subject of MMLU.")
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder of further lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    seed: Annotated[list[int], typer.Option(help="Of tokens and methods; several give mean and spread.")] = [0],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="Rows whose name starts so; may be given several times.")] = [],  # noqa: B006
    peers_python: Annotated[Path, typer.Option(help="Interpreter that has the real packages.")] = Path(sys.executable),
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and scores.")] = Path("build/accuracy"),
    as_json: Annotated[Path, typer.Option("--json", help="Results; .md and .png lie beside.")] = Path(
        "benchmarks/results/accuracy.json"
    ),
) -> None:
    """Calibrate, evaluate, print the table, write the results and draw them."""
    shared = {
        "model": str(model.resolve()),
        "dataset": dataset,
        "samples": samples,
        "train_samples": train_samples,
        "seqlen": seqlen,
        "group": group_size,
    }
    claim(out, shared)
    asked = {}
    for task in filter(None, tasks.split(",")):
        name, _, own = task.partition(":")
        if own and not own.isdecimal():
            raise typer.BadParameter(f"--tasks {task}: the limit {own!r} is no number of documents")
        asked[name] = int(own) if own else limit
    bench = Bench(
        model,
        out,
        dataset,
        samples,
        train_samples,
        seqlen,
        group_size,
        perplexity,
        context,
        windows,
        asked,
        include_path,
        peers_python,
    )
    console = Console(width=160)
    try:
        full = {"method": "16-bit"} | bench.score(model, out / "16-bit")
    except LeftOut as reason:
        sys.exit(f"the 16-bit model: {reason}")
    rows, left_out = [], {}
    for width in bits:
        for row in ROWS:
            if only and not row.label.startswith(tuple(only)):
                continue
            runs = []
            for one in seed:
                name = f"{width} bits, {row.label}, seed {one}"
                try:
                    runs.append(bench.measure(row, width, one))
                    console.print(f"{name}: done", highlight=False)
                except LeftOut as reason:
                    left_out[name] = str(reason)
            if runs:
                rows.append(merged(runs))
    console.print(table_of(full, rows))
    for label, reason in left_out.items():
        console.print(f"left out: {label}: {reason}", markup=False, highlight=False, soft_wrap=True)
    result = {
        "command": command(),
        "model": model.name,
        "versions": versions("torch", "transformers"),
        "rows": [full, *rows],
        "left_out": left_out,
    }
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(result, indent=2) + "\n")
    page = Console(file=StringIO(), width=1000)
    page.print(table_of(full, rows, box.MARKDOWN))
    as_json.with_suffix(".md").write_text(page.file.getvalue().strip() + "\n")
    plot(full, rows, as_json.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
