"""Folders, files and arguments as strangers bring them: each works, or ends in one error line before block 0."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import pytest
import torch
from bq_calibration import cli, evaluation
from bq_calibration.checkpoint import verify
from bq_calibration.data import calibration_tokens, cut_windows, prefix_of
from bq_calibration.errors import UserError
from bq_calibration.evaluation import _main_metric
from bq_calibration.model import SourceModel
from bq_calibration.preflight import plan
from bq_calibration.recipes import RECIPES, make_recipe
from bq_calibration.store import TensorStore
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import make_model, make_text
from .test_calibrate import run

FLAGS = ["--group-size", "32", "--rotation-block", "32", "--samples", "4", "--seqlen", "32", "--steps", "3"]
FLAGS += ["--no-plots", "--rotation", "butterfly"]
CPU = torch.device("cpu")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command here; returns its exit code, what it printed, and its error line."""

    def run_command(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"bq-{name}", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            getattr(cli, f"{name}_main")()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (exit_info.value.code == 1), captured.err
        return exit_info.value.code, captured.out, errors[0] if errors else ""

    return run_command


@pytest.fixture
def refused(command, tmp_path, text):
    """Calibrate and expect an error line that holds a text, before any block."""

    def check(model: Path, message: str, *flags: object, dataset: object = text) -> None:
        out = tmp_path / "refused"
        code, _, error = command("calibrate", model, "-o", out, "--dataset", dataset, *FLAGS, *flags)
        assert code == 1 and message in error, error
        assert not out.exists() and not list((tmp_path / "refused.partial").glob("blocks/*"))

    return check


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


# ---- the source


def stale(folder):
    write(folder, tensors_of(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})


def consolidated(folder):
    write(folder, {"tok_embeddings.weight": torch.ones(4, 4)}, "consolidated.safetensors")
    write(folder, {"base_model.q_proj.lora_A.weight": torch.ones(4, 4)}, "adapter_model.safetensors")


def sharded(folder):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        write(folder, {name: tensors[name] for name in part}, file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write(folder, {"other": torch.ones(2)}, "consolidated.00.safetensors")


def without_prefix(folder):
    write(folder, {name.removeprefix("model."): tensor for name, tensor in tensors_of(folder).items()})


def inside_a_wrapper(folder):
    write(folder, {"language_model." + name: tensor for name, tensor in tensors_of(folder).items()})


def float16(folder):
    write(folder, {name: tensor.half() for name, tensor in tensors_of(folder).items()})


def mixed(folder):
    wide = ("norm.weight", "embed_tokens.weight")
    tensors = tensors_of(folder)
    write(folder, {name: t if name.endswith(wide) else t.bfloat16() for name, t in tensors.items()})


def untouched(folder):
    pass


HUB_FOLDERS = (untouched, stale, consolidated, sharded, without_prefix, inside_a_wrapper, float16, mixed)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # a tied head, and one of its own with biases
@pytest.mark.parametrize("change", HUB_FOLDERS, ids=lambda change: change.__name__)
def test_folders_of_the_hub(architecture, change, tmp_path, text):
    source = make_model(tmp_path / "model", architecture)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    change(source)
    out = run(source, tmp_path / "out", text)
    verify(out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.isfinite(loaded(input_ids=torch.tensor([[3, 4, 5]])).logits).all()
    embedding = loaded.get_input_embeddings().weight
    torch.testing.assert_close(embedding, plain.get_input_embeddings().weight, rtol=2**-8, atol=0)
    stored = TensorStore(out)
    kept = {stored.dtype(name) for name in stored.names() if name.endswith(("norm.weight", "embed_tokens.weight"))}
    assert kept == {torch.float16 if change is float16 else torch.bfloat16}


def test_float32_is_kept_on_request(tmp_path, model, text):
    out = run(model, tmp_path / "out", text, unquantized_dtype="source")
    assert TensorStore(out).dtype("model.embed_tokens.weight") == torch.float32
    assert torch.equal(tensors_of(out)["model.norm.weight"], tensors_of(model)["model.norm.weight"])
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    report = json.loads((out / "bq_report.json").read_text())
    assert report["recipe"]["unquantized_dtype"] == "source"
    smaller = run(model, tmp_path / "smaller", text)
    assert json.loads((smaller / "config.json").read_text())["dtype"] == "bfloat16"


def change_tensors(change):
    def apply(folder):
        tensors = tensors_of(folder)
        change(tensors)
        write(folder, tensors)

    return apply


def change_config(**values):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return apply


def write_text(file, content):
    return lambda folder: (folder / file).write_text(content)


INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "index that is no JSON": (write_text(INDEX, "<html>"), f"{INDEX}: not a valid index"),
    "index without a map": (write_text(INDEX, '{"weight_map": ["a"]}'), f"{INDEX}: not a valid index"),
    "index of another folder": (write_text(INDEX, '{"weight_map": {"a": "../b.safetensors"}}'), "not a valid index"),
    "index with a missing file": (
        write_text(INDEX, '{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors: missing",
    ),
    "config that is no JSON": (write_text("config.json", "{"), "config.json: not valid JSON"),
    "config that is a list": (write_text("config.json", "[]"), "config.json: expected a JSON table, found list"),
    "config in another encoding": (
        lambda folder: (folder / "config.json").write_bytes('{"ä": 1}'.encode("latin-1")),
        "config.json: not valid JSON",
    ),
    "quantized, a name": (change_config(quantization_config="gptq"), "already quantized (gptq)"),
    "quantized, gpt-oss": (
        change_config(quantization_config={"quant_method": "mxfp4"}),
        "16-bit model: from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True)).save_pretrained",
    ),
    "quantized, a list": (change_config(quantization_config=["gptq"]), "already quantized (['gptq'])"),
    "config of another size": (
        change_config(intermediate_size=224),
        "expected [224, 96] by config.json, found",
    ),
    "config of another kind": (change_config(hidden_size="wide"), "config.json: transformers cannot read it"),
    "no head": (
        lambda folder: change_config(tie_word_embeddings=False)(folder),
        "lm_head.weight of a LlamaForCausalLM",
    ),
    "another head": (
        change_tensors(lambda t: t.update({"score.weight": torch.ones(1, 96)})),
        "tensor score.weight does not belong to a LlamaForCausalLM",
    ),
    "a missing tensor": (
        change_tensors(lambda t: t.pop(NAME)),
        f"tensor {NAME} of a LlamaForCausalLM is missing (1 in",
    ),
    "NaN in a weight": (
        change_tensors(lambda t: t[NAME].view(-1)[7].fill_(torch.nan)),
        f"tensor {NAME} holds NaN or inf",
    ),
    "infinity in a norm": (
        change_tensors(lambda t: t["model.norm.weight"][3].fill_(torch.inf)),
        "tensor model.norm.weight holds NaN or infinity",
    ),
    "integer weights": (
        change_tensors(lambda t: t.update({NAME: t[NAME].to(torch.int8)})),
        f"tensor {NAME} holds torch.int8",
    ),
    "a truncated file": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        "model.safetensors: cannot be read, truncated or damaged",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors file; convert the weights"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer cannot be loaded"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_sources(change, message, refused, tmp_path, model):
    folder = Path(shutil.copytree(model, tmp_path / "broken"))
    change(folder)
    refused(folder, message)


def test_activations_that_overflow(refused, tmp_path, model, text):
    folder = Path(shutil.copytree(model, tmp_path / "loud"))
    tensors = {name: tensor.half() for name, tensor in tensors_of(folder).items()}
    tensors["model.layers.0.mlp.down_proj.weight"] *= 2e4
    tensors["model.layers.0.post_attention_layernorm.weight"] *= 50
    write(folder, tensors)
    refused(
        folder, "the activations behind block 0 overflow float16; use --compute-dtype", "--compute-dtype", "float16"
    )
    assert verify(run(folder, tmp_path / "out", text))  # float32 holds them


def test_evaluation_of_what_overflows(tmp_path, model, text, command):
    folder = Path(shutil.copytree(model, tmp_path / "loud"))
    tensors = {name: tensor.half() for name, tensor in tensors_of(folder).items()}
    tensors["model.layers.0.mlp.down_proj.weight"] *= 2e4
    tensors["model.layers.0.post_attention_layernorm.weight"] *= 50
    write(folder, tensors)
    flags = ("--perplexity", text, "--context", 64, "--windows", 2)
    code, _, error = command("evaluate", folder, *flags, "--compute-dtype", "float16")
    assert code == 1 and "window 1: the loss is nan; activations may overflow float16: try --compute-dtype" in error
    assert command("evaluate", folder, *flags, "--compute-dtype", "float32")[0] == 0


# ---- the data


def test_best_with_few_windows(tmp_path, model):
    short = tmp_path / "short.txt"
    short.write_text(make_text(100))
    recipe = {"block_tokens": 1024, "train_tokens": 4096, "train_samples": 64, "held_out": 8}
    out = run(model, tmp_path / "out", short, recipe="best", **recipe)
    report = json.loads((out / "bq_report.json").read_text())
    windows = len(cut_windows(AutoTokenizer.from_pretrained(model), short.read_text(), 32))
    assert 4 < windows < 20
    assert report["recipe"]["held_out"] == windows // 4
    assert report["recipe"]["train_samples"] == windows - windows // 4 >= report["recipe"]["samples"]
    assert f"the data fills {windows} windows of 32 tokens, 72 were asked for" in (tmp_path / "out.log").read_text()


@pytest.mark.parametrize("windows", range(1, 12))
def test_rounding_and_training_never_see_held_out_windows(windows):
    recipe = make_recipe("best", {"samples": 8, "train_samples": 8, "held_out": 3}).fitted(windows)
    assert recipe.samples <= recipe.train_samples == min(8, windows - recipe.held_out)
    assert recipe.held_out == (3 if windows == 11 else windows // 4)
    assert RECIPES["fast"].fitted(windows).samples == windows


def test_text_that_is_no_string(refused, tmp_path, model):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": 17}\n{"text": 18}\n')
    refused(model, "rows.jsonl: row 1: text is a int, no string", dataset=rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "größer".encode("latin-1"), "cannot be read"),
        ("broken.jsonl", b'{"text": "a"\n', "cannot be read"),
        ("other.jsonl", b'{"page": "a"}\n', "no column 'text'"),
        ("blank.txt", b" \n \n", "the file is empty"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("short.txt", b"w1", "does not fill one window of 32 tokens; lower --seqlen"),
    ],
)
def test_bad_data_files(name, content, message, refused, tmp_path, model):
    file = tmp_path / name
    file.write_bytes(content)
    refused(model, message, dataset=file)


def test_a_missing_package_is_named(refused, tmp_path, model, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(model, "rows.jsonl: cannot be read without the package datasets: pip install datasets", dataset=file)


def bos_tokenizer(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_every_window_begins_with_bos_where_the_tokenizer_adds_one(tmp_path, model, text):
    folder = Path(shutil.copytree(model, tmp_path / "bos"))
    plain, tokenizer = AutoTokenizer.from_pretrained(model), bos_tokenizer(folder)
    assert prefix_of(plain) == [] and prefix_of(tokenizer) == [1]
    bare = plain(text.read_text())["input_ids"]
    rows = cut_windows(tokenizer, text.read_text(), 33)
    assert all(len(row) == 33 and row[0] == 1 and 1 not in row[1:] and 2 not in row for row in rows)
    assert [token for row in rows for token in row[1:]] == bare[: 32 * len(rows)]
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": make_text(30, seed)}) + "\n" for seed in range(20)))
    for dataset in (text, documents):
        tokens = calibration_tokens(tokenizer, str(dataset), 8, 32, 0)
        assert tokens.shape == (8, 32) and (tokens[:, 0] == 1).all() and (tokens[:, 1:] != 1).all()
    found = evaluation.Evaluator(str(folder), "float32", "cpu")
    seen = []
    found.model.register_forward_pre_hook(lambda _, a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    from rich.progress import Progress

    found.perplexity(str(text), 64, 3, Progress(disable=True))
    assert len(seen) == 3 and all(ids.shape == (1, 64) and ids[0, 0] == 1 for ids in seen)


def test_sequences_beyond_the_positions(refused, command, model, text):
    refused(model, "--seqlen 129: the model has 128 positions; lower --seqlen", "--seqlen", 129)
    code, _, error = command("evaluate", model, "--perplexity", text, "--context", 129)
    assert code == 1 and "--context 129: the model has 128 positions; lower --context" in error


# ---- evaluation


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--windows", "-1"], "--windows -1: expected at least 1"),
        (["--windows", "0"], "--windows 0: expected at least 1"),
        (["--context", "0"], "--context 0: expected at least 2"),
        (["--context", "1"], "--context 1: expected at least 2"),
        (["--context", "-5"], "--context -5: expected at least 2"),
        (["--limit", "-1"], "--limit -1: expected at least 1"),
        (["--json", "/proc/scores.json"], "/proc/scores.json: could not be written"),
        (["--json", "nowhere/scores.json"], "nowhere/scores.json: could not be written"),
        (["--compute-dtype", "int8"], "--compute-dtype int8: expected one of auto"),
        (["--device", "meta"], "--device meta: not available here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_of_evaluation(flags, message, command, model, text):
    code, out, error = command("evaluate", model, "--perplexity", text, *flags)
    assert code == 1 and message in error and not out


def test_every_metric_is_shown():
    assert _main_metric({"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6}) == {
        "metric": "acc_norm",
        "value": 0.6,
        "stderr": pytest.approx(float("nan"), nan_ok=True),
        "all": {"acc,none": 0.5, "acc_norm,none": 0.6},
    }
    gsm8k = {
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.02,
        "exact_match,flexible-extract": 0.3,
    }
    found = _main_metric(gsm8k | {"alias": "gsm8k", "sample_len": 10})
    assert (found["metric"], found["value"]) == ("exact_match (flexible-extract)", 0.3) and len(found["all"]) == 2
    ifeval = _main_metric({"prompt_level_strict_acc,none": 0.1, "prompt_level_strict_acc_stderr,none": 0.05})
    assert (ifeval["metric"], ifeval["value"], ifeval["stderr"]) == ("prompt_level_strict_acc", 0.1, 0.05)
    assert _main_metric({"alias": "group", " ": ""}) is None


# ---- arguments


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rotation-block", "1"], "--rotation-block 1: expected at least 2"),
        (["--rotation-block", "0"], "--rotation-block 0: expected at least 2"),
        (["--rotation-block", "-64"], "--rotation-block -64: expected at least 2"),
        (["--rotation-block", "99999999999"], "does not divide the 96 inputs"),
        (["--lr", "1e30"], "--lr 1e+30: expected at most 1000.0"),
        (["--lr", "inf"], "--lr inf: expected at most"),
        (["--lr", "nan"], "--lr nan: expected at least"),
        (["--lr", "0"], "--lr 0.0: expected at least"),
        (["--lr", "-1"], "--lr -1.0: expected at least"),
        (["--uniformity", "nan"], "--uniformity nan: expected at least 0"),
        (["--uniformity", "-1"], "--uniformity -1.0: expected at least 0"),
        (["--target-bpw", "nan"], "--target-bpw nan: expected at least 2"),
        (["--target-bpw", "99"], "--target-bpw 99.0: expected at most 8"),
        (["--seed", "100000000000000000000"], "--seed 100000000000000000000: expected at most"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--device", "meta"], "--device meta: not available here"),
        (["--device", "toaster"], "--device toaster: not available here"),
        (["--group-size", "0"], "group_size: expected a multiple of 32"),
        (["--group-size", "-2"], "group_size: expected a multiple of 32"),
        (["--group-size", "many"], "--group-size many: expected a number or auto"),
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--seqlen", "1"], "--seqlen 1: expected at least 2"),
        (["--steps", "-1"], "--steps -1: expected at least 0"),
        (["--held-out", "-1"], "--held-out -1: expected at least 0"),
        (["--tensor-parallel", "0"], "--tensor-parallel 0: expected at least 1"),
        (["--tensor-parallel", "7"], "--tensor-parallel 7 does not divide 96 inputs of o_proj"),
        (["--compute-dtype", "float8"], "--compute-dtype float8: expected one of"),
        (["--unquantized-dtype", "int8"], "--unquantized-dtype int8: expected one of auto, source"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(flags, message, refused, model):
    refused(model, message, *flags)


@pytest.mark.parametrize("flags", [["--seed", "1e20"], ["--samples", "many"], ["--lr", ""], ["--no-such-flag"]])
def test_arguments_of_another_type(flags, tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bq-calibrate", str(model), "-o", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as exit_info:
        cli.calibrate_main()
    assert exit_info.value.code == 2 and "Traceback" not in capsys.readouterr().err


# ---- the output


def test_output_behind_a_symbolic_link(tmp_path, model, text):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for link, target in (("link", "target"), ("dangling", "new")):
        run(model, tmp_path / link, text)
        assert (tmp_path / link).is_symlink() and verify(tmp_path / target)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dangling", "link", "new", "new.log", "target", "target.log"]


@pytest.fixture
def mounted(tmp_path):
    """Mounts a file system of a size in bytes, perhaps read-only."""
    places = []

    def mount(place: Path, *options: str) -> Path:
        place.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(call, capture_output=True, check=False).returncode:
            pytest.skip("file systems cannot be mounted here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_output_on_a_mount_point(mounted, tmp_path, model, text, monkeypatch):
    from bq_calibration import pipeline

    out = mounted(tmp_path / "disk", "size=50m")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, out, text)
    run(model, out, text, resume=True)
    verify(out)
    assert not (out / ".partial").exists() and (out / "calibrate.log").exists() and out.is_mount()


def test_output_below_a_read_only_folder(mounted, tmp_path, refused, command, model, text):
    disk = mounted(tmp_path / "disk", "size=1m", "ro")
    code, _, error = command("calibrate", model, "-o", disk / "out", "--dataset", text, *FLAGS)
    assert code == 1 and "disk/out: cannot be written" in error and "choose another output folder" in error


def test_disk_that_fills_up_while_pictures_are_drawn(tmp_path, model, text, monkeypatch, command):
    from bq_calibration import plots

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", full)
    flags = [flag for flag in FLAGS if flag != "--no-plots"]
    code, _, error = command("calibrate", model, "-o", tmp_path / "out", "--dataset", text, *flags)
    assert code == 1 and "no space left on the device" in error and "--resume" in error
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


def test_space_for_all_that_will_be_written(model, text):
    small = make_recipe("fast", {"group_size": 32, "rotation_block": 32, "samples": 4, "seqlen": 32})
    source = SourceModel(str(model), CPU)
    from bq_calibration.pipeline import Calibration

    def disk(**settings) -> int:
        import dataclasses

        recipe = dataclasses.replace(small, **settings)
        config = Calibration(str(model), "unused", recipe, "cpu").config
        return plan(source, config, recipe, 10**10).disk_bytes

    rounded, trained = disk(), disk(train_tokens=6144, train_samples=64)
    states = (64 + 8) * 32 * 96 * 4
    assert rounded < trained - states, "the teacher's states are counted"


def test_checkpoint_size_is_known_beforehand(tmp_path, model, text, command):
    code, printed, _ = command("calibrate", model, "-o", tmp_path / "out", "--dataset", text, *FLAGS, "--dry-run")
    assert code == 0 and sorted(f.name for f in tmp_path.iterdir()) == [], "a dry run leaves nothing behind"
    out = run(model, tmp_path / "out", text)
    verified = verify(out)
    assert f"{verified.total_bytes / 1e6:.1f} MB, {verified.bits_per_weight():.3f} bits per weight" in printed
    assert "4 of 32 tokens" in printed


def test_second_run_is_told_that_the_first_one_works(tmp_path, model, text, command):
    import fcntl

    staging = tmp_path / "out.partial"
    staging.mkdir()
    (staging / "settings.json").write_text("{}")
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, error = command("calibrate", model, "-o", tmp_path / "out", "--dataset", text, *FLAGS)
    assert code == 1 and "in use by another running bq-calibrate" in error and "remove" not in error


# ---- resuming


@pytest.mark.parametrize("changed", ["weights", "tokenizer", "data"])
def test_resume_refuses_changed_inputs(changed, tmp_path, model, text, monkeypatch):
    from bq_calibration import pipeline

    source, data = Path(shutil.copytree(model, tmp_path / "model")), tmp_path / "text.txt"
    data.write_text(text.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", data)
    if changed == "data":
        data.write_text(text.read_text().replace("w1", "w2", 1))
    elif changed == "tokenizer":
        file = source / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"added": 1}))
    else:
        tensors = tensors_of(source)
        tensors["model.embed_tokens.weight"][5, 5] += 1
        write(source, tensors)
    which = "data_sha256" if changed == "data" else "source_sha256"
    with pytest.raises(UserError, match=f"--resume: {which} was"):
        run(source, tmp_path / "out", data, resume=True)


def test_a_model_of_the_hub_brings_all_but_other_weights(monkeypatch, model):
    from fnmatch import fnmatch

    import huggingface_hub
    from bq_calibration.model import resolve_model

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(model))
    assert resolve_model("org/name") == model
    [(_, options)] = asked
    ignored = options["ignore_patterns"]
    kept = ("model-00001-of-00002.safetensors", "modeling_x.py", "tekken.json", "LICENSE", "preprocessor_config.json")
    others = ("pytorch_model.bin", "original/a.safetensors", "consolidated.safetensors", "x.gguf", "adapter_model.bin")
    assert not [file for file in kept if any(fnmatch(file, pattern) for pattern in ignored)]
    assert all(any(fnmatch(file, pattern) for pattern in ignored) for file in others)
