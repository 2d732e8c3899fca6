"""The accuracy table from checkpoints and scores that are there."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from benchmarks.accuracy_table import cli
from benchmarks.accuracy_table.methods import ROWS, TOKENS, Row, baseline_module
from benchmarks.accuracy_table.report import mean_accuracy


@pytest.mark.slow
def test_table_from_what_is_there(tmp_path, capsys):
    out = tmp_path / "out"
    perplexities = {("16-bit", 0): 20.0, ("RTN (our implementation)", 1): 4000.0}
    perplexities |= {("butterfly `fast`", 0): 60.0, ("butterfly `fast`", 1): 64.0}
    for (label, seed), value in perplexities.items():
        slug = Row(label, "", "").slug
        checkpoint = out / ("16-bit" if label == "16-bit" else f"3/{slug}.seed{seed}")
        checkpoint.mkdir(parents=True)
        run = {"wall_seconds": 12.0, "resumed": False, "peak_memory_bytes": 2e9}
        report = {"totals": {"bits_per_weight": 3.25}, "calibration_tokens": 64, "run": run}
        (checkpoint / "bq_report.json").write_text(json.dumps(report))
        for dataset, factor in (("wikitext2", 1), ("c4-eval.jsonl", 2)):
            score = {"perplexity": {"dataset": dataset, "context": 128, "windows": 3, "value": value * factor}}
            checkpoint.with_name(f"{checkpoint.name}.{dataset}.128x3.json").write_text(json.dumps(score))
        for task, limit in {"one": "all", "two": 7}.items():
            score = {"tasks": {task: {"metric": "acc", "value": 0.5, "stderr": 0.03}}}
            checkpoint.with_name(f"{checkpoint.name}.{task}.{limit}.json").write_text(json.dumps(score))
    for seed in (0, 1):
        (out / f"tokens.seed{seed}.safetensors").touch()
    cli.main(
        Path("a-model"),
        bits=[3],
        dataset="c4",
        perplexity=["wikitext2", "data/c4/eval.jsonl"],
        context=128,
        windows=3,
        tasks="one,two:7",
        seed=[0, 1],
        only=["RTN, min-max", "RTN (our implementation)", "butterfly `fast`", "AutoRound, sym"],
        peers_python=tmp_path / "no-python",
        out=out,
        as_json=tmp_path / "table.json",
    )
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["16-bit", "RTN (our implementation)", "butterfly `fast`"]
    fast = result["rows"][2]["perplexity"]["c4/eval.jsonl"]
    assert (fast["value"], fast["spread"]) == (124, pytest.approx(8 / 2**0.5))
    assert "62.00 ±" in printed and "2.83" in printed and "4,000.00 " in printed and "4,000.00 ±" not in printed
    assert [one["seed"] for one in result["rows"][2]["seeds"]] == [0, 1]
    left_out = [f"3 bits, {row}, seed {seed}" for row in ("RTN, min-max", "AutoRound, symmetric") for seed in (0, 1)]
    assert [name for name in result["left_out"] if "RTN (our implementation)" not in name] == left_out
    assert all("no-python" in result["left_out"][name] for name in left_out)
    assert "left out: 3 bits, AutoRound, symmetric, seed 1" in printed and "3.250" in printed
    assert mean_accuracy(result["rows"][1]["tasks"]) == pytest.approx((0.5, 0.03 / 2**0.5))
    assert (tmp_path / "table.png").stat().st_size > 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| butterfly `fast`")] == lines[-1:], "a row is one line"
    with pytest.raises(typer.BadParameter):  # other tokens than those of the rows that are there
        cli.main(Path("a-model"), dataset="wikitext2", out=out)
    with pytest.raises(typer.BadParameter, match="two:few"):
        cli.main(Path("a-model"), dataset="c4", tasks="one,two:few", out=out)


def test_rows_run_what_is_there():
    for row in ROWS:
        command = [str(part) for part in row.call(Path("python"))]
        if command[1:2] == ["-m"]:
            assert find_spec(command[2]), row.label
        elif row.of_package:
            assert Path(command[1]).is_file() and command[0] == "python"
    assert len({row.slug for row in ROWS}) == len(ROWS)
    assert find_spec(baseline_module(TOKENS))
