"""Times of the packed linear and of the rotation beside their floors, cuBLAS, and every peer that is installed.

    python benchmarks/kernels.py run  [--shapes llama2-70b,square] [--rows 1,16] [--minutes 9] [--json FILE]
    python benchmarks/kernels.py tune [--minutes 9]     fill launch.json for this GPU, then `run`

Ceilings (a device copy, an fp16 product) are measured first and floors derive from them. Every figure is the median
over replays of a CUDA graph that goes through several sets of weights, together larger than the L2 cache; results are
checked against a float32 product on the same tensors before they are timed. `--smoke` runs all of it on tiny shapes,
on a CPU too, where its times mean nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from bq_kernels import ops, reference, triton_linear
from bq_kernels.format import num_angles
from bq_kernels.packing import unpack
from bq_kernels.tiles import tile
from bq_kernels.triton_linear import Launch
from provenance import command, versions
from rich.console import Console
from rich.table import Table

# outputs and inputs of the linear layers, fused as vLLM fuses them
SHAPES = {
    "square": {"square": (8192, 8192)},
    "llama2-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "llama2-7b": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "llama2-13b": {"qkv": (15360, 5120), "o": (5120, 5120), "gate_up": (27648, 5120), "down": (5120, 13824)},
    "smoke": {"smoke": (192, 256)},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BITS, WIDE_BLOCK = 2, 512
DTYPE = torch.float16
PEER_ERROR = 0.8  # a peer quantizes the weights itself: less than this much of the output's size may differ
LAUNCH_TABLE = Path(triton_linear.__file__).with_name("launch.json")

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(width=180)


@dataclass
class Ceilings:
    """What this GPU reaches: copied bytes and fp16 operations a second, and the size of its L2 cache in bytes."""

    bandwidth: float
    operations: float
    cache: int


class Case:
    """One layer: several sets of packed weights, one set of inputs by number of rows, and what they should give."""

    def __init__(self, outputs: int, inputs: int, group: int, device: str, cache: int):
        self.outputs, self.inputs, self.group, self.device, self.cache = outputs, inputs, group, device, cache
        self.packed_bytes = outputs * inputs * BITS // 8 + outputs * inputs // group * 2
        words = torch.randint(-(2**31), 2**31, (outputs, inputs * BITS // 32), device=device).to(torch.int32)
        scales = (torch.rand(outputs, inputs // group, device=device) + 0.5).half() / inputs**0.5
        self.plain = words, scales
        first = tile(words, scales, None, inputs)
        # any words are codes: sets beyond the first need no repacking
        more = [(self._random_like(first[0]), first[1].clone(), None) for _ in range(self.sets(self.packed_bytes) - 1)]
        self.packed = [first, *more]

    @staticmethod
    def _random_like(words: torch.Tensor) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, words.shape, device=words.device).to(torch.int32)

    def sets(self, size: int) -> int:
        """Sets of `size` bytes that the cache cannot hold."""
        return max(2, min(math.ceil(3 * self.cache / size), 64))

    @cached_property
    def weight(self) -> torch.Tensor:
        """What the first set means, float32 [N, K]."""
        words, scales = self.plain
        parts = zip(words.split(4096), scales.split(4096), strict=True)
        return torch.cat([reference.dequantize(*part, None, self.inputs) for part in parts])

    @cached_property
    def dense(self) -> list[torch.Tensor]:
        """fp16 weights, the first set as packed."""
        first = self.weight.to(DTYPE)
        return [first, *(torch.randn_like(first) for _ in range(self.sets(first.nbytes) - 1))]

    def rotation(self, block: int, angles: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of a random rotation, or of the given angles."""
        if angles is None:
            angles = (torch.rand(self.inputs // block, num_angles(block), device=self.device) * 2 - 1) * math.pi
        return reference.givens_tables(angles, block)


# A method takes a case and returns: a function of (x, set), how many sets there are, and the tables that it rotates by.
Method = Callable[[Case], tuple[Callable[[torch.Tensor, int], torch.Tensor], int, tuple | None]]


def cublas(case: Case):
    """The 16-bit layer."""
    return lambda x, i: F.linear(x, case.dense[i]), len(case.dense), None


def ours(block_of: Callable[[Case], int | None], hadamard: bool = False) -> Method:
    """Packed linear, behind a rotation of that block size."""

    def method(case: Case):
        block, tables = block_of(case), None
        if block:
            angles = reference.hadamard_angles(case.inputs, block, case.device) if hadamard else None
            tables = case.rotation(block, angles)

        def run(x, i):
            return ops.packed_linear(x, *case.packed[i], None, case.outputs, *(tables or (None, None)))

        return run, len(case.packed), tables

    return method


def humming(case: Case):
    """Humming W2A16, JIT-compiled CUDA: what vLLM picks for 2-bit weights."""
    from humming.layer import HummingLayer

    layers = []
    for weight in case.dense[: case.sets(case.packed_bytes)]:
        config = {"dtype": "uint2", "group_size": case.group, "has_zero_point": False}
        layer = HummingLayer(case.outputs, case.inputs, config, torch_dtype=DTYPE).to(case.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    return lambda x, i: layers[i](x), len(layers), None


def gemlite(case: Case):
    """gemlite A16W2, Triton."""
    from gemlite import DType, GemLiteLinear

    words, scales = case.plain
    codes = unpack(words, BITS)
    layers = []
    for _ in range(min(case.sets(case.packed_bytes), 8)):
        layer = GemLiteLinear(BITS, case.group, case.inputs, case.outputs, DType.FP16, DType.FP16)
        zeros = torch.full_like(scales, 1.5)
        layer.pack(codes, scales.reshape(-1, 1), zeros.reshape(-1, 1), None)
        layers.append(layer)
    return lambda x, i: layers[i](x), len(layers), None


METHODS: dict[str, Method] = {
    "cuBLAS fp16": cublas,
    "ours, no rotation": ours(lambda case: None),
    "ours, block = group": ours(lambda case: case.group),
    f"ours, block {WIDE_BLOCK}": ours(lambda case: WIDE_BLOCK if case.inputs % WIDE_BLOCK == 0 else case.group),
    "ours, full width": ours(lambda case: case.inputs),
    "ours, Hadamard = group": ours(lambda case: case.group, hadamard=True),
    "Humming W2": humming,
    "gemlite A16W2": gemlite,
}
PEERS = ("Humming W2", "gemlite A16W2")


def seconds(run: Callable[[int], object], sets: int) -> tuple[float, float]:
    """Median seconds of one call, and the spread of the middle half; `run(i)` works on set i."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for i in range(sets):
            run(i)
        return (time.perf_counter() - started) / sets, 0.0
    for i in range(sets):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = max(sets, 20)
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % sets)
    times = []
    graph.replay()
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    lower, median, upper = statistics.quantiles(times, n=4)
    return median, upper - lower


def _touch(
    outputs: int, inputs: int, group: int, counts: list[int], launches: list[Launch | None], device: str = "cuda"
) -> None:
    """Run our kernels once, in a process of its own, for Triton to keep their builds on disk."""
    case = Case(outputs, inputs, group, device, 0)
    blocks = {group, inputs, *([WIDE_BLOCK] if inputs % WIDE_BLOCK == 0 else [])} if launches == [None] else {group}
    for count, launch, block in itertools.product(counts, launches, [None, *blocks]):
        x = torch.randn(count, inputs, device=device, dtype=DTYPE)
        tables = case.rotation(block) if block else (None, None)
        with contextlib.suppress(Exception):  # what does not build is reported where it is timed
            triton_linear.packed_linear(x, *case.packed[0], None, outputs, *tables, launch)


def compile_ahead(jobs: list[tuple]) -> None:
    """Build the kernels of all jobs (arguments of `_touch`) on all cores: one after the other takes minutes."""
    if not torch.cuda.is_available():
        return
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, 14), mp_context=spawn) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_touch, *job) for job in jobs]):
            if problem := done.exception():  # the timed run will say more
                console.print(f"building ahead: {type(problem).__name__}: {problem}"[:160], markup=False)
    console.print(f"kernels built in {time.monotonic() - started:.0f} s")


def measure_ceilings(device: str) -> Ceilings:
    """Copy bandwidth (bytes read and written) and the rate of an fp16 product, as this device reaches them."""
    smoke = device == "cpu"
    source = torch.empty(1 << (20 if smoke else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy, _ = seconds(lambda i: target.copy_(source), 2)
    size = 128 if smoke else 8192
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in "ab")
    product, _ = seconds(lambda i: a @ b, 2)
    cache = 1 << 20 if smoke else torch.cuda.get_device_properties(0).L2_cache_size
    return Ceilings(2 * source.nbytes / copy, 2 * size**3 / product, cache)


def floor(case: Case, rows: int, ceilings: Ceilings) -> float:
    """Seconds below which no packed linear can come: bytes over bandwidth or operations over rate."""
    moved = case.packed_bytes + rows * (case.inputs + case.outputs) * 2
    return max(moved / ceilings.bandwidth, 2 * rows * case.inputs * case.outputs / ceilings.operations)


def check(name: str, run, x: torch.Tensor, case: Case, tables) -> float:
    """Relative error of the first set's result against a float32 product.

    Raises:
        ValueError: if the result is wrong.
    """
    rotated = x if tables is None else reference.apply_rotation(x, *tables)
    want = rotated.float() @ case.weight.T
    got = run(x, 0).float()
    error = ((got - want).norm() / want.norm()).item()
    limit = PEER_ERROR if name in PEERS else 2e-3
    if not error < limit:  # NaN too
        raise ValueError(f"wrong result: relative error {error:.2e}")
    return error


def measure_rotation(case: Case, rows: int, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of the rotation alone, of copying its input, and of vLLM's Hadamard where it is there."""
    nbytes = rows * case.inputs * 4
    xs = [torch.randn(rows, case.inputs, device=case.device, dtype=DTYPE) for _ in range(case.sets(nbytes))]
    times = {"copy": seconds(lambda i: xs[i].clone(), len(xs))[0]}
    for name, block in (("block = group", case.group), ("full width", case.inputs)):
        tables = case.rotation(block)
        times[name] = seconds(lambda i, tables=tables: ops.rotate(xs[i], *tables), len(xs))[0]
    with contextlib.suppress(ImportError):
        import vllm._custom_ops  # noqa: F401 registers its Hadamard
    if hasattr(torch.ops._C, "hadacore_transform") and case.inputs & (case.inputs - 1) == 0:
        times["HadaCore, full width"] = seconds(lambda i: torch.ops._C.hadacore_transform(xs[i], False), len(xs))[0]
    return times


def environment() -> dict[str, str]:
    """The device and the versions of what is measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device} | versions("torch", "triton", "gemlite", "humming-kernels", "vllm")


def plot(rows: list[dict], path: Path) -> None:
    """Times against rows for every layer, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    columns = min(len(layers), 4)
    lines = math.ceil(len(layers) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 4 * lines), squeeze=False)
    for axis, layer in itertools.zip_longest(axes.flat, layers):
        if layer is None:
            axis.remove()
            continue
        mine = [row for row in rows if row["layer"] == layer]
        axis.loglog([r["rows"] for r in mine], [r["floor"] * 1e6 for r in mine], "k--", label="floor")
        for method in METHODS:
            points = [(r["rows"], r["times"][method] * 1e6) for r in mine if method in r["times"]]
            if points:
                axis.loglog(*zip(*points, strict=True), marker=".", label=method)
        axis.set(title=layer, xlabel="rows", ylabel="µs")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def targets(rows: list[dict], bandwidth: float) -> list[tuple[str, str, bool]]:
    """What we set out to reach, with what was measured: (claim, figures, whether it holds)."""
    rotated, plain, full = "ours, block = group", "ours, no rotation", "ours, full width"

    def worst(measure: Callable[[dict], float | None], wanted: Callable[[float], bool], pick=max):
        values = [(value, row["layer"], row["rows"]) for row in rows if (value := measure(row)) is not None]
        if not values:
            return "not measured", False
        value, layer, count = pick(values)
        return f"{value:.2f} ({layer}, {count} rows)", wanted(value)

    def ratio(row, low, high, over, under):
        times = row["times"]
        return times[over] / times[under] if low <= row["rows"] <= high and {over, under} <= set(times) else None

    def bandwidth_share(row):
        large = row["layer"].startswith(("square", "llama2-70b"))
        return row["packed_bytes"] / row["times"][rotated] / bandwidth if large and row["rows"] == 1 else None

    def added(row):
        small = row["rows"] == 1 and row["inputs"] <= 8192
        return (row["times"][full] - row["times"][plain]) * 1e6 if small else None

    def over_copy(row):
        return row["rotation"]["block = group"] / row["rotation"]["copy"] if row["rows"] == 4096 else None

    return [
        ("share of copy bandwidth at 1 row, 8192² and 70B, ≥ .6", *worst(bandwidth_share, lambda v: v >= 0.6, min)),
        ("× Humming W2 at 1 row, ≥ 2", *worst(lambda r: ratio(r, 1, 1, "Humming W2", rotated), lambda v: v >= 2, min)),
        ("× cuBLAS at 1 row, ≥ 5", *worst(lambda r: ratio(r, 1, 1, "cuBLAS fp16", rotated), lambda v: v >= 5, min)),
        ("× cuBLAS at 16, ≥ 3", *worst(lambda r: ratio(r, 16, 16, "cuBLAS fp16", rotated), lambda v: v >= 3, min)),
        ("× cuBLAS up to 128, ≥ 1", *worst(lambda r: ratio(r, 1, 128, "cuBLAS fp16", rotated), lambda v: v >= 1, min)),
        (
            "× cuBLAS at 4096, ≥ .9",
            *worst(lambda r: ratio(r, 4096, 4096, "cuBLAS fp16", rotated), lambda v: v >= 0.9, min),
        ),
        ("µs that full width adds at 1 row, K ≤ 8192, ≤ 3", *worst(added, lambda v: v <= 3)),
        ("rotation over copy at 4096, ≤ 1.3", *worst(over_copy, lambda v: v <= 1.3)),
    ]


def _start(smoke: bool) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if not smoke:
        sys.exit("no GPU here; --smoke runs the script on a CPU, where its times mean nothing")
    return "cpu"


@app.command()
def run(
    shapes: Annotated[str, typer.Option(help="Models, comma-separated.")] = "square,llama2-70b,llama2-7b,llama2-13b",
    rows: Annotated[str, typer.Option(help="Rows of x, comma-separated.")] = ",".join(map(str, ROWS)),
    group: Annotated[int, typer.Option(help="Columns that share a scale.")] = 128,
    minutes: Annotated[float, typer.Option(help="Stop after that long and say what is left out.")] = 8.5,
    smoke: bool = False,
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/kernels.json"),
) -> None:
    """Measure, print the table, write JSON and a plot beside it."""
    device = _start(smoke)
    if smoke:
        shapes, rows, group = "smoke", "1,5", 64
    deadline = time.monotonic() + 60 * minutes
    torch.manual_seed(0)
    ceilings = measure_ceilings(device)
    console.print(
        f"{environment()}\ncopy {ceilings.bandwidth / 1e9:.0f} GB/s, fp16 {ceilings.operations / 1e12:.0f} TFLOP/s"
    )
    layers = [(model, layer, *shape) for model in shapes.split(",") for layer, shape in SHAPES[model].items()]
    counts = [int(count) for count in rows.split(",")]
    compile_ahead([(outputs, inputs, group, counts, [None]) for _, _, outputs, inputs in layers])
    results, left_out = [], {}
    for model, layer, outputs, inputs in layers:
        if time.monotonic() > deadline:
            left_out[f"{model} {layer}"] = "out of time"
            continue
        case = Case(outputs, inputs, group, device, ceilings.cache)
        by_rows = {count: {} for count in counts}
        errors = {}
        for name, method in METHODS.items():
            try:
                call, sets, tables = method(case)
                for count, times in by_rows.items():
                    if time.monotonic() > deadline:
                        left_out.setdefault(f"{model} {layer}, {name}", "out of time")
                        break
                    x = torch.randn(count, inputs, device=device, dtype=DTYPE)
                    errors[name] = check(name, call, x, case, tables)
                    times[name], _ = seconds(lambda i, call=call, x=x: call(x, i), sets)
            except Exception as problem:  # a peer may be missing, or not take a shape: the table goes on without it
                if name not in PEERS:
                    raise
                left_out[f"{model} {layer}, {name}"] = f"{type(problem).__name__}: {problem}"[:200]
        for count, times in by_rows.items():
            results.append(
                {
                    "layer": f"{model} {layer}",
                    "outputs": outputs,
                    "inputs": inputs,
                    "rows": count,
                    "packed_bytes": case.packed_bytes,
                    "floor": floor(case, count, ceilings),
                    "times": times,
                    "rotation": measure_rotation(case, count, ceilings),
                    "errors": errors,
                }
            )
        _print_layer(results, f"{model} {layer}", outputs, inputs)
        del case
    summary = targets([r for r in results if METHODS.keys() - set(PEERS) <= r["times"].keys()], ceilings.bandwidth)
    table = Table("target", "worst", "holds")
    for claim, figures, holds in summary:
        table.add_row(claim, figures, "yes" if holds else "no")
    if not smoke:
        console.print(table)
    for what, why in left_out.items():
        console.print(f"left out: {what}: {why}", markup=False)
    as_json.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": command(),
        "environment": environment(),
        "ceilings": vars(ceilings),
        "group": group,
        "rows": results,
        "targets": summary,
        "left_out": left_out,
    }
    as_json.write_text(json.dumps(record, indent=1) + "\n")
    plot(results, as_json.with_suffix(".png"))


def _print_layer(results: list[dict], layer: str, outputs: int, inputs: int) -> None:
    mine = [row for row in results if row["layer"] == layer]
    methods = [name for name in METHODS if any(name in row["times"] for row in mine)]
    table = Table("rows", "floor", *methods, "rotation", "copy", title=f"{layer}, {outputs} × {inputs}, µs")
    for row in mine:
        times = [f"{row['times'][name] * 1e6:.1f}" if name in row["times"] else "" for name in methods]
        rotation = (f"{row['rotation'][name] * 1e6:.1f}" for name in ("block = group", "copy"))
        table.add_row(str(row["rows"]), f"{row['floor'] * 1e6:.1f}", *times, *rotation)
    console.print(table)


def candidates(rows: int) -> list[Launch]:
    """Launches worth trying for a number of rows."""
    found = []
    if rows <= 16:
        for columns, programs, fuse in itertools.product((256, 512, 1024), (2, 3, 4, 6), (True, False)):
            found.append(Launch(rows, "decode", programs, columns, fuse))
    if rows >= 8:
        block = max(16, 1 << (rows - 1).bit_length())
        for block_m, tiles, stages, programs in itertools.product((block, block // 2), (1, 2), (3, 4), (1, 2, 4)):
            if 16 <= block_m <= 128:
                warps = 8 if tiles * block_m >= 256 or tiles == 2 else 4
                found.append(Launch(rows, "gemm", programs, block_m=block_m, tiles=tiles, stages=stages, warps=warps))
    if rows >= 128:
        found.append(Launch(rows, "dense"))
    return found


@app.command()
def tune(
    minutes: Annotated[float, typer.Option(help="Stop after that long; rows not reached keep the default.")] = 8.5,
    group: int = 128,
    smoke: bool = False,
) -> None:
    """Try launches for every number of rows on a few layers and write the best of them to launch.json."""
    device = _start(smoke)
    deadline = time.monotonic() + 60 * minutes
    torch.manual_seed(0)
    cache = measure_ceilings(device).cache
    chosen = [SHAPES["square"]["square"], SHAPES["llama2-70b"]["down"], SHAPES["llama2-7b"]["qkv"]]
    cases = [Case(*shape, group, device, cache) for shape in ([SHAPES["smoke"]["smoke"]] if smoke else chosen)]
    tables = [case.rotation(group) for case in cases]
    gpu = environment()["device"]
    lines = []
    counts = (1, 5) if smoke else (1, 4, 8, 16, 32, 64, 128, 256, 512)
    compile_ahead([(*shape, group, [rows], candidates(rows)) for rows in counts for shape in chosen])
    for rows in counts:
        ranked = []
        for launch in candidates(rows)[: 2 if smoke else None]:
            if time.monotonic() > deadline:
                break
            try:
                product = 1.0
                for case, (cos_sin, mix) in zip(cases, tables, strict=True):
                    x = torch.randn(rows, case.inputs, device=device, dtype=DTYPE)

                    def call(i, x=x, case=case, cos_sin=cos_sin, mix=mix, launch=launch):
                        packed = case.packed[i]
                        return triton_linear.packed_linear(x, *packed, None, case.outputs, cos_sin, mix, launch)

                    product *= seconds(call if device == "cuda" else lambda i: None, len(case.packed))[0]
                ranked.append((product ** (1 / len(cases)), launch))
            except Exception as problem:  # too many registers or too much shared memory for this GPU
                console.print(f"left out: {launch}: {type(problem).__name__}: {problem}"[:160], markup=False)
        ranked.sort(key=lambda item: item[0])
        for mean, launch in ranked[:3]:
            console.print(f"{rows} rows: {mean * 1e6:.1f} µs {launch}", markup=False)
        if ranked:
            lines.append(vars(ranked[0][1]))
    lines.append({"rows": None, "kernel": "dense"})
    table = json.loads(LAUNCH_TABLE.read_text()) | {gpu: lines}
    if not smoke:
        rendered = ",\n".join(
            f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(line)}" for line in entries) + "\n  ]"
            for name, entries in table.items()
        )
        LAUNCH_TABLE.write_text("{\n" + rendered + "\n}\n")
    console.print(f"launch.json: {len(lines)} lines for {gpu}")


if __name__ == "__main__":
    app()
