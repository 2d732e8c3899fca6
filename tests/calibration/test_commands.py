"""The commands and the Python API as a user meets them: help, versions, logs, tables, docstring examples."""

import doctest
import json
import logging
import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import bq_calibration
import pytest
import torch
import yaml
from bq_calibration.compute import dtype_name
from bq_calibration.errors import UserError
from bq_calibration.inspection import describe, print_description
from bq_calibration.model import SourceModel
from bq_calibration.recipes import RECIPES, Recipe, flag, make_recipe
from rich.console import Console
from transformers import AutoTokenizer

from . import foreign
from .conftest import make_model
from .test_calibrate import run

SMALL = {"group_size": 32, "rotation": "butterfly", "rotation_block": 32, "samples": 4, "seqlen": 32, "steps": 3}
COMMANDS = ("calibrate", "convert", "evaluate", "inspect")


def command(name: str, *arguments: object) -> subprocess.CompletedProcess:
    script = f"from bq_calibration.cli import {name}_main; {name}_main()"
    call = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, text) -> Path:
    return run(model, tmp_path_factory.mktemp("commands") / "checkpoint", text)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help(name, asked):
    result = command(name, asked)
    assert result.returncode == 0 and "Usage" in result.stdout, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name):
    assert command(name, "--version").stdout == f"bq-vllm {version('bq-vllm')}\n"


def test_help_does_not_wait_for_torch():
    script = "import sys, bq_calibration.cli as cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert time.monotonic() - started < 5  # a fraction of a second; a busy machine may take longer


def test_help_shows_every_setting_with_its_values():
    text = " ".join(command("calibrate", "--help").stdout.replace("│", " ").split())
    for field in fields(Recipe):
        assert flag(field.name) in text
    for section in ("Format", "Rotation", "Rounding", "Training", "Data"):
        assert f"─ {section} ─" in text
    assert "(fast 512, best 512, max 2048, paper 2048)" in text
    assert list(RECIPES) == ["fast", "best", "max", "paper"]


@pytest.mark.parametrize("name", COMMANDS)
def test_docstring_examples(name, tmp_path, monkeypatch, text):
    make_model(tmp_path / "tiny-llama")
    (tmp_path / "text.txt").write_text(text.read_text())
    monkeypatch.chdir(tmp_path)
    function = getattr(bq_calibration, name)
    if name == "convert":
        layers, config = foreign.random_layers(Path("tiny-llama"), 2, 32), {"quant_method": "gptq", "bits": 2}
        foreign.write(Path("tiny-llama"), Path("tiny-llama-gptq"), layers, foreign.gptq(1), config)
    if name == "inspect":
        bq_calibration.calibrate("tiny-llama", "tiny-llama-bq2", dataset="text.txt", **SMALL)
    examples = doctest.DocTestFinder().find(function, name, globs={})
    assert sum(len(example.examples) for example in examples) >= 2
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.failures == 0


def test_api_refuses_unknown_settings(model, tmp_path):
    with pytest.raises(UserError, match="--bit-count: no such setting; known are --bits"):
        bq_calibration.calibrate(str(model), str(tmp_path / "out"), bit_count=2)


def test_log_lines_of_a_run(tmp_path, model, text, caplog):
    with caplog.at_level(logging.INFO, "bq_calibration"):
        out = run(model, tmp_path / "out", text)
    lines = (tmp_path / "out.log").read_text().splitlines()
    blocks = [line for line in lines if " block " in line]
    assert len(blocks) == 2 and "block 2 of 2: output error 0." in blocks[1] and "min to go" in blocks[1]
    assert f"{out}: " in lines[-1] and "bits per weight" in lines[-1]
    assert len(caplog.records) == len(lines), "the file and the logger say the same"
    assert not logging.getLogger("bq_calibration").handlers, "the file is closed"


def test_without_a_terminal_lines_take_the_place_of_bars(tmp_path, model, text):
    flags = [part for name, value in SMALL.items() for part in (flag(name), value)]
    result = command("calibrate", model, "-o", tmp_path / "out", "--dataset", text, "--no-plots", *flags)
    assert result.returncode == 0, result.stderr
    assert "block 1 of 2: output error" in result.stderr and "━" not in result.stderr
    assert "bits per weight" in result.stdout and not (tmp_path / "out" / "report").exists()


def test_inspection_fits_eighty_columns(checkpoint):
    page = Console(file=StringIO(), width=80)
    print_description(describe(checkpoint), page)
    printed = page.file.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    for text in ("All tensors verified", "q,k,v", "gate,up", "refined", "0.5"):
        assert text in printed
    report = json.loads((checkpoint / "bq_report.json").read_text())
    row = next(line for line in printed.split("Relative output error")[1].splitlines() if " down " in line)
    assert f"{report['inputs'][3]['refined_output_error']:.4f}" in row, "no column is cut"


# ---- the model card and the names in it


def card_of(folder: Path) -> tuple[dict, str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_model_card(checkpoint, model):
    data, text = card_of(checkpoint)
    assert data["library_name"] == "vllm" and data["pipeline_tag"] == "text-generation"
    assert {"butterfly", "2-bit", "quantized"} <= set(data["tags"])
    assert "base_model" not in data, "the source is a folder of this machine, no model of the hub"
    report = json.loads((checkpoint / "bq_report.json").read_text())
    assert f"{report['totals']['bits_per_weight']:.3f}" in text and "vllm serve" in text and "## Limits" in text
    assert f"| refine | output error of a layer | {report['gains'][-1]['before']:.4f}" in text
    for file in ("README.md", "config.json", "bq_report.json"):
        assert str(model.parent) not in (checkpoint / file).read_text(), f"{file} names a local folder"


def test_model_of_the_hub_cache_is_named_as_on_the_hub(tmp_path, text):
    folder = make_model(tmp_path / "hub" / "models--some-org--Tiny-Llama" / "snapshots" / "0123abcd")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n\n# Tiny\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/tiny"}))
    assert SourceModel(str(folder), torch.device("cpu")).name == "some-org/Tiny-Llama"
    out = run(folder, tmp_path / "out", text)
    data, body = card_of(out)
    assert data["base_model"] == "some-org/Tiny-Llama" and data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert "# some-org/Tiny-Llama, 2-bit butterfly" in body
    assert json.loads((out / "config.json").read_text())["_name_or_path"] == "some-org/Tiny-Llama"
    assert json.loads((out / "bq_report.json").read_text())["source_model"] == "some-org/Tiny-Llama"


def test_report_names_the_compute_dtype(checkpoint):
    run = json.loads((checkpoint / "bq_report.json").read_text())["run"]
    assert run["compute_dtype"]["forward"] == "float32"  # the tiny model's own
    assert run["compute_dtype"]["training"] in (dtype_name(torch.bfloat16), dtype_name(torch.float32))


def test_a_text_file_needs_no_package_for_datasets(tmp_path, monkeypatch):
    from bq_calibration.data import load_documents

    monkeypatch.setitem(sys.modules, "datasets", None)
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("some words")
    rows.write_text('{"text": "some words"}\n')
    assert load_documents(str(text), "test") == ["some words"]
    with pytest.raises(UserError, match="datasets"):
        load_documents(str(rows), "test")


@pytest.mark.parametrize(("suffix", "documents"), [("tokens", 1), ("jsonl", 1), ("jsonl", 3)])
def test_text_without_its_rare_words(suffix, documents, tmp_path, model, caplog):
    from bq_calibration.data import calibration_tokens, load_documents
    from bq_calibration.training_text import check_training_text

    tokenizer = AutoTokenizer.from_pretrained(model)
    file, text = tmp_path / f"text.{suffix}", " ".join(["a <unk> of the words ,"] + ["word"] * 500)
    file.write_text(text if suffix == "tokens" else f"{json.dumps({'text': text})}\n" * documents)
    load_documents(str(file), "test")
    assert not caplog.text  # an evaluation text is as it is
    warning = f"text.{suffix}: <unk> stands for {documents} rare words; calibrate on a text that has them"
    calibration_tokens(tokenizer, str(file), 1, 32, 0)
    assert warning in caplog.text
    caplog.clear()
    check_training_text(make_recipe("fast", {"mix": str(file), "train_tokens": 32}))
    assert warning in caplog.text
    caplog.clear()
    file.write_text(file.read_text().replace("<unk>", "share"))
    calibration_tokens(tokenizer, str(file), 1, 32, 0)
    check_training_text(make_recipe("fast", {"mix": str(file), "train_tokens": 32}))
    assert not caplog.text


def test_functions_stay_functions():
    """No module of the package has the name of a function, which it would hide once it is imported."""
    modules = {path.stem for path in Path(bq_calibration.__file__).parent.iterdir()}
    assert not modules & set(bq_calibration.__all__)
