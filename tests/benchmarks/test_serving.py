"""The serving benchmark runs to its end on a CPU, on a shape so small that its times mean nothing; its parts."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console

from benchmarks.vllm_serving import cli, parity, report
from benchmarks.vllm_serving.models import SHAPE_NAMES, SHAPES, read_config
from benchmarks.vllm_serving.processes import cause
from benchmarks.vllm_serving.session import resumed
from benchmarks.vllm_serving.settings import Settings
from benchmarks.vllm_serving.step_profile import breakdown
from benchmarks.vllm_serving.worker import Weights

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def smoke(run, tmp_path) -> Callable[..., tuple[dict, str]]:
    """Gives the record of serving.py and what it printed; it refuses rows whose logits are not finite."""

    def smoke(*arguments: str, **variables: str) -> tuple[dict, str]:
        out = tmp_path / "serving.json"
        places = ("--work", tmp_path / "work", "--json", out)
        printed = run("serving.py", "--smoke", "--runs", 1, *places, *arguments, **variables)
        assert out.with_suffix(".png").exists()
        return json.loads(out.read_text()), printed

    return smoke


def dense_bytes(dtype: torch.dtype) -> int:
    """Bytes of the dense model of the smoke shape as vLLM holds it.

    Beside weights that is the cosines and sines of positions, and float32 scales of queries, keys, values and
    probabilities in each layer.
    """
    shape = dict(zip(SHAPE_NAMES, SHAPES["smoke"], strict=True))
    hidden, mlp, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    head = hidden // shape["num_attention_heads"]
    kv = shape["num_key_value_heads"] * head
    attention = hidden * (hidden + 2 * kv) + hidden * hidden
    layers, layer = shape["num_hidden_layers"], attention + 3 * hidden * mlp + 2 * hidden
    weights = 2 * vocabulary * hidden + layers * layer + hidden
    return (weights + shape["max_position_embeddings"] * head) * dtype.itemsize + layers * 4 * 4


@needs_vllm
@pytest.mark.slow
def test_serving(smoke):
    record, printed = smoke("--rows", "butterfly-128,vllm-hadamard-w2", "--profile")
    row = record["rows"]["butterfly-128"]
    # None where vLLM's CPU build repacks weights for this CPU; elsewhere a CPU holds them dense
    flags = record["settings"]["flags"]
    dtype = getattr(torch, flags[flags.index("--dtype") + 1])
    if not torch.cuda.is_available():
        assert row["weights_gib"] in (None, dense_bytes(dtype) / 2**30)
    assert row["kv_tokens"] > 0
    assert row["latency"]["2"][0] > 0 and row["prefill"]["1"][0] > 0 and row["throughput"]["4"][0] > 0
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
def test_serving_with_interpreted_kernels(smoke):
    interpreted = {"BQ_VLLM_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    record, _ = smoke("--rows", "butterfly-128", "--parts", "latency", **interpreted)
    assert record["rows"]["butterfly-128"]["latency"]["2"][0] > 0


def test_dummy_weights():
    model = torch.nn.Module()
    model.qweight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.int32).T, requires_grad=False)
    model.locks = torch.nn.Parameter(torch.zeros(64, dtype=torch.int32), requires_grad=False)
    model.scales = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    worker = Weights()
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


def test_breakdown_of_a_step():
    kernels = [("_decode_kernel", 0, 10), ("_rotate_kernel", 8, 12), ("memcpy", 14, 16), ("flash_fwd", 16, 20)]
    found = breakdown(events("kernel", *kernels))
    # halves, of two steps; the overlap counts for the later kernel
    wanted = {"GEMM": 4, "rotation": 2, "gaps": 1, "other": 1, "attention": 2, "norms": 0, "step": 10}
    assert found == wanted
    operators = [("aten::linear", 0, 10), ("aten::copy_", 2, 4), ("bq::rotate", 6, 8), ("aten::add", 12, 20)]
    found = breakdown(events("cpu_op", *operators))
    assert found == {"GEMM": 4, "rotation": 1, "gaps": 1, "other": 4, "attention": 0, "norms": 0, "step": 10}
    with pytest.raises(ValueError, match="0 steps"):
        breakdown([])


def test_cause_is_the_root_cause(tmp_path):
    log = tmp_path / "log"
    prefix = "(EngineCore pid=1) ERROR 01-02 03:04:05 [core.py:1]"
    log.write_text(
        f"{prefix} Traceback (most recent call last):\n{prefix} ValueError: no kernel. Reasons:\n{prefix} it is old\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert cause(log, "it ended").startswith("ValueError: no kernel. Reasons: it is old")
    log.write_text("nothing\n")
    assert cause(log, "it ended") == f"it ended ({log})"


def test_tables_compare_with_fp16(tmp_path):
    settings = Settings(2, (32, 128), (512, 128), 256, ())
    served = {"median_ttft_ms": 8.0, "median_tpot_ms": 2.0, "output_throughput": 500.0}
    rows = {
        "fp16": {"weights_gib": 12.5, "latency": {"1": [1.28, 1.28]}, "serve": {"8": [served]}},
        "untold": {"weights_gib": None, "latency": {"1": [1.28, 1.28]}},
        "ours": {"loading_gib": 2.5, "kv_tokens": 9e4, "latency": {"1": [0.32, 0.32]}, "serve": {"8": [served]}},
    }
    console = Console(width=180, record=True)
    for table in report.tables(rows, settings):
        console.print(table)
    printed = console.export_text()
    assert "12.500" in printed and "2.500" in printed and "90,000" in printed
    assert "None" not in printed and "nan" not in printed
    assert "100 ±0%, 1.00×" in printed and "400 ±0%, 4.00×" in printed
    report.plot(rows, settings).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_only_comparable_figures_are_resumed(tmp_path):
    path = tmp_path / "serving.json"
    path.write_text(json.dumps({"environment": {"device": "a"}, "rows": {"fp16": {}}}))
    assert resumed(path, {"environment": {"device": "a"}})["rows"] == {"fp16": {}}
    with pytest.raises(SystemExit, match="another environment"):
        resumed(path, {"environment": {"device": "b"}})


def test_model_must_be_known(tmp_path):
    with pytest.raises(typer.BadParameter, match="neither one of"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    with pytest.raises(typer.BadParameter, match="10,000"):
        read_config(str(tmp_path))


def test_dtype_suits_the_device(monkeypatch):
    monkeypatch.setattr(cli, "native_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = cli.engine_flags(False, [])
    assert flags[flags.index("--dtype") + 1] == "float32"
    assert cli.engine_flags(False, ["--dtype", "half"]).count("--dtype") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flags = cli.engine_flags(False, [])
    assert flags[flags.index("--dtype") + 1] == "float16"
    assert parity.serving_dtype("anything") == "auto"


def test_parity_serves_in_a_native_dtype(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    monkeypatch.setattr(parity, "native_dtype", lambda preferred, _: preferred)
    assert parity.serving_dtype(str(tmp_path)) == "bfloat16"
    monkeypatch.setattr(parity, "native_dtype", lambda *_: torch.float32)
    assert parity.serving_dtype(str(tmp_path)) == "float32"
