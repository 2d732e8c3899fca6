"""The benchmark of kernels runs to its end on a CPU, on shapes so small that its times mean nothing."""

import json
from pathlib import Path

import pytest
import torch
from bq_kernels import ops
from bq_kernels.gpu import Gpu
from bq_kernels.triton_linear import Launch

from benchmarks.packed_linear import quarot, tuning
from benchmarks.packed_linear.report import comparison_table, layer_table
from benchmarks.packed_linear.warming import WarmUp, kernels_of

ROOT = Path(__file__).parents[2]
LAUNCH_TABLE = ROOT / "kernels" / "bq_kernels" / "launch.json"
MEASURED = ROOT / "benchmarks" / "results" / "h100" / "kernels_default_launch.json"


def test_kernels(run, tmp_path):
    printed = run("kernels.py", "run", "--smoke", "--json", tmp_path / "kernels.json")
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").exists()
    ours = {"ours, no rotation", "ours, block = group", "ours, full width", "ours, Hadamard = group"}
    for row in record["rows"]:
        assert ours | {"cuBLAS fp16"} <= row["times"].keys()
        assert all(0 < error < 2e-3 for name, error in row["errors"].items() if name in ours)
    # a peer that is not installed is named, not passed over
    for peer in ("Humming W2", "QuaRot W4A4"):
        assert f"left out: smoke smoke, {peer}" in printed or peer in record["rows"][0]["times"]


@pytest.mark.slow
def test_mixture(run, tmp_path):
    printed = run("kernels.py", "mixture", "--smoke", "--json", tmp_path / "mixture.json")
    record = json.loads((tmp_path / "mixture.json").read_text())
    assert [row["rows"] for row in record["rows"]] == [1, 5]
    assert all(
        row["times"].keys() >= row["errors"].keys() and max(row["errors"].values()) < 1e-2 for row in record["rows"]
    )
    assert "MLP of a mixture" in printed


def test_vocabulary(run, tmp_path):
    printed = run("kernels.py", "vocabulary", "--smoke", "--json", tmp_path / "vocabulary.json")
    record = json.loads((tmp_path / "vocabulary.json").read_text())
    assert [(row["part"], row["rows"]) for row in record["rows"]] == [
        *(("LM head", rows) for rows in (1, 5)),
        *(("look-up", tokens) for tokens in (1, 70)),
    ]
    for row in record["rows"]:
        assert row["times"].keys() & {"cuBLAS fp16", "F.embedding fp16"} and "ours, block = group" in row["times"]
        assert all(0 < error < 2e-3 for error in row["errors"].values())
    assert "LM head, µs" in printed and "look-up, µs" in printed


@pytest.mark.slow
def test_tuning_of_kernels(run):
    before = LAUNCH_TABLE.read_text()
    # of 1 and 5 rows; where more have not been tried, the lines of before stay
    assert "7 lines for no GPU" in run("kernels.py", "tune", "--smoke")
    assert LAUNCH_TABLE.read_text() == before


def test_tuning_tries_kernels_that_the_gpu_has():
    kernels = {}
    for architecture in ("sm90", "sm80", "gfx942"):
        gpu = Gpu("", architecture, 1, False)
        kernels[architecture] = [{launch.kernel for launch in tuning.candidates(rows, gpu)} for rows in (1, 16, 128)]
    assert kernels["sm90"] == kernels["sm80"] == [{"decode", "mma"}, {"decode", "mma", "gemm"}, {"gemm", "dense"}]
    assert kernels["gfx942"] == [{"decode"}, {"decode", "gemm"}, {"gemm", "dense"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_want_a_gpu(start):
    done = start("kernels.py", "run")
    assert done.returncode != 0 and "no GPU here" in done.stderr


@pytest.mark.skipif(ops.interpreted(), reason="an interpreted kernel cannot be compiled")
def test_kernels_are_built_ahead(gpu):
    launches = [Launch(1, "decode", 2, 512, True), Launch(16, "gemm", block_m=16), Launch(None, "dense")]
    found = kernels_of(WarmUp(192, 256, 64, [1, 5], launches), "cpu")
    names = {wanted.kernel.__name__ for wanted in found}
    assert names == {"_decode_kernel", "_gemm_kernel", "_dequantize_kernel", "_rotate_kernel"}
    assert len(kernels_of(WarmUp(192, 256, 64, [1], [None]), "cpu")) == 3  # in blocks, full width, and no rotation
    names = {wanted.kernel.__name__ for wanted in kernels_of(WarmUp(192, 256, 64, [5], [None], True), "cpu")}
    assert names == {"_gemm_kernel", "_rotate_kernel", "_norm_kernel"}


def test_plot_without_measuring(run, tmp_path):
    printed = run("kernels.py", "plot", MEASURED, "--out", tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 0
    assert "12288 × 4096" in printed and "2.63 to 2.76" in printed


def test_quarot_is_compiled_from_its_source(start, tmp_path):
    command = quarot.build_command(Path("QuaRot"), Path("cutlass"), Path("q.so"), "sm_80")
    assert "QuaRot/quarot/kernels/gemm.cu" in command and "-Icutlass/include" in command
    assert "arch=compute_80,code=sm_80" in command
    done = start("kernels.py", "build-quarot", tmp_path, tmp_path, "-o", tmp_path / "q.so", "--nvcc", "no-nvcc")
    assert done.returncode == 1 and "QuaRot does not compile" in done.stderr and "no-nvcc" in done.stderr


def test_weights_of_quarot():
    weight = torch.tensor([[7.0, -7.0, 3.0, -1.0], [0.5, 0.25, -0.5, 0.0]])
    packed, scales = quarot.quantize_rows(weight)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes)
    assert codes.tolist() == [[7, -7, 3, -1], [7, 4, -7, 0]]  # 0.25 is 3.5 steps, rounded to even
    assert scales.tolist() == pytest.approx([1.0, 0.5 / 7], rel=1e-3)


def test_tables_of_a_record():
    record = json.loads(MEASURED.read_text())
    table = layer_table(record["rows"], "square square")
    assert table.row_count == 11 and [column.header for column in table.columns][:3] == ["rows", "floor", "cuBLAS fp16"]
    assert next(iter(table.columns[2].cells)) == "47.3"
    rows = [row for row in record["rows"] if row["rows"] == 1]
    (times,) = (row["times"] for row in rows if row["layer"] == "square square")
    assert times["cuBLAS fp16"] / times["ours, block = group"] == pytest.approx(2.76, abs=0.01)
    comparison = comparison_table(rows, record["ceilings"]["bandwidth"])
    assert [next(iter(column.cells)) for column in comparison.columns][:2] == ["1", "2.63 to 2.76"]


def test_launch_table_keeps_other_devices(tmp_path):
    path = tmp_path / "launch.json"
    path.write_text('{"sm90": [{"max_rows": null, "kernel": "dense"}]}')
    mma = Launch(8, "mma", outputs=64, warps=8, stages=2, exact=True)
    launches = [Launch(1, "decode", 2, 1024, True), mma, Launch(64, "gemm", block_m=64), Launch(None, "dense")]
    tuning.write_launch_table("a GPU", launches, path)
    table = json.loads(path.read_text())
    assert table["sm90"] == [{"max_rows": None, "kernel": "dense"}]
    assert table["a GPU"][0] == {"max_rows": 1, "kernel": "decode", "programs": 2, "slice": 1024, "fuse": True}
    assert [Launch(**line) for line in table["a GPU"]] == launches
    assert len(path.read_text().splitlines()) == 11  # one line per launch
