"""Makes the checkpoint of a row and scores it; files that are there are used again."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bq_calibration.data import dataset_name

from benchmarks.accuracy_table.methods import CALIBRATE, TOKENS, Row, baseline_module

EVALUATE = Path(sys.executable).parent / "bq-eval"


class LeftOut(Exception):
    """The reason why a row is not in the table."""


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
    """What all rows share: the model, the calibration data and the evaluations.

    Attributes:
        model: the 16-bit model.
        out: folder for checkpoints and scores.
        dataset: calibration data, as for bq-calibrate.
        samples: calibration sequences for rounding.
        train_samples: for training, of blocks and end to end, those of `samples` among them.
        seqlen: tokens per sequence.
        group_size: columns that share a scale.
        perplexity: evaluation data, as for bq-eval.
        context: tokens per perplexity window.
        windows: the first ones that are read; None for all.
        tasks: the first documents of each that are asked; None for all.
        include_path: folder of further lm-eval task files.
        packages_python: interpreter of the environment that has the packages.
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
    packages_python: Path

    def calibrate(self, row: Row, bits: int, seed: int) -> Path:
        """The folder of the row's checkpoint, made if it is not there.

        Raises:
            LeftOut: if the program fails.
        """
        checkpoint = self.out / str(bits) / f"{row.slug}.seed{seed}"
        if checkpoint.exists():
            return checkpoint
        log = checkpoint.with_name(checkpoint.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*row.call(self.packages_python), *row.arguments.split(), self.model, "-o", checkpoint]
        command += ["--bits", bits, "--group-size", self.group_size]
        data = ["--dataset", self.dataset, "--samples", self.samples, "--seqlen", self.seqlen]
        data += ["--train-samples", self.train_samples, "--seed", seed]
        if row.program == CALIBRATE:
            resume = ["--resume"] if checkpoint.with_name(checkpoint.name + ".partial").exists() else []
            run([*command, *data, *resume], log)
            return checkpoint
        tokens = self.out / f"tokens.seed{seed}.safetensors"
        if not tokens.exists():
            run([sys.executable, "-m", baseline_module(TOKENS), self.model, "-o", tokens, *data], log)
        run([*command, "--tokens", tokens], log)
        return checkpoint

    def score(self, checkpoint: Path, stem: Path) -> dict[str, Any]:
        """Perplexity by data set and accuracy by task of a checkpoint; files beside `stem` keep each score.

        Raises:
            LeftOut: if an evaluation fails.
        """
        context, windows = self.context, self.windows
        scores: dict[str, Any] = {"perplexity": {}, "tasks": {}}
        for dataset in self.perplexity:
            name = dataset_name(dataset)
            kept = stem.with_name(f"{stem.name}.{name.replace('/', '-')}.{context}x{windows or 'all'}.json")
            flags = ["--perplexity", dataset, "--context", context, *(["--windows", windows] if windows else [])]
            scores["perplexity"][name] = self._evaluate(checkpoint, flags, kept)["perplexity"] | {"dataset": name}
        for task, limit in self.tasks.items():
            kept = stem.with_name(f"{stem.name}.{task}.{limit or 'all'}.json")
            flags = ["--tasks", task, *(["--limit", limit] if limit else [])]
            flags += ["--include-path", self.include_path] if self.include_path else []
            scores["tasks"][task] = self._evaluate(checkpoint, flags, kept)["tasks"][task]
        return scores

    def _evaluate(self, checkpoint: Path, flags: list[object], kept: Path) -> dict[str, Any]:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            run([EVALUATE, checkpoint, *flags, "--json", kept], kept.with_suffix(".log"))
        return json.loads(kept.read_text())

    def measure(self, row: Row, bits: int, seed: int) -> dict[str, Any]:
        """All that the table shows of a row with one seed, of its tokens and of whatever else it draws.

        Raises:
            LeftOut: if a command fails.
        """
        checkpoint = self.calibrate(row, bits, seed)
        facts = next(file for file in (checkpoint / "bq_report.json", checkpoint / "peer.json") if file.exists())
        report = json.loads(facts.read_text())
        return {
            "method": f"{row.label} ({report['name']})" if row.of_package else row.label,
            "bits": bits,
            "command": f"{row.program} {row.arguments}".strip(),
            "bits_per_weight": report["totals"]["bits_per_weight"],
            "calibration_tokens": report["calibration_tokens"],
            "seed": seed,
            "gains": report.get("gains", []),  # of our stages; baselines have none
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
