"""A checkpoint that was changed since its export: found by `bq-inspect`, and by loading where loading reads it."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import bq_calibration.hf  # noqa: F401
import pytest
import torch
from bq_calibration import export, inspect
from bq_calibration.checkpoint import verify
from bq_calibration.console import stdout
from bq_calibration.errors import UserError
from bq_calibration.files import carried_files, warn_of_large_files, write_tensors
from bq_calibration.inspection import print_description
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3ForCausalLM

from .conftest import make_model
from .test_calibrate import run

CARRIED = {
    "LICENSE": "free",
    "NOTICE.txt": "a notice",
    "added_tokens.json": '{"<|extra|>": 259}',
    "tekken.json": "{}",
    "qwen.tiktoken": "IQ== 0\n",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "modeling_tiny.py": "# named by auto_map\n",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
LEFT = {
    "README.md": "the original's card",
    "pytorch_model.bin": "pickled",
    "model.safetensors.index.json.bak.gz": "x",
    "consolidated.00.pth": "pickled",
    "model-q4.GGUF": "other weights",
    "adapter_config.json": "{}",
    "params.json": "{}",
    "SHA256SUMS": "of the original",
    "bq_report.json": "{}",
    ".gitattributes": "x",
    "onnx/model.onnx": "x",
    "original/params.json": "{}",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory, model) -> Path:
    """A folder as the Hub has them: more than weights and a tokenizer."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("hub") / "source"))
    for name, text in (CARRIED | LEFT).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, source, text) -> Path:
    """In two shards, so that there is an index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 80_000)
        return run(source, tmp_path_factory.mktemp("good") / "checkpoint", text)


@pytest.fixture
def broken(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def without_sums(folder: Path) -> Path:
    (folder / "SHA256SUMS").unlink()
    return folder


def change_tensors(folder: Path, change) -> None:
    without_sums(folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})


# ---- what a checkpoint carries over


def test_files_beside_the_weights_come_along(source, checkpoint):
    for name, text in CARRIED.items():
        assert (checkpoint / name).read_text() == text
    written = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert written & set(LEFT) == {"README.md", "SHA256SUMS", "bq_report.json"}  # the checkpoint's own
    assert "of the original" not in (checkpoint / "SHA256SUMS").read_text()
    tokenizer = {path.name for path in source.iterdir() if path.name.startswith("tokenizer")}
    assert tokenizer and tokenizer <= written
    listed = {line[66:] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()}
    assert listed == written - {"README.md", "SHA256SUMS"}


def test_a_huge_file_is_left_with_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "small.txt").write_text("x")
    with open(tmp_path / "video.mp4", "wb") as file:
        file.truncate(300 * 2**20)
    assert list(carried_files(tmp_path)) == [Path("small.txt")] and not caplog.text
    warn_of_large_files(tmp_path)
    assert "video.mp4 is not carried over" in caplog.text


def test_shards_are_the_same_in_every_process(tmp_path):
    """safetensors writes the entries of a header's metadata in an order that differs from process to process."""
    tensors = {"b": torch.arange(7, dtype=torch.bfloat16), "a": torch.ones(2, 3), "ä\n": torch.tensor(5)}
    write_tensors(tmp_path / "x.safetensors", tensors, record_sums=True)
    data = (tmp_path / "x.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    assert header.startswith('{"__metadata__":{"bq_sha256":') and '"format":"pt"}' in header
    assert {name: value.tolist() for name, value in load_file(tmp_path / "x.safetensors").items()} == {
        name: value.tolist() for name, value in tensors.items()
    }
    with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
        assert set(json.loads(handle.metadata()["bq_sha256"])) == set(tensors)


# ---- every changed bit


def files_of(checkpoint: Path) -> list[str]:
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    return sorted(names - {"README.md"})


def test_a_flipped_bit_in_any_file_is_found(broken):
    assert sum(name.endswith(".safetensors") for name in files_of(broken)) > 1
    for name in files_of(broken):
        path, chooser = broken / name, random.Random(name)
        for place in (chooser.randrange(path.stat().st_size - 1) for _ in range(3)):
            bit = chooser.randrange(8)
            flip(path, place, bit)
            with pytest.raises(UserError, match=r"SHA256SUMS|safetensors") as error:
                inspect(str(broken))
            assert name == "SHA256SUMS" or name in str(error.value)
            flip(path, place, bit)
    inspect(str(broken))


def test_a_flipped_bit_in_what_loading_reads_is_found_by_transformers(broken):
    chooser = random.Random(0)
    for name in files_of(broken):
        if name.startswith(("report", "bq_report", "SHA256SUMS")):
            continue
        path = broken / name
        place, bit = chooser.randrange(path.stat().st_size), chooser.randrange(8)
        flip(path, place, bit)
        with pytest.raises(Exception) as error:  # of a header or a config, transformers itself may complain before
            AutoModelForCausalLM.from_pretrained(broken)
        if name not in ("config.json", "model.safetensors.index.json"):
            assert isinstance(error.value, UserError) and name in str(error.value)
        flip(path, place, bit)
    AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize("part", ["header", "data"])
def test_shards_alone_are_compared_too(broken, part):
    """As a cache of the Hub holds them, where transformers has fetched only config and weights."""
    shard = sorted(without_sums(broken).glob("*.safetensors"))[0]
    begin = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    flip(shard, begin + 4 if part == "data" else 40, 2)
    with pytest.raises(UserError, match=rf"{shard.name}: (tensor \S+ differs|not a whole|its header)"):
        AutoModelForCausalLM.from_pretrained(broken)


def test_comparison_is_switched_off(broken, monkeypatch):
    config = json.loads((broken / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: differs from its SHA-256 .*BQ_VERIFY=0 loads without"):
        AutoModelForCausalLM.from_pretrained(broken)
    monkeypatch.setenv("BQ_VERIFY", "0")
    assert AutoModelForCausalLM.from_pretrained(broken).config.rms_norm_eps == 1e-5
    with pytest.raises(UserError, match=r"config\.json: differs"):
        inspect(str(broken))


def printed(description) -> str:
    with stdout.capture() as capture:
        print_description(description, stdout)
    return " ".join(capture.get().split())


def test_inspect_says_what_was_compared(broken):
    description = inspect(str(broken))
    tensors = sum(len(load_file(path)) for path in broken.glob("*.safetensors"))
    files = len((broken / "SHA256SUMS").read_text().splitlines())
    assert description["checksums"] == {"listed": True, "files": files, "tensors": tensors, "not_covered": []}
    assert f"{files} files and {tensors} tensors as written" in printed(description)
    description = inspect(str(without_sums(broken)))
    assert "none, SHA256SUMS is missing: damage may go unnoticed" in printed(description)
    change_tensors_of = broken / "SHA256SUMS"
    change_tensors_of.write_text("")
    change_tensors(broken, lambda tensors: None)
    description = inspect(str(broken))  # as an older version wrote it
    assert description["checksums"]["tensors"] == 0 and not description["checksums"]["listed"]


# ---- what breaks the format without any checksum


NAME = "model.layers.1.self_attn.q_proj"


def replace(name, value):
    def change(tensors):
        if name in tensors:
            tensors[name] = value(tensors[name])

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", lambda t: t.to(torch.int32), r"model\.norm\.weight: expected bfloat16, found int32"),
        ("model.norm.weight", lambda t: t.half(), r"model\.norm\.weight: expected bfloat16, found float16"),
        ("model.norm.weight", lambda t: t.double(), r"model\.norm\.weight: expected bfloat16, found float64"),
        ("model.embed_tokens.weight", lambda t: t.to(torch.float8_e4m3fn), r"embed_tokens\.weight: expected bfloat16"),
        (f"{NAME}.scales", lambda t: -t, rf"{NAME}\.scales: holds zero or a negative number"),
        (f"{NAME}.scales", torch.zeros_like, rf"{NAME}\.scales: holds zero or a negative number"),
    ],
    ids=["integers", "another float", "wider", "narrower", "negative scales", "zero scales"],
)
@pytest.mark.parametrize("report", ["with", "without"])
def test_wrong_tensors(broken, name, value, message, report):
    change_tensors(broken, replace(name, value))
    if report == "without":
        (broken / "bq_report.json").unlink()
    with pytest.raises(UserError, match=message):
        verify(broken)


def test_dtypes_that_the_exporter_kept(tmp_path, model, text):
    """Norms in float32 beside a bfloat16 embedding: kept where a recipe keeps the source's dtypes."""
    mixed = Path(shutil.copytree(model, tmp_path / "mixed"))
    tensors = load_file(mixed / "model.safetensors")
    tensors = {name: value if "norm" in name else value.bfloat16() for name, value in tensors.items()}
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((mixed / "config.json").read_text()) | {"dtype": "bfloat16"}
    (mixed / "config.json").write_text(json.dumps(config))
    kept = run(mixed, tmp_path / "kept", text, unquantized_dtype="source")
    norms = sum("norm" in name for name in tensors)
    description = inspect(str(kept))
    assert description["unquantized_dtypes"]["float32"] == norms
    assert f"{norms} tensors in float32" in printed(description)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module_bits": {f"{NAME}x": 2}}, f"module_bits: the model has no packed layer {NAME}x"),
        ({"module_bits": {"lm_head": 2}}, "module_bits: the model has no packed layer lm_head"),
        ({"modules_to_not_convert": ["lm_head", "visual"]}, "modules_to_not_convert: the model has no module visual"),
        (
            {"rotation": {"kind": "butterfly", "block_size": {"default": 32, "dwon_proj": 32}}},
            "block_size: no packed layer is called dwon_proj",
        ),
        (
            {"rotation": {"kind": "hadamard", "block_size": {"default": 32, "k_proj": 96}}},
            r"block_size: 96 for \S+k_proj, 32 for \S+q_proj; layers that share an input",
        ),
    ],
)
def test_settings_of_modules_that_do_not_exist(broken, settings, message):
    without_sums(broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] |= settings
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        verify(broken)


def remove_tokenizer(folder: Path) -> None:
    for path in [*folder.glob("token*"), *folder.glob("*.tiktoken"), folder / "tekken.json"]:
        path.unlink()


def truncate(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tokenizer, r"no tokenizer \(tokenizer\.json, tokenizer\.model, …\)"),
        (truncate, "the tokenizer cannot be loaded .*copy that of the 16-bit model"),
        (empty, "the tokenizer cannot be loaded .*copy that of the 16-bit model"),
    ],
)
def test_broken_tokenizer(broken, damage, message):
    damage(without_sums(broken))
    with pytest.raises(UserError, match=message):
        inspect(str(broken))


@pytest.mark.parametrize("report", ["{", "[]", "{}", '{"totals": 1}', "\xff"])
def test_broken_report(broken, report):
    (without_sums(broken) / "bq_report.json").write_bytes(report.encode("latin1"))
    with pytest.raises(UserError, match=r"bq_report\.json: not .*download it again, or delete it"):
        print_description(inspect(str(broken)), stdout)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        inspect(str(tmp_path / "nowhere"))


# ---- a process that has not imported bq_calibration.hf


def in_a_fresh_process(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", code]
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory, text) -> Path:
    folder = tmp_path_factory.mktemp("multimodal")
    return run(make_model(folder / "gemma3", "gemma3"), folder / "checkpoint", text)


LOAD = "from transformers import AutoModelForCausalLM as A; A.from_pretrained({!r}{})"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        pytest.param(", dtype='auto'", marks=pytest.mark.slow),  # each is a process that imports transformers
        pytest.param(", trust_remote_code=True, use_safetensors=True", marks=pytest.mark.slow),
    ],
)
def test_transformers_without_the_import_refuses(checkpoint, arguments):
    """Rather than random weights; the error names the remedy."""
    result = in_a_fresh_process(LOAD.format(str(checkpoint), arguments))
    assert result.returncode == 1
    assert "need `import bq_calibration.hf` (of bq-vllm) before from_pretrained" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "loader",
    [
        "AutoModelForImageTextToText",
        pytest.param("AutoModelForCausalLM", marks=pytest.mark.slow),
        pytest.param("Gemma3ForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_a_multimodal_model_without_the_import_is_refused(multimodal, loader):
    result = in_a_fresh_process(f"from transformers import {loader} as A; A.from_pretrained({str(multimodal)!r})")
    assert result.returncode == 1
    assert "need `import bq_calibration.hf` (of bq-vllm) before from_pretrained" in result.stderr.splitlines()[-1]


def test_a_multimodal_model_with_the_import(multimodal, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(multimodal)
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert "transformers_weights" not in (tmp_path / "dense" / "config.json").read_text()
    # the text part alone knows nothing of the quantization: an error, not random weights
    with pytest.raises(ValueError, match="packed weights need"):
        Gemma3ForCausalLM.from_pretrained(multimodal)


def test_a_pipeline_with_the_import(checkpoint):
    code = (
        "import bq_calibration.hf, transformers\n"
        f"pipe = transformers.pipeline('text-generation', {str(checkpoint)!r})\n"
        "assert not hasattr(pipe.model.config, 'transformers_weights')\n"
        "print(pipe('w1 w2', max_new_tokens=3)[0]['generated_text'])"
    )
    result = in_a_fresh_process(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("w1 w2")


def test_resume_notices_a_changed_file_that_comes_along(source, tmp_path):
    """Tokenizer and templates of other endings than .json too: all that is copied is part of the fingerprint."""
    from bq_calibration.model import SourceModel
    from bq_calibration.preflight import source_fingerprint
    from rich.progress import Progress

    folder = Path(shutil.copytree(source, tmp_path / "changed"))
    quiet, before = Progress(disable=True), None
    for name in (None, "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE", "config.json"):
        if name:
            (folder / name).write_text((folder / name).read_text() + "\n")
        after = source_fingerprint(SourceModel(str(folder), torch.device("cpu")), quiet)
        assert after != before
        before = after
    (folder / "README.md").write_text("another card")
    assert source_fingerprint(SourceModel(str(folder), torch.device("cpu")), quiet) == before
