"""Everything that only a GPU can measure, within minutes, most important first.

    python benchmarks/gpu.py --minutes 9 [--out FOLDER]       what fits
    python benchmarks/gpu.py --minutes 9 --resume             what did not, with the same FOLDER
    python benchmarks/gpu.py --only serving,parity            these steps
    python benchmarks/gpu.py --rehearse                       all of it on tiny shapes, on a CPU too

Each step is a process of its own with its own limit, and writes its JSON and its log into FOLDER as it goes; a step
that would take longer is ended, with all processes below it. `lease.json` says what became of every step. The machine
needs no network; the project and vLLM may be there by PYTHONPATH alone. BQ_QUAROT adds QuaRot's own kernels to the
table, see `kernels.py build-quarot`.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness.provenance import claim_folder, command
from benchmarks.lease.runner import DONE, FAILED, NEEDS, Lease, environment, machine, restore_launches
from benchmarks.lease.steps import Plan, Step, steps

INTERRUPTED_STATUS = 130

app = typer.Typer(add_completion=False)
console = Console(width=160)


def _chosen(plan: Plan, only: str) -> list[Step]:
    every = steps(plan)
    names = [step.name for step in every]
    if unknown := set(filter(None, only.split(","))) - set(names):
        raise typer.BadParameter(f"--only {', '.join(sorted(unknown))}: the steps are {', '.join(names)}")
    return [step for step in every if not only or step.name in only.split(",")]


def _report(lease: Lease, out: Path) -> None:
    """Print what became of the steps, and the command that goes on."""
    table = Table("step", "state", "seconds", "note")
    for name, outcome in lease.outcomes.items():
        table.add_row(name, outcome.state, f"{outcome.seconds:.0f}" if outcome.seconds else "", outcome.note)
    console.print(table)
    left = [name for name, o in lease.outcomes.items() if o.state != DONE and not o.state.startswith(NEEDS)]
    if left:
        again = [part for part in sys.argv[1:] if part != "--resume"]
        resume = " ".join(["python benchmarks/gpu.py", *again, "--resume"])
        console.print(f"left: {', '.join(left)}\n{resume}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"results in {out}", markup=False, highlight=False, soft_wrap=True)


@app.command(help=__doc__)
def main(
    minutes: Annotated[float, typer.Option(help="For all of it together.")] = 9.0,
    resume: Annotated[bool, typer.Option(help="Keep what is done, run the rest.")] = False,
    only: Annotated[str, typer.Option(help="Steps, comma-separated; all by default.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of results and state.")] = Path("build/gpu"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint for the comparison with transformers; random weights by default.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text for it; sampled from the random model by default.")] = None,
    model: Annotated[Path | None, typer.Option(help="16-bit model that the step `training` trains.")] = None,
    mix: Annotated[str, typer.Option(help="Its text, as for bq-calibrate --mix.")] = "self",
    tests: Annotated[str, typer.Option(help="Test texts for it, as for bq-eval, by commas.")] = "wikitext2,c4",
    rehearse: Annotated[bool, typer.Option(help="Tiny shapes; times mean nothing.")] = False,
) -> None:
    """Run the steps, print what became of them."""
    deadline, out = time.monotonic() + 60 * minutes, out.resolve()
    chosen = _chosen(Plan(out, rehearse, checkpoint, text, model, mix, tests), only)
    out.mkdir(parents=True, exist_ok=True)
    variables = environment(out)
    found = machine(variables)
    claim_folder(out, {"rehearse": rehearse, "machine": found})
    console.print(", ".join(f"{name} {value}" for name, value in found.items()), highlight=False, soft_wrap=True)
    lease = Lease(out, deadline, found["gpu"], variables, console)
    lease.facts = {"command": command(), "machine": found}
    if resume or only:
        lease.resume()
        restore_launches(out)
    if not resume:
        for step in chosen:
            lease.forget(step)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a machine that is taken away says so
    status = 0
    try:
        lease.run(chosen)
    except KeyboardInterrupt:
        status = INTERRUPTED_STATUS
    lease.save()
    _report(lease, out)
    failed = [name for name, outcome in lease.outcomes.items() if outcome.state == FAILED]
    sys.exit(status or int(bool(failed)))
