"""docs/parity.md: the results of the matrix as tables. Every cell comes from the results, an empty one was not run."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .matrix import EXCLUDED, FACTORS, REFUSALS, cases
from .pairwise import Case, holds, pairs, pairs_of

CHECKS = {  # by name, with a short one for the head of a table
    "transformers packed": "transformers packed",
    "transformers dequantized": "transformers dequantized",
    "vLLM dense, batch 1": "vLLM dense, batch 1",
    "vLLM dense, batch 8": "batch 8",
    "vLLM dense, LoRA": "LoRA",
    "vLLM dense, reload_weights": "reload",
    "vLLM Triton, batch 1": "vLLM Triton, batch 1",
    "vLLM Triton, batch 8": "batch 8",
    "vLLM Triton, LoRA": "LoRA",
    "vLLM Triton, reload_weights": "reload",
}
PAGE = """# Parity

A checkpoint is computed in five ways. The first is the reference, in float32:

- transformers with dense weights, decoded by a reader of the format that shares no code with the project;
- transformers with packed weights;
- transformers after `dequantize()`;
- vLLM's CPU build with the backend `dense`;
- vLLM's CPU build with the backend `triton`, whose kernels run in Triton's interpreter.

The others must give the reference's log-probabilities, of a prompt's tokens and of greedy ones, within a bound, and
the same greedy tokens. A token may differ only where the two likeliest tokens of the reference are closer than twice
the bound: a tie. The bound is (4 ε + n ε₃₂) L: ε the machine epsilon of the dtype, for weights and activations that
are rounded to it; ε₃₂ that of float32, for sums in another order, n = 16, and 32 in a mixture of experts, which sums
over these too; L the largest magnitude of a log-probability.

Models are random: two decoder layers, 128 features, calibrated by `bq-calibrate`. Routers of mixtures tell eight kinds
of tokens clearly apart: with random ones, rounding would send some tokens to other experts. There are eight prompts of
1 to 120 tokens. The first is asked alone (batch 1), then all at once (batch 8).

The factors have {values} values, their product {product:,} cases. The matrix has {cases} cases, in which every two
values of two factors meet, but for those that are refused. `tests/parity/matrix.py` lists factors, values and refusals.
This command runs those that have not passed in `benchmarks/results/parity_matrix.json` yet, and writes this page:

```console
$ python -m tests.parity
```

`make test` runs a few of the cases. No GPU has run any.

{run} of {cases} cases have run, {passed} passed. {covered:,} of {pairs:,} pairs of values are in a case that
passed.{where}

## Values and checks

Checks that passed, of those that ran. The checks of LoRA and `reload_weights` belong to the cases that have them on.

{checks}
## Values and architectures

`tested`: all checks of all cases with both values passed. A number in brackets is that of a refusal below. An empty
cell was not run.

{architectures}
## Errors

Largest error of a log-probability, its bound, greedy tokens that were equal, and ties.

{errors}
## Refused

{refusals}"""


def passed(result: dict) -> bool:
    """Whether all checks of a case passed."""
    return all(check["passed"] for check in result["checks"].values())


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines)


def _checks(results: list[dict]) -> str:
    rows = []
    for name, values in FACTORS.items():
        for value in values:
            having = [result["checks"] for result in results if result["values"][name] == value]
            found = [[checks[check]["passed"] for checks in having if check in checks] for check in CHECKS]
            rows.append([f"{name}: {value}", *(f"{sum(ran)} of {len(ran)}" if ran else "" for ran in found)])
    return _table(["", *CHECKS.values()], rows)


def _cell(values: Case, results: list[dict], refused: list[dict]) -> str:
    for number, refusal in enumerate(REFUSALS, start=1):
        if holds(values, refusal.values):
            return f"refused ({number})" if any(one["values"] == refusal.values for one in refused) else ""
    having = [passed(result) for result in results if holds(result["values"], values)]
    return ("tested" if all(having) else "**failed**") if having else ""


def _architectures(results: list[dict], refused: list[dict]) -> str:
    names = FACTORS["architecture"]
    rows = [
        [f"{factor}: {value}", *(_cell({"architecture": name, factor: value}, results, refused) for name in names)]
        for factor, values in FACTORS.items()
        for value in values
        if factor != "architecture"
    ]
    return _table(["", *names], rows)


def _errors(results: list[dict]) -> str:
    rows = []
    for dtype in FACTORS["dtype"]:
        for name in CHECKS:
            having = [result["checks"].get(name, {}) for result in results if result["values"]["dtype"] == dtype]
            found = [check for check in having if "error" in check]
            if found:
                worst = max(found, key=lambda check: check["error"] / check["bound"])
                counts = [sum(check[key] for check in found) for key in ("tokens", "ties")]
                rows.append([dtype, name, f"{worst['error']:.2g}", f"{worst['bound']:.2g}", *counts])
    return _table(["dtype", "", "error", "bound", "equal tokens", "ties"], rows)


def _refusals(refused: list[dict]) -> str:
    lines = []
    for number, refusal in enumerate(REFUSALS, start=1):
        values = ", ".join(f"{name} {value}" for name, value in refusal.values.items())
        found = next((one for one in refused if one["values"] == refusal.values), None)
        said = f"`{found['message']}`" if found else "not run"
        wrong = "" if found is None or found["passed"] else ", **but it was not**"
        lines.append(f"{number}. {values}: refused by {refusal.by}{wrong}: {said}\n")
    return "".join(lines)


def render(record: dict) -> str:
    """The page, from the record of the results' file."""
    results, refused = record["cases"], record["refused"]
    met = {pair for result in results if passed(result) for pair in pairs_of(result["values"])}
    possible = pairs(FACTORS, EXCLUDED)
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return PAGE.format(
        values=sum(map(len, FACTORS.values())),
        product=math.prod(map(len, FACTORS.values())),
        cases=len(cases()),
        run=len(results),
        passed=sum(map(passed, results)),
        covered=len(met & set(possible)),
        pairs=len(possible),
        where=f" On {record['cpu']}, {versions}." if versions else "",
        checks=_checks(results),
        architectures=_architectures(results, refused),
        errors=_errors(results),
        refusals=_refusals(refused),
    )
