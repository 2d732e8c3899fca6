"""What of the learned rotation matters: start, uniformity term, steps, block size, optimiser, samples, objective.

    python benchmarks/ablations.py MODEL [--dataset c4] [--blocks 3,15,27] [--out build/ablations] [--json FILE]

One setting is changed at a time, from those of the paper (arXiv 2509.09679) at blocks of --rotation-block. The rotation
of every input of some decoder blocks is learned on the inputs of the 16-bit model, the weights behind it are rounded by
GPTQ, and their output error is measured on windows that neither has seen. The last two lines learn any orthogonal
matrix in place of a butterfly, by Cayley SGD as SpinQuant (arXiv 2405.16406) does, on the same objective.

OUT keeps each measurement; an interrupted run goes on there.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bq_calibration.data import calibration_tokens, dataset_name
from bq_calibration.model import SourceModel
from rich.console import Console
from rich.progress import Progress

from benchmarks.harness.provenance import claim_folder, command, versions
from benchmarks.harness.results import finish
from benchmarks.rotation_ablations.layers import LayerStats, layer_stats
from benchmarks.rotation_ablations.measure import measure
from benchmarks.rotation_ablations.report import lines_of, plot, table_of
from benchmarks.rotation_ablations.settings import CHANGES, Setting

Key = tuple[str, str]  # group of settings and value

app = typer.Typer(add_completion=False)


def chosen_settings(only: list[str], base: Setting, samples: int) -> dict[Key, Setting]:
    """Settings by group and value, of the named groups or of all.

    Args:
        only: names of groups.
        base: what is not changed; its steps bound those of all.
        samples: calibration windows that there are; a setting that wants as many or more takes all.
    """
    settings = {}
    for name, changes in CHANGES.items():
        for value, change in changes.items() if not only or name in only else ():
            setting = dataclasses.replace(base, **change)
            few = setting.samples if setting.samples < samples else 0
            settings[name, value] = dataclasses.replace(setting, steps=min(base.steps, setting.steps), samples=few)
    return settings


def measure_or_load(layers: LayerStats, setting: Setting, bits: int, group_size: int, out: Path) -> dict[str, Any]:
    """The result of a setting on some layers, from its file in `out` if that is there."""
    name = "_".join(map(str, dataclasses.astuple(setting)))
    file = out / layers.name.replace(",", "").replace(" ", "-") / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(measure(layers, setting, bits, group_size)))
    return json.loads(file.read_text())


def grouped_lines(
    settings: dict[Key, Setting], measured: dict[Key, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """Lines of the table by group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in dict.fromkeys(name for name, _ in settings):
        values = [value for name, value in settings if name == group]
        asked = {value: dataclasses.asdict(settings[group, value]) for value in values}
        groups[group] = lines_of({value: measured[group, value] for value in values}, asked)
    return groups


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Argument(help="The 16-bit model.")],
    bits: Annotated[int, typer.Option(help="Bits per code.")] = 2,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 64,
    rotation_block: Annotated[int, typer.Option(help="Features per block where a setting names no other.")] = 64,
    dataset: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    held_out: Annotated[int, typer.Option(help="Windows on which errors are measured.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    blocks: Annotated[str, typer.Option(help="Decoder blocks, separated by commas.")] = "3,15,27",
    steps: Annotated[int, typer.Option(help="Most steps of learning.")] = 500,
    only: Annotated[list[str], typer.Option(help="Groups of settings; all by default.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder for measurements.")] = Path("build/ablations"),
    as_json: Annotated[Path, typer.Option("--json", help="Results; a .png lies beside.")] = Path(
        "benchmarks/results/ablations.json"
    ),
) -> None:
    """Measure every setting on all layers, print the table, write the results and draw the curves."""
    shared = {
        "model": str(model.resolve()),
        "dataset": dataset,
        "samples": samples,
        "held_out": held_out,
        "seqlen": seqlen,
        "bits": bits,
        "group": group_size,
    }
    claim_folder(out, shared)
    settings = chosen_settings(only, Setting(block_size=rotation_block, steps=steps), samples)
    measured: dict[Key, list[dict[str, Any]]] = {key: [] for key in settings}
    source = SourceModel(str(model), torch.device("cpu"))
    tokens = calibration_tokens(source.tokenizer(), dataset, samples + held_out, seqlen, 0)
    ends = sorted({samples, *(setting.samples for setting in settings.values() if setting.samples)})
    indices = [int(index) for index in blocks.split(",")]
    with Progress() as progress:
        task = progress.add_task("settings", total=len(settings) * len(indices) * len(source.groups[0]))
        for layers in layer_stats(source, tokens, ends, indices, progress):
            for key, setting in settings.items():
                measured[key].append(measure_or_load(layers, setting, bits, group_size, out))
                progress.advance(task)
    groups = grouped_lines(settings, measured)
    named = {"model": model.name, "dataset": dataset_name(dataset), "blocks": blocks}
    record = {"command": command(), "versions": versions("torch"), "settings": shared | named, "groups": groups}
    finish(Console(width=140), record, as_json, [table_of(groups)], lambda: plot(groups))
