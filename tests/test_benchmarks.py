"""The benchmarks run to their end on a CPU, on shapes so small that their times mean nothing."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def run(script: str, *arguments: object, **variables: str) -> str:
    call = [str(part) for part in (sys.executable, BENCHMARKS / script, *arguments)]
    environment = os.environ | variables
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels(tmp_path):
    printed = run("kernels.py", "run", "--smoke", "--json", tmp_path / "kernels.json")
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").exists()
    ours = {"ours, no rotation", "ours, block = group", "ours, full width", "ours, Hadamard = group"}
    for row in record["rows"]:
        assert ours | {"cuBLAS fp16"} <= row["times"].keys()
        assert all(0 < error < 2e-3 for name, error in row["errors"].items() if name in ours)
    # a peer that is not installed is named, not passed over
    assert "left out: smoke smoke, Humming W2" in printed or "Humming W2" in record["rows"][0]["times"]


@pytest.mark.slow
def test_tuning_of_kernels():
    table = BENCHMARKS.parent / "kernels" / "bq_kernels" / "launch.json"
    before = table.read_text()
    assert "3 lines" in run("kernels.py", "tune", "--smoke")
    assert table.read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_want_a_gpu():
    call = [sys.executable, BENCHMARKS / "kernels.py", "run"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no GPU here" in done.stderr


def smoke(folder: Path, *arguments: str, **variables: str) -> tuple[dict, str]:
    """The record of serving.py and what it printed; it refuses rows whose logits are not finite."""
    out = folder / "serving.json"
    places = ("--work", folder / "work", "--json", out)
    printed = run("serving.py", "--smoke", "--runs", 1, *places, *arguments, **variables)
    assert out.with_suffix(".png").exists()
    return json.loads(out.read_text()), printed


@needs_vllm
@pytest.mark.slow
def test_serving(tmp_path):
    record, printed = smoke(tmp_path, "--rows", "butterfly-128,vllm-hadamard-w2", "--profile")
    row = record["rows"]["butterfly-128"]
    assert row["weights_gib"] is None and row["kv_tokens"] > 0
    assert row["latency"]["2"][0] > 0 and row["throughput"]["4"][0] > 0
    step = row["profile"]["2"]
    assert step["GEMM"] > 0 and step["attention"] > 0
    assert sum(step.values()) == pytest.approx(2 * step["step"])
    (served,) = row["serve"]["2"]
    assert served["median_ttft_ms"] > 0 and served["median_tpot_ms"] > 0 and served["output_throughput"] > 0
    # a peer that cannot run here is named, not passed over
    assert "left out: vllm-hadamard-w2, " in printed or record["rows"]["vllm-hadamard-w2"]["latency"]


@needs_vllm
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton then compiles")
def test_serving_with_interpreted_kernels(tmp_path):
    interpreted = {"BQ_VLLM_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    record, _ = smoke(tmp_path, "--rows", "butterfly-128", "--parts", "latency", **interpreted)
    assert record["rows"]["butterfly-128"]["latency"]["2"][0] > 0


@pytest.fixture
def modules(monkeypatch):
    """Imports modules of serving.py by what follows `serving`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return lambda name: import_module(f"serving{name}")


@pytest.fixture
def serving(modules):
    return modules("")


@pytest.fixture
def engine(modules):
    return modules("_engine")


@pytest.fixture
def tables(modules):
    return modules("_tables")


def test_dummy_weights(engine):
    model = torch.nn.Module()
    model.qweight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.int32).T, requires_grad=False)
    model.locks = torch.nn.Parameter(torch.zeros(64, dtype=torch.int32), requires_grad=False)
    model.scales = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    worker = engine.Weights()
    worker.get_model = lambda: model
    worker.vllm_config = SimpleNamespace(load_config=SimpleNamespace(load_format="dummy"))
    assert worker.prepare_weights() == {"weights_gib": (64 * 64 * 4 + 64 * 4 + 64 * 2) / 2**30}
    ones = sum(int(model.qweight[i, j]) >> bit & 1 for i in range(8) for j in range(8) for bit in range(32))
    assert 0.4 < ones / 8 / 8 / 32 < 0.6 and not model.locks.any()
    model.moved = torch.nn.Parameter(torch.empty(0))
    assert worker.prepare_weights() == {"weights_gib": None}
    model.scales.data[3] = torch.nan
    with pytest.raises(ValueError, match="scales holds NaN"):
        worker.prepare_weights()


def events(category: str, *spans: tuple[str, float, float]) -> list[dict]:
    steps = [{"name": "execute_context_0(0)_generation_1(1)", "cat": "user_annotation"}] * 2
    return steps + [{"name": name, "cat": category, "ts": start, "dur": end - start} for name, start, end in spans]


def test_breakdown_of_a_step(engine):
    kernels = [("_decode_kernel", 0, 10), ("_rotate_kernel", 8, 12), ("memcpy", 14, 16), ("flash_fwd", 16, 20)]
    found = engine.breakdown(events("kernel", *kernels))
    # halves, of two steps; the overlap counts for the later kernel
    wanted = {"GEMM": 4, "rotation": 2, "gaps": 1, "other": 1, "attention": 2, "norms": 0, "step": 10}
    assert found == wanted
    operators = [("aten::linear", 0, 10), ("aten::copy_", 2, 4), ("bq::rotate", 6, 8), ("aten::add", 12, 20)]
    found = engine.breakdown(events("cpu_op", *operators))
    assert found == {"GEMM": 4, "rotation": 1, "gaps": 1, "other": 4, "attention": 0, "norms": 0, "step": 10}
    with pytest.raises(ValueError, match="0 steps"):
        engine.breakdown([])


def test_cause_is_the_root_cause(engine, tmp_path):
    log = tmp_path / "log"
    prefix = "(EngineCore pid=1) ERROR 01-02 03:04:05 [core.py:1]"
    log.write_text(
        f"{prefix} Traceback (most recent call last):\n{prefix} ValueError: no kernel. Reasons:\n{prefix} it is old\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert engine.cause(log, "it ended").startswith("ValueError: no kernel. Reasons: it is old")
    log.write_text("nothing\n")
    assert engine.cause(log, "it ended") == f"it ended ({log})"


def test_tables_compare_with_fp16(engine, tables, tmp_path, capsys):
    settings = engine.Settings(2, (32, 128), (512, 128), 256, ())
    served = {"median_ttft_ms": 8.0, "median_tpot_ms": 2.0, "output_throughput": 500.0}
    rows = {
        "fp16": {"weights_gib": 12.5, "latency": {"1": [1.28, 1.28]}, "serve": {"8": [served]}},
        "untold": {"weights_gib": None, "latency": {"1": [1.28, 1.28]}},
        "ours": {"loading_gib": 2.5, "kv_tokens": 9e4, "latency": {"1": [0.32, 0.32]}, "serve": {"8": [served]}},
    }
    tables.print_tables(rows, settings)
    printed = capsys.readouterr().out
    assert "12.500" in printed and "2.500" in printed and "90,000" in printed
    assert "None" not in printed and "nan" not in printed
    assert "100 ±0%, 1.00×" in printed and "400 ±0%, 4.00×" in printed
    tables.plot(rows, settings, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_only_comparable_figures_are_resumed(serving, tmp_path):
    path = tmp_path / "serving.json"
    path.write_text(json.dumps({"environment": {"device": "a"}, "rows": {"fp16": {}}}))
    assert serving.resumed(path, {"environment": {"device": "a"}})["rows"] == {"fp16": {}}
    with pytest.raises(SystemExit, match="another environment"):
        serving.resumed(path, {"environment": {"device": "b"}})


def test_model_must_be_known(serving, tmp_path):
    with pytest.raises(serving.typer.BadParameter, match="neither one of"):
        serving.read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    with pytest.raises(serving.typer.BadParameter, match="10,000"):
        serving.read_config(str(tmp_path))
