"""Times of the packed linear and of the rotation beside their floors, cuBLAS, and every peer that is installed.

    python benchmarks/kernels.py run  [--shapes llama2-70b,square] [--rows 1,16] [--minutes 9] [--json FILE]
    python benchmarks/kernels.py tune [--minutes 9]     fill launch.json for this GPU, then `run`
    python benchmarks/kernels.py errors                 against float64, over formats, shapes and rows
    python benchmarks/kernels.py layer                  the linears of one decoder layer in a CUDA graph, by kernel
    python benchmarks/kernels.py vocabulary             an LM head, and the look-up of an embedding's rows
    python benchmarks/kernels.py mixture                the MLP of a mixture of experts
    python benchmarks/kernels.py plot FILE              draw FILE.png from the JSON of an earlier run
    python benchmarks/kernels.py build-quarot QUAROT CUTLASS -o FILE.so    then BQ_QUAROT=FILE.so … run

Ceilings (a device copy, an fp16 product) are measured first, and floors derive from them. Each figure is the median
over replays of a CUDA graph that goes through several sets of weights, together larger than the L2 cache; results are
checked against a float32 product on the same tensors before they are timed. `--smoke` runs all of it on tiny shapes,
on a CPU too, where its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from bq_kernels.gpu import gpu_of
from bq_kernels.triton_linear import launches
from rich.console import Console

from benchmarks.harness.provenance import command
from benchmarks.harness.results import finish, write_plot
from benchmarks.packed_linear import errors, layer_step, mixture, quarot, report, tuning, vocabulary
from benchmarks.packed_linear.cases import SHAPES, SMOKE_VOCABULARY, VOCABULARIES, LinearCase
from benchmarks.packed_linear.measure import Measurement, environment, measure_ceilings
from benchmarks.packed_linear.warming import WarmUp, build_kernels

ROWS = "1,2,4,8,16,32,64,128,256,1024,4096"
TUNED_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 4096)
TUNED_SHAPES = (SHAPES["square"]["square"], SHAPES["llama2-70b"]["down"], SHAPES["llama2-7b"]["qkv"])

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(width=180)


def _device(smoke: bool) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if not smoke:
        sys.exit("no GPU here; --smoke runs the script on a CPU, where its times mean nothing")
    return "cpu"


def _layers_of(models: str) -> dict[str, tuple[int, int]]:
    """Shapes [out_features, in_features] by name, of models that commas separate."""
    return {f"{model} {name}": shape for model in models.split(",") for name, shape in SHAPES[model].items()}


@app.command()
def run(
    shapes: Annotated[str, typer.Option(help="Models, comma-separated.")] = "square,llama2-70b,llama2-7b,llama2-13b",
    rows: Annotated[str, typer.Option(help="Rows of x, comma-separated.")] = ROWS,
    group: Annotated[int, typer.Option(help="Columns that share a scale.")] = 128,
    minutes: Annotated[float, typer.Option(help="Stop after that long and say what is left out.")] = 8.5,
    smoke: bool = False,
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/kernels.json"),
) -> None:
    """Measure, print the table, write JSON and a plot beside it."""
    device = _device(smoke)
    if smoke:
        shapes, rows, group = "smoke", "1,5", 64
    deadline = time.monotonic() + 60 * minutes
    torch.manual_seed(0)
    ceilings = measure_ceilings(device)
    speeds = f"copy {ceilings.bandwidth / 1e9:.0f} GB/s, fp16 {ceilings.operations / 1e12:.0f} TFLOP/s"
    console.print(f"{environment()}\n{speeds}")
    layers = _layers_of(shapes)
    counts = [int(count) for count in rows.split(",")]
    build_kernels([WarmUp(*shape, group, counts, [None]) for shape in layers.values()], console)
    measurement = Measurement(ceilings, deadline)
    for layer, shape in layers.items():
        if measurement.measure_layer(layer, *shape, group, device, counts):
            console.print(report.layer_table(measurement.rows, layer))
    record = {
        "command": command(),
        "environment": environment(),
        "ceilings": vars(ceilings),
        "group": group,
        "rows": measurement.rows,
        "left_out": measurement.left_out,
    }
    comparison = [] if smoke else [report.comparison_table(measurement.rows, ceilings.bandwidth)]
    finish(console, record, as_json, comparison, lambda: report.plot(record))


@app.command()
def tune(
    minutes: Annotated[float, typer.Option(help="Stop after that long; rows not reached keep the default.")] = 8.5,
    group: int = 128,
    smoke: bool = False,
) -> None:
    """Try launches for every number of rows on a few layers and write the best of them to launch.json."""
    device = _device(smoke)
    deadline = time.monotonic() + 60 * minutes
    torch.manual_seed(0)
    cache = measure_ceilings(device).cache
    shapes = [SHAPES["smoke"]["smoke"]] if smoke else TUNED_SHAPES
    counts = (1, 5) if smoke else TUNED_ROWS
    cases = [LinearCase(*shape, group, device, cache) for shape in shapes]
    gpu = gpu_of(cases[0].packed[0][0])
    build_kernels([WarmUp(*shape, group, [n], tuning.candidates(n, gpu)) for n in counts for shape in shapes], console)
    best = list(tuning.rank(counts, cases, deadline, console, 2 if smoke else None))
    most = best[-1].max_rows if best else 0
    if best and best[-1].kernel == "dense":  # for any number of rows
        best.append(dataclasses.replace(best[-1], max_rows=None))
    else:
        best += [line for line in launches(gpu.name, gpu.architecture) if line.max_rows is None or line.max_rows > most]
    if not smoke:
        tuning.write_launch_table(gpu.name, best)
    console.print(f"launch.json: {len(best)} lines for {gpu.name or 'no GPU'}")


@app.command("errors")
def measure_errors(
    shapes: Annotated[str, typer.Option(help="Models, comma-separated.")] = "llama2-7b",
    rows: Annotated[str, typer.Option(help="Rows of x, comma-separated.")] = "1,2,8,16,48,256,600",
    minutes: Annotated[float, typer.Option(help="Stop after that long and say what is left out.")] = 8.5,
    smoke: bool = False,
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/errors.json"),
) -> None:
    """Compare the packed linear with float64, print the worst of each format, write JSON; fails on a wrong result."""
    device, deadline = _device(smoke), time.monotonic() + 60 * minutes
    if smoke:
        shapes, rows = "smoke", "1,5,20"
    layers = _layers_of(shapes)
    torch.manual_seed(0)
    results, left_out = errors.measure_errors(layers, [int(count) for count in rows.split(",")], device, deadline)
    record = {"command": command(), "environment": environment(), "rows": results, "left_out": left_out}
    finish(console, record, as_json, [errors.error_table(results)])
    if wrong := errors.exceeding(results):
        sys.exit(f"wrong results: {wrong}")


@app.command("layer")
def measure_layer(
    shapes: Annotated[str, typer.Option(help="A model.")] = "llama2-7b",
    rows: Annotated[str, typer.Option(help="Rows of x, comma-separated.")] = "1,8,64",
    group: Annotated[int, typer.Option(help="Columns that share a scale.")] = 128,
    smoke: bool = False,
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/layer.json"),
) -> None:
    """Time the linears of one decoder layer in sequence, profile their kernels, print a table, write JSON."""
    device = _device(smoke)
    if smoke:
        shapes, rows, group = "smoke", "1,5", 64
    torch.manual_seed(0)
    counts, cache = [int(count) for count in rows.split(",")], measure_ceilings(device).cache
    layers = SHAPES[shapes].items()
    build_kernels(
        [WarmUp(*shape, group, counts, [None], name in layer_step.BEHIND_NORM) for name, shape in layers], console
    )
    results = layer_step.measure_step(SHAPES[shapes], counts, group, device, cache)
    record = {"command": command(), "environment": environment(), "group": group, "shapes": shapes, "rows": results}
    finish(console, record, as_json, [layer_step.step_table(results)])


@app.command("vocabulary")
def measure_vocabulary(
    rows: Annotated[str, typer.Option(help="Rows of x for the LM head, comma-separated.")] = "1,8,64,256,1024",
    tokens: Annotated[str, typer.Option(help="Tokens that are looked up together, comma-separated.")] = "1,64,4096",
    bits: int = 4,
    group: Annotated[int, typer.Option(help="Columns that share a scale.")] = 128,
    minutes: Annotated[float, typer.Option(help="Stop after that long and say what is left out.")] = 8.5,
    smoke: bool = False,
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/vocabulary.json"),
) -> None:
    """Time LM heads and look-ups of real vocabularies, checked against float32, print tables, write JSON."""
    device, deadline = _device(smoke), time.monotonic() + 60 * minutes
    shapes = SMOKE_VOCABULARY if smoke else VOCABULARIES
    if smoke:
        rows, tokens, group = "1,5", "1,70", 64
    torch.manual_seed(0)
    ceilings = measure_ceilings(device)
    counts = [[int(count) for count in text.split(",")] for text in (rows, tokens)]
    settings = bits, group, device, ceilings, deadline
    results, left_out = vocabulary.measure_vocabularies(shapes, *counts, *settings)
    record = {"command": command(), "environment": environment(), "ceilings": vars(ceilings)}
    record |= {"bits": bits, "group": group, "rows": results, "left_out": left_out}
    parts = vocabulary.HEAD, vocabulary.LOOK_UP
    finish(console, record, as_json, [vocabulary.vocabulary_table(results, part) for part in parts])


@app.command("mixture")
def measure_mixture(
    rows: Annotated[str, typer.Option(help="Rows of x, comma-separated.")] = "1,8,64,512",
    group: Annotated[int, typer.Option(help="Columns that share a scale.")] = 128,
    minutes: Annotated[float, typer.Option(help="Stop after that long and say what is left out.")] = 8.5,
    smoke: bool = False,
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/mixture.json"),
) -> None:
    """Time the MLPs of real mixtures, checked against the torch twin of the kernel, print a table, write JSON."""
    device, deadline = _device(smoke), time.monotonic() + 60 * minutes
    mixtures = mixture.SMOKE_MIXTURES if smoke else mixture.MIXTURES
    if smoke:
        rows, group = "1,5", 64
    torch.manual_seed(0)
    ceilings = measure_ceilings(device)
    counts = [int(count) for count in rows.split(",")]
    results, left_out = mixture.measure_mixtures(mixtures, counts, group, device, ceilings, deadline)
    record = {"command": command(), "environment": environment(), "ceilings": vars(ceilings)}
    record |= {"rows": results, "left_out": left_out}
    finish(console, record, as_json, [mixture.mixture_table(results)])


@app.command()
def plot(
    results: Annotated[Path, typer.Argument(help="JSON file that `run` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Image file; beside the JSON by default.")] = None,
    note: Annotated[str, typer.Option(help="What to add to the title.")] = "",
) -> None:
    """Draw an earlier run's results, print its tables; nothing is measured."""
    record = json.loads(results.read_text())
    for layer in dict.fromkeys(row["layer"] for row in record["rows"]):
        console.print(report.layer_table(record["rows"], layer))
    console.print(report.comparison_table(record["rows"], record["ceilings"]["bandwidth"]))
    out = out or results.with_suffix(".png")
    write_plot(out, report.plot(record, note))
    console.print(f"{out} drawn from {results}")


@app.command()
def build_quarot(
    source: Annotated[Path, typer.Argument(help="A copy of github.com/spcl/QuaRot.")],
    cutlass: Annotated[Path, typer.Argument(help="A copy of github.com/NVIDIA/cutlass.")],
    out: Annotated[Path, typer.Option("-o", help="Shared library to write.")] = Path("build/libquarot.so"),
    arch: Annotated[str, typer.Option(help="Of the GPU.")] = "sm_90",
    nvcc: Annotated[str, typer.Option(help="CUDA's compiler.")] = "nvcc",
) -> None:
    """Compile QuaRot's own 4-bit linear for the table; needs nvcc, and no GPU."""
    out.parent.mkdir(parents=True, exist_ok=True)
    call = quarot.build_command(source, cutlass, out, arch, nvcc)
    try:
        subprocess.run(call, check=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        sys.exit(f"QuaRot does not compile: {problem}")
    console.print(f"export {quarot.VARIABLE}={out.resolve()}", soft_wrap=True)
