"""Whole runs of bq-calibrate on tiny models: every architecture, every setting, resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from unittest.mock import Mock

import bq_calibration.hf  # noqa: F401
import pytest
import tiny
import torch
import transformers
from bq_calibration import data as data_module
from bq_calibration import pipeline as pipeline_module
from bq_calibration import quantize_block as quantize_block_module
from bq_calibration import workspace as workspace_module
from bq_calibration.block import Block
from bq_calibration.checkpoint import verify
from bq_calibration.data import calibration_tokens
from bq_calibration.model import SourceModel
from bq_calibration.pipeline import Calibration
from bq_calibration.recipes import make_recipe
from packaging.version import Version
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .conftest import CONFIGS, make_model

SMALL = dict(group_size=32, rotation="butterfly", rotation_block=32, samples=4, seqlen=32, steps=3)


def run(model: Path, out: Path, text: Path, recipe="fast", **settings) -> Path:
    resume, plots = settings.pop("resume", False), settings.pop("plots", False)
    chosen = make_recipe(recipe, SMALL | {"dataset": str(text)} | settings)
    Calibration(str(model), str(out), chosen, "cpu", resume, plots).run(Progress(disable=True))
    return out


def dense_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    model_type = config.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32).eval()
    state = tiny.stacked(tiny.decode(folder))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_every_architecture_from_model_to_logits(architecture, tmp_path, text):
    if architecture == "deepseek_v2" and Version(transformers.__version__) < Version("5.14"):
        pytest.skip("transformers before 5.14 fails where DeepSeek-V2 routes by groups")
    source = make_model(tmp_path / "model", architecture)
    recipe = make_recipe("fast", SMALL | {"dataset": str(text)})
    plan = Calibration(str(source), str(tmp_path / "out"), recipe, "cpu").dry_run(Progress(disable=True))
    out = run(source, tmp_path / "out", text)
    assert plan["checkpoint_bytes"] == verify(out).total_bytes
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("w1 w2 w3 w4 w5 w6 w7 w8", return_tensors="pt").input_ids
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        packed = loaded(input_ids=ids).logits
        dense = loaded.dequantize()(input_ids=ids).logits
    expected = dense_logits(out, ids)
    # float32 sums of a few hundred terms in another order
    bound = 1e-4 * expected.abs().max()
    assert (packed - expected).abs().max() < bound, "transformers, packed, differs from the independent decode"
    assert (dense - expected).abs().max() < bound, "transformers, dequantized, differs from the independent decode"


@pytest.mark.parametrize(
    "settings",
    [
        dict(rotation="none"),
        dict(rotation="hadamard"),
        dict(rotation="hadamard", rotation_block=None),
        dict(bits=3, zero_point="float"),
        dict(bits=4, rounding="rtn"),
        dict(group_size=-1),
        dict(recipe="paper", rotation_block=None),
        dict(recipe="paper", optimizer="sgd", init="random"),
        dict(tensor_parallel=3, rotation_block=None, init="identity"),
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_settings(settings, tmp_path, model, text):
    out = run(model, tmp_path / "out", text, **settings)
    verified = verify(out)
    ids = torch.arange(3, 19)[None]
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        packed = loaded(input_ids=ids).logits
    expected = dense_logits(out, ids)
    assert (packed - expected).abs().max() < 1e-4 * expected.abs().max()
    if "tensor_parallel" in settings:
        assert verified.config.rotation.block("down_proj") == 192 // 3


def test_bits_per_weight_counts_everything_and_shared_angles_once(tmp_path, model, text):
    verified = verify(run(model, tmp_path / "out", text))
    angles_a_feature = 5 * 16 / 32 * 16  # 5 layers of 16 angles for a block of 32, float16
    inputs = 96 + 96 + 96 + 192
    weights = 4 * 96 * 96 + 3 * 96 * 192
    expected = 2 + 16 / 32 + inputs * angles_a_feature / weights
    assert verified.bits_per_weight() == pytest.approx(expected)


def test_captured_inputs_are_those_of_the_quantized_prefix(tmp_path, model, text):
    """The last block must be quantized for what the finished model feeds it."""
    out = run(model, tmp_path / "out", text)
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(model), str(text), 4, 32, 0)
    served = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    seen = []
    served.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        served(input_ids=tokens)
    from bq_calibration.analysis import outliers

    kept = seen[0].reshape(-1, 96)[::2]  # 64 of the 128 tokens are kept for statistics
    reports = json.loads((out / "bq_report.json").read_text())["inputs"]
    report = next(r for r in reports if r["block"] == 1 and "q_proj" in r["layers"])
    assert report["inputs"]["before"]["kurtosis"] == pytest.approx(outliers(kept)["kurtosis"], rel=1e-3)


def test_streaming_holds_one_block_at_a_time(model):
    source = SourceModel(str(model), torch.device("cpu"))
    with source.block(1):
        held = [n for n, p in source.skeleton.named_parameters() if not p.is_meta]
    assert held and all(name.startswith("model.layers.1.") for name in held)
    assert all(p.is_meta for p in source.skeleton.parameters())


def test_report_and_pictures(tmp_path, model, text):
    out = run(model, tmp_path / "out", text, plots=True)
    report = json.loads((out / "bq_report.json").read_text())
    assert [gain["stage"] for gain in report["gains"]] == ["rotation, hadamard", "rotation, butterfly", "refine"]
    hadamard, butterfly, refine = report["gains"]
    assert (hadamard["after"], butterfly["after"]) == (butterfly["before"], refine["before"])
    assert butterfly["after"] == fmean(entry["relative_output_error"]["butterfly"] for entry in report["inputs"])
    assert len(report["inputs"]) == 2 * 4
    for entry in report["inputs"]:
        assert set(entry["inputs"]) == {"before", "after"}
        assert entry["best_coherence"] <= entry["coherence"] * (1 + 1e-3) <= 1.001
        assert len(entry["learning_curve"]) == 4
    assert report["run"]["wall_seconds"] > 0 and report["run"]["peak_memory_bytes"] > 1e7
    for name in ("outliers", "output_error", "coherence", "learning"):
        assert (out / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def same_checkpoint(a: Path, b: Path) -> None:
    names = sorted(str(f.relative_to(a)) for f in a.rglob("*") if f.is_file())
    assert names == sorted(str(f.relative_to(b)) for f in b.rglob("*") if f.is_file())
    for name in names:
        if name == "bq_report.json":  # time and memory differ from run to run, nothing else may
            first, second = (json.loads((folder / name).read_text()) for folder in (a, b))
            del first["run"], second["run"]
            assert first == second
        elif name == "SHA256SUMS":
            first, second = ((folder / name).read_text().splitlines() for folder in (a, b))
            assert len(first) == len(second) > 5
            differing = [line[66:] for line, other in zip(first, second, strict=True) if line != other]
            assert differing in ([], ["bq_report.json"])
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def interrupted(original, after: int):
    """`original`; every call behind the first `after` is Ctrl-C."""
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("stop_at", ["tokens", "quantize", "write", "export"])
def test_resume_after_ctrl_c_gives_the_same_bytes(stop_at, tmp_path, model, text, monkeypatch):
    whole = run(model, tmp_path / "whole", text)
    with monkeypatch.context() as patch:
        if stop_at == "tokens":
            patch.setattr(data_module, "calibration_tokens", interrupted(calibration_tokens, 0))
        elif stop_at == "quantize":
            patch.setattr(quantize_block_module, "round_gptq", interrupted(quantize_block_module.round_gptq, 16))
        elif stop_at == "write":
            patch.setattr(workspace_module, "write_tensors", interrupted(workspace_module.write_tensors, 2))
        else:
            patch.setattr(pipeline_module, "write_report", interrupted(pipeline_module.write_report, 0))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()
    samples = []
    with monkeypatch.context() as patch:
        run_block = Block.run
        patch.setattr(Block, "run", lambda self, x, **k: (samples.append(len(x)), run_block(self, x, **k))[1])
        run(model, tmp_path / "out", text, resume=True)
    # all blocks are there: none runs again, but for the one sample that every run is checked with
    assert (max(samples) == 1) is (stop_at == "export")
    same_checkpoint(whole, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_report_counts_the_time_of_interrupted_processes(tmp_path, model, text, monkeypatch):
    began = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "write_report", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text)
    clock = tmp_path / "out.partial" / "clock.json"
    times = json.loads(clock.read_text())
    clock.write_text(json.dumps(times | {"started": times["started"] - 1000}))
    run(model, tmp_path / "out", text, resume=True)
    report = json.loads((tmp_path / "out" / "bq_report.json").read_text())
    assert report["run"]["resumed"]
    assert 1000 < report["run"]["wall_seconds"] <= 1000 + time.time() - began + 0.1


@pytest.mark.slow
def test_resume_after_kill_at_any_moment_gives_the_same_bytes(tmp_path, model, text):
    script = "from bq_calibration.cli import calibrate_main; calibrate_main()"
    flags = [model, "--dataset", text, "--samples", 4, "--seqlen", 32, "--group-size", 32, "--rotation-block", 32]
    command = [str(x) for x in (sys.executable, "-c", script, *flags, "--steps", 30)]

    def start(out):
        return subprocess.Popen([*command, "-o", str(out), "--resume"], env=os.environ, stderr=subprocess.PIPE)

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    duration = time.monotonic() - began
    staging = tmp_path / "out.partial"
    kills = 0
    for n in range(8):
        process = start(tmp_path / "out")
        deadline = time.monotonic() + 4 * duration
        while process.poll() is None and not staging.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.07 * n)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists() or process.returncode == 0 or verify(tmp_path / "out")
        if (tmp_path / "out").exists():
            break
    assert kills >= 2, "the runs ended before they could be killed"
    if not (tmp_path / "out").exists():
        assert start(tmp_path / "out").wait() == 0
    same_checkpoint(tmp_path / "whole", tmp_path / "out")
