"""What goes wrong says what it is and what to do, exits non-zero and leaves nothing that looks whole."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bq_calibration import cli
from bq_calibration.checkpoint import verify
from bq_calibration.errors import UserError
from safetensors.torch import load_file, save_file

from .conftest import make_text
from .test_calibrate import run

FLAGS = [
    "--group-size",
    "32",
    "--rotation-block",
    "32",
    "--samples",
    "4",
    "--seqlen",
    "32",
    "--steps",
    "3",
    "--no-plots",
]


def in_own_process(name: str, *arguments: object, **kwargs) -> subprocess.CompletedProcess:
    """Run a command as a user does, in a process of its own."""
    script = f"from bq_calibration.cli import {name}_main; {name}_main()"
    call = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command's entry point here, which saves the seconds that a new process takes to import torch."""

    def run_command(name: str, *arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [f"bq-{name}", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            getattr(cli, f"{name}_main")()
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, exit_info.value.code, captured.out, captured.err)

    return run_command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, text) -> Path:
    return run(model, tmp_path_factory.mktemp("good") / "checkpoint", text)


@pytest.fixture
def broken(checkpoint, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)  # what breaks the format is refused without checksums too


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


NAME = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.scales"), f"{NAME}.scales is missing"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({f"{NAME}.extra": torch.zeros(1)}), f"{NAME}.extra does not belong"),
        (lambda t: t[f"{NAME}.scales"].view(-1)[3].fill_(torch.nan), f"{NAME}.scales: holds NaN"),
        (lambda t: t[f"{NAME}.angles"].add_(0.5), "angles differs from"),
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"].float()}), f"{NAME}.scales: expected torch.float16"),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"][:, 1:].clone()}), f"{NAME}.qweight: expected"),
    ],
    ids=["missing", "missing norm", "surplus", "nan", "angles differ", "dtype", "shape"],
)
def test_damaged_tensors(change, message, broken):
    change_tensors(broken, change)
    with pytest.raises(UserError, match=message):
        verify(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "format_version: this software reads version 1, the checkpoint says 2"),
        ({"new_key": 1}, "unknown key 'new_key'"),
        ({"bits": 5}, "bits: expected one of"),
        ({"group_size": 64}, "choose a group size that divides 96"),
        ({"rotation": {"kind": "butterfly", "block_size": {"default": 64}}}, "block size 64 does not divide"),
        ({"rotation": {"kind": "fourier", "block_size": {"default": 32}}}, "rotation.kind"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_config(values, message, broken):
    change_config(broken, **values)
    with pytest.raises(UserError, match=message):
        verify(broken)


def test_truncated_shard(command, broken):
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    result = command("inspect", broken)
    assert result.returncode == 1 and re.search(r"model\.safetensors: damaged, \d+ bytes of \d+", result.stderr)


def test_transformers_refuses_what_inspect_refuses(broken):
    import bq_calibration.hf  # noqa: F401
    from transformers import AutoModelForCausalLM

    change_tensors(broken, lambda t: t.pop(f"{NAME}.scales"))
    with pytest.raises(UserError, match=r"q_proj\.scales is missing"):
        AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "64"], "--group-size 64 does not divide the 96 inputs of q_proj,k_proj,v_proj"),
        (["--rotation-block", "64"], "--rotation-block 64 does not divide the 96 inputs"),
        (
            ["--tensor-parallel", "2", "--rotation-block", "96"],
            "--rotation-block 96 does not divide the 48 inputs of o_proj",
        ),
        (["--bits", "5"], "--bits 5: expected one of 2, 3, 4"),
        (["--recipe", "nice"], "--recipe nice: unknown; known are fast, best, max, paper"),
        (["--dataset", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--dataset", "imagenet"], "is no data set"),
        (["--seqlen", "100000"], "lower --seqlen"),
        (["--device", "cuda:99"], "--device cuda:99: not available"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(command, flags, message, tmp_path, model, text):
    out = tmp_path / "out"
    result = command("calibrate", model, "-o", out, "--dataset", text, *FLAGS, *flags)
    assert result.returncode == 1, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_empty_calibration_file(command, suffix, tmp_path, model):
    file = tmp_path / f"empty.{suffix}"
    file.write_bytes(b"")
    result = command("calibrate", model, "-o", tmp_path / "out", "--dataset", file, *FLAGS)
    assert result.returncode == 1 and "empty" in result.stderr and file.name in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_architecture(command, tmp_path, model, text):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text()) | {"model_type": "gpt2"}
    (other / "config.json").write_text(json.dumps(config))
    result = command("calibrate", other, "-o", tmp_path / "out", "--dataset", text, *FLAGS)
    assert result.returncode == 1 and "architecture 'gpt2' is not supported; supported are llama" in result.stderr


def test_no_model_there(command, tmp_path, text):
    result = command("calibrate", tmp_path, "-o", tmp_path / "out", "--dataset", text, *FLAGS)
    assert result.returncode == 1 and "no config.json" in result.stderr


def test_model_that_the_hub_does_not_give(command, tmp_path, text, monkeypatch):
    """The library's own words have several lines; the error has one."""
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no connection\nPlease check it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    result = command("calibrate", "org/name", "-o", tmp_path / "out", "--dataset", text, *FLAGS)
    lines = result.stderr.splitlines()
    assert (
        result.returncode == 1 and lines[-1].startswith("error: org/name: no such folder") and "check it" in lines[-1]
    )


def test_model_already_quantized(command, tmp_path, checkpoint, text):
    result = command("calibrate", checkpoint, "-o", tmp_path / "out", "--dataset", text, *FLAGS)
    assert result.returncode == 1 and "already quantized (butterfly)" in result.stderr


def test_output_folder_not_empty(command, tmp_path, model, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    result = command("calibrate", model, "-o", tmp_path / "out", "--dataset", text, *FLAGS)
    assert result.returncode == 1 and "exists and is not empty" in result.stderr
    assert (tmp_path / "out" / "file").read_text() == "mine"


def test_output_folder_in_use_by_another_run(command, tmp_path, model, text):
    staging = tmp_path / "out.partial"
    staging.mkdir()
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = command("calibrate", model, "-o", tmp_path / "out", "--dataset", text, *FLAGS, "--resume")
    assert result.returncode == 1 and "in use by another running bq-calibrate" in result.stderr


def test_unfinished_run_needs_resume_and_the_same_settings(tmp_path, model, text, monkeypatch):
    from bq_calibration import pipeline

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_report", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text)
    with pytest.raises(UserError, match="continue it with --resume"):
        run(model, tmp_path / "out", text)
    with pytest.raises(UserError, match="--resume: bits was 2 in the unfinished run and is 3 now"):
        run(model, tmp_path / "out", text, bits=3, resume=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_no_space_left_on_disk(command, tmp_path, model, text):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 8}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        result = command("calibrate", model, "-o", disk / "out", "--dataset", text, *FLAGS)
        assert result.returncode == 1 and "no space left" in result.stderr and not (disk / "out").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_write_that_fails_midway_names_the_file_and_keeps_what_is_done(tmp_path, model, text):
    """A file-size limit makes the write of the checkpoint fail, as a disk that fills up does."""
    import resource

    limit = 60_000  # the blocks fit, the whole checkpoint does not

    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    call = [model, "-o", tmp_path / "out", "--dataset", text, *FLAGS]
    result = in_own_process("calibrate", *call, preexec_fn=set_limit)
    assert result.returncode == 1, result.stderr
    assert "could not be written" in result.stderr and "--resume" in result.stderr
    assert not (tmp_path / "out").exists()
    assert in_own_process("calibrate", *call, "--resume").returncode == 0
    verify(tmp_path / "out")


@pytest.mark.slow
def test_ctrl_c(tmp_path, model, text):
    """SIGINT once blocks are being calibrated: exit 130, a hint, no output folder."""
    import signal
    import time

    script = (
        # background jobs of a shell ignore it otherwise
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bq_calibration.cli import calibrate_main; calibrate_main()"
    )
    flags = [
        "--group-size",
        32,
        "--rotation-block",
        96,
        "--samples",
        4,
        "--seqlen",
        32,
        "--steps",
        5000,
        "--recipe",
        "paper",
    ]
    call = [sys.executable, "-c", script, model, "-o", tmp_path / "out", "--dataset", text, *flags]
    process = subprocess.Popen([str(part) for part in call], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "blocks").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "continue with --resume" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_evaluation_needs_something_to_do_and_enough_text(command, tmp_path, model):
    assert "give --perplexity and/or --tasks" in command("evaluate", model).stderr
    short = tmp_path / "short.txt"
    short.write_text(make_text(20))
    result = command("evaluate", model, "--perplexity", short)
    assert result.returncode == 1 and "lower --context" in result.stderr
