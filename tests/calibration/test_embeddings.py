"""An embedding and an LM head in few bits: rounding, the checkpoint, loading in transformers."""

import json
import random
import shutil
import string
from pathlib import Path

import bq_calibration.hf  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from bq_calibration import inspect, next_token_loss, packed_modules
from bq_calibration.checkpoint import read_config, verify
from bq_calibration.console import stdout
from bq_calibration.data import calibration_tokens
from bq_calibration.end_to_end import TrainingText, held_out
from bq_calibration.errors import UserError
from bq_calibration.inspection import print_description
from bq_calibration.model import SourceModel
from bq_calibration.packed_modules import ButterflyEmbedding, TiedHead
from bq_calibration.pipeline import Calibration
from bq_calibration.quantize import output_error
from bq_calibration.recipes import make_recipe
from bq_calibration.store import TensorStore
from bq_calibration.student import Student
from bq_calibration.teacher import ResidentTeacher
from bq_calibration.training_plan import training_plan
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import make_model
from .test_calibrate import SMALL, dense_logits, run, same_checkpoint
from .test_training import HEAD, with_scaled_head

IDS = torch.tensor([[3, 4, 5, 200, 9, 17], [30, 319, 0, 1, 2, 64]])
TIED = dict(embedding_bits=4, head_bits=4)


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied") / "model", "qwen2")


@pytest.fixture(scope="module")
def tied(tmp_path_factory, model, text) -> Path:
    return run(model, tmp_path_factory.mktemp("tied") / "checkpoint", text, **TIED)


@pytest.fixture(scope="module")
def untied(tmp_path_factory, untied_model, text) -> Path:
    settings = dict(embedding_bits=3, head_bits=4, rotation="hadamard", correction=0.5)
    return run(untied_model, tmp_path_factory.mktemp("untied") / "checkpoint", text, **settings)


def load(folder: Path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def assert_same_logits(folder: Path) -> None:
    """Independent decoding, packed modules and dequantized ones agree."""
    expected, loaded = dense_logits(folder, IDS), load(folder)
    with torch.no_grad():
        packed = loaded(input_ids=IDS).logits
        dense = loaded.dequantize()(input_ids=IDS).logits
    bound = 1e-4 * expected.abs().max()  # float32 sums of a few hundred terms in another order
    assert (packed - expected).abs().max() < bound
    assert (dense - expected).abs().max() < bound


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gemma3_text", dict(embedding_bits=3, head_bits=3, zero_point="float")),  # tied, with a factor on its output
        ("mistral", dict(head_bits=2, rotation="none", group_size=-1)),
        ("phi3", dict(embedding_bits=4, rotation_block=None, bits=3, rounding="rtn")),
    ],
)
def test_architectures(architecture, settings, tmp_path, text):
    out = run(make_model(tmp_path / "model", architecture), tmp_path / "out", text, **settings)
    packed = {name: verify(out).config.bits_of(name) for name in verify(out).embeddings}
    flags = {"model.embed_tokens": "embedding_bits", "lm_head": "head_bits"}
    tied = architecture == "gemma3_text"
    expected = {name: settings[flag] for name, flag in flags.items() if flag in settings}
    assert packed == ({"model.embed_tokens": 3} if tied else expected)
    assert_same_logits(out)


def test_tied(tied):
    stored, config = load_file(tied / "model.safetensors"), json.loads((tied / "config.json").read_text())
    assert {name for name in stored if "embed" in name or "head" in name} == {
        f"model.embed_tokens.{suffix}" for suffix in ("qweight", "scales", "angles", "kept_tokens", "kept_rows")
    }
    assert config["quantization_config"]["module_bits"] == {"model.embed_tokens": 4}
    assert config["quantization_config"]["kept_tokens"] == {"model.embed_tokens": 20}  # a sixteenth
    assert config["quantization_config"]["modules_to_not_convert"] == []
    assert_same_logits(tied)
    loaded = load(tied)
    assert isinstance(loaded.model.embed_tokens, ButterflyEmbedding) and isinstance(loaded.lm_head, TiedHead)
    loaded(input_ids=IDS)
    assert not list(loaded.lm_head.parameters())  # one copy, of what is prepared as well


def test_untied(untied):
    stored = load_file(untied / "model.safetensors")
    suffixes = ("qweight", "scales", "kept_tokens", "kept_rows")
    expected = {f"{name}.{suffix}" for name in ("model.embed_tokens", "lm_head") for suffix in suffixes}
    assert {name for name in stored if "embed" in name or "head" in name} == expected
    assert_same_logits(untied)


def test_rows_of_frequent_tokens_are_kept(untied, untied_model, text, tmp_path):
    """Exactly, in all that reads them."""
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(untied_model), str(text), 4, 32, 0)
    often = torch.bincount(tokens.flatten(), minlength=320)
    stored, source = (load_file(folder / "model.safetensors") for folder in (untied, untied_model))
    packed = load(untied)
    dense = load(untied).dequantize()
    for name in ("model.embed_tokens", "lm_head"):
        kept = stored[f"{name}.kept_tokens"].long()
        rest = torch.ones(320, dtype=torch.bool).index_fill_(0, kept, False)
        assert len(kept) == 20 and often[kept].min() >= often[rest].max()
        rows = source[f"{name}.weight"].half().float()
        assert torch.equal(stored[f"{name}.kept_rows"].float(), rows[kept])
        assert torch.equal(dense.get_submodule(name).weight[kept], rows[kept])
        assert not torch.equal(dense.get_submodule(name).weight[rest], rows[rest])
    table = source["model.embed_tokens.weight"].half().float()
    assert torch.equal(packed.model.embed_tokens(kept), table[kept])
    settings = dict(embedding_bits=3, head_bits=4, rotation="hadamard", rounding="rtn")
    none = run(untied_model, tmp_path / "none", text, kept_tokens=0, **settings)
    assert not any("kept" in name for name in load_file(none / "model.safetensors"))
    assert "kept_tokens" not in json.loads((none / "config.json").read_text())["quantization_config"]
    assert_same_logits(none)


def test_held_out_text_chooses_no_rows(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(random.choices(string.ascii_letters, k=2000)))
    settings = dict(rotation="hadamard", rounding="rtn", samples=4, train_samples=4, held_out=4, seqlen=32)
    out = run(model, tmp_path / "out", text, **TIED, train_tokens=32, tokens_per_step=32, **settings)
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(model), str(text), 8, 32, 0)
    read, all_of_it = (
        torch.bincount(part.flatten(), minlength=320).argsort(descending=True, stable=True)[:20].sort().values
        for part in (tokens[:4], tokens)
    )
    assert not torch.equal(read, all_of_it)
    assert torch.equal(load_file(out / "model.safetensors")["model.embed_tokens.kept_tokens"].long(), read)


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
def test_kernels_layout(checkpoint, request, monkeypatch):
    """As on a GPU: tiles, and the operators on them."""
    folder = request.getfixturevalue(checkpoint)
    monkeypatch.setattr(packed_modules, "runs_kernels", lambda device: True)
    expected = dense_logits(folder, IDS)
    with torch.no_grad():
        found = load(folder)(input_ids=IDS).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_dtype_of_the_rows(tied):
    loaded, expected = load(tied, torch.bfloat16), dense_logits(tied, IDS)
    assert loaded.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert loaded.model.embed_tokens.scales.dtype == torch.float32  # float16 values, kept exactly
    with torch.no_grad():
        logits = loaded(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert loaded.to(torch.float32).model.embed_tokens(IDS).dtype == torch.float32


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
def test_dequantized_model_is_an_ordinary_one(checkpoint, request, tmp_path):
    folder = request.getfixturevalue(checkpoint)
    loaded = load(folder)
    with pytest.raises(UserError, match=r"a packed embedding cannot be resized: dequantize\(\)"):
        loaded.resize_token_embeddings(400)
    dense = loaded.dequantize()
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == (checkpoint == "tied")
    dense.save_pretrained(tmp_path / "dense")
    assert ("lm_head.weight" in load_file(tmp_path / "dense" / "model.safetensors")) == (checkpoint == "untied")
    with torch.no_grad():
        again = load(tmp_path / "dense")(input_ids=IDS).logits
        torch.testing.assert_close(again, dense(input_ids=IDS).logits)
    dense.resize_token_embeddings(400)
    assert dense.lm_head.weight.shape[0] == 400


def test_generation(tied):
    loaded = load(tied)
    out = loaded.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 10)


# ---- rounding


def head_states(folder: Path, model: Path, text: Path) -> torch.Tensor:
    """What the finished model gives its LM head on the calibration text."""
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(model), str(text), 4, 32, 0)
    served, seen = load(folder), []
    served.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        served(input_ids=tokens)
    return seen[0].flatten(0, -2)


def test_head_is_rounded_for_the_states_of_the_finished_model(untied, untied_model, text, tmp_path):
    states = head_states(untied, untied_model, text)
    hessian = states.T @ states / len(states)
    weight = load_file(untied_model / "model.safetensors")["lm_head.weight"].float()
    errors = [entry["relative_error"] for entry in json.loads((untied / "bq_report.json").read_text())["embeddings"]]
    rounded = load(untied).dequantize()
    assert errors[1] == pytest.approx(output_error(weight, rounded.lm_head.weight, hessian), rel=1e-3)
    table = load_file(untied_model / "model.safetensors")["model.embed_tokens.weight"].float()
    lost = (rounded.model.embed_tokens.weight - table).square().sum() / table.square().sum()
    assert errors[0] == pytest.approx(float(lost), rel=1e-3)
    settings = dict(embedding_bits=3, head_bits=4, rotation="hadamard", correction=0.5, rounding="rtn")
    nearest = load(run(untied_model, tmp_path / "rtn", text, **settings)).dequantize()
    assert errors[1] < output_error(weight, nearest.lm_head.weight, hessian)


def test_resume_gives_the_same_bytes(tied, tmp_path, model, text, monkeypatch):
    from bq_calibration import pipeline

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(model, tmp_path / "out", text, **TIED)
    run(model, tmp_path / "out", text, resume=True, **TIED)
    same_checkpoint(tied, tmp_path / "out")


# ---- training

BITS = dict(bits=4, samples=8, train_samples=8, held_out=2, tokens_per_step=128)
FORMATS = {
    "tied": ("llama", TIED),
    "tied, factor, zeros": ("gemma3_text", dict(embedding_bits=3, head_bits=3, zero_point="float")),
    "untied": ("qwen2", dict(embedding_bits=3, head_bits=4, rotation="hadamard", kept_tokens=4)),
    "embedding": ("qwen2", dict(embedding_bits=4, rotation="none", kept_tokens=4)),
    "head": ("mistral", dict(head_bits=4, rotation_block=None)),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """Makes a model of an architecture; it rounded; and it trained from there."""

    def make(architecture: str, settings: dict) -> tuple[Path, Path, Path]:
        folder = tmp_path_factory.mktemp("trained")
        source = with_scaled_head(make_model(folder / "model", architecture), HEAD.get(architecture, 30))
        rounded = run(source, folder / "rounded", text, **BITS, **settings)
        return source, rounded, run(source, folder / "out", text, **BITS, train_tokens=16 * 128, **settings)

    return make


def mean_kl(folder: Path, source: Path, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        wanted, found = (load(each)(input_ids=tokens).logits.log_softmax(-1) for each in (source, folder))
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@pytest.mark.parametrize("name", FORMATS)
def test_rounded_embeddings_are_trained(name, trained, text):
    """Their scales and zeros move; the student is what the checkpoint says, before and after."""
    architecture, settings = FORMATS[name]
    source, rounded, out = trained(architecture, settings)
    assert_same_logits(out)
    before, after = load_file(rounded / "model.safetensors"), load_file(out / "model.safetensors")
    packed = list(verify(out).embeddings)
    for module in packed:
        assert torch.equal(before[f"{module}.qweight"], after[f"{module}.qweight"])
        moving = ["scales"] + ["zeros"] * ("zero_point" in settings)
        moving += ["angles"] * (settings.get("rotation", "butterfly") == "butterfly")
        for suffix in moving:
            assert not torch.equal(before[f"{module}.{suffix}"], after[f"{module}.{suffix}"]), suffix
        # slowly: Adam moves the rows of tokens that the text hardly holds as fast as all others, by noise
        scales = before[f"{module}.scales"].float(), after[f"{module}.scales"].float()
        assert (scales[1] / scales[0] - 1).abs().max() < 16 * 0.1 * 5e-3 + torch.finfo(torch.float16).eps
    stages = json.loads((out / "bq_report.json").read_text())["stages"]
    assert stages[1]["embeddings"] == packed
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(source), str(text), 10, 32, 0)
    model, text = SourceModel(str(source), torch.device("cpu"), "float32"), TrainingText(tokens[8:], 2, shuffled=False)
    for folder in (rounded, out):
        student = Student(model, read_config(folder)[1], TensorStore(folder))
        found = held_out(student, text, ResidentTeacher(model, text.tokens))
        # the checkpoint's biases and 16-bit tables are in bfloat16
        assert found == pytest.approx(mean_kl(folder, source, text.tokens), rel=1e-2)
    losses = stages[1]["losses"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("name", ["tied, factor, zeros", "untied"])
def test_gradients_of_rounded_embeddings(name, trained, monkeypatch):
    """Those of the loss in small parts are those of autograd through the whole of it."""
    source, _, out = trained(*FORMATS[name])
    monkeypatch.setattr(next_token_loss, "LOGIT_BYTES", {"cpu": 320 * 4 * 5})
    model = SourceModel(str(source), torch.device("cpu"), "float32")
    student, target = Student(model, read_config(out)[1], TensorStore(out)), torch.randn(2, 6, 96)
    found = {}
    for whole in (False, True):
        if whole:
            logits, wanted = student.logits(student.states(IDS)), student.original_head(target)
            arguments = logits.log_softmax(-1), wanted.log_softmax(-1)
            loss = F.kl_div(*arguments, reduction="sum", log_target=True)
        else:
            loss = next_token_loss.divergence(student, student.states(IDS), target)
        parameters = [p for tensors in student.parameters().values() for p in tensors]
        found[whole] = [loss.detach(), *torch.autograd.grad(loss, parameters)]
    for part, whole in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


# ---- sizes and reports


@pytest.mark.parametrize("checkpoint", ["tied", "untied"])
def test_bits_of_the_whole_file(checkpoint, request):
    folder = request.getfixturevalue(checkpoint)
    verified, tensors = verify(folder), load_file(folder / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in tensors.values()) * 8
    weights = sum(parameter.numel() for parameter in load(folder).dequantize().parameters())
    assert verified.file_bits_per_weight() == pytest.approx(stored / weights)
    totals = json.loads((folder / "bq_report.json").read_text())["totals"]
    assert totals["file_bits_per_weight"] == verified.file_bits_per_weight() and totals["weights"] == weights
    with stdout.capture() as capture:
        print_description(inspect(str(folder)), stdout)
    printed = " ".join(capture.get().split())
    assert f"bits per weight of the whole file {verified.file_bits_per_weight():.4f}" in printed
    assert "model.embed_tokens: " in printed
    assert f"{verified.file_bits_per_weight():.3f}" in (folder / "README.md").read_text()


def test_dry_run_counts_them(tied, model, text, tmp_path):
    recipe = make_recipe("fast", SMALL | TIED | {"dataset": str(text)})
    plan = Calibration(str(model), str(tmp_path / "out"), recipe, "cpu").dry_run(Progress(disable=True))
    verified = verify(tied)
    assert plan["checkpoint_bytes"] == verified.total_bytes
    assert plan["file_bits_per_weight"] == pytest.approx(verified.file_bits_per_weight())


def test_training_plan_counts_them(untied_model):
    source = SourceModel(str(untied_model), torch.device("cpu"), "float32")
    weights, table = 320 * 96, 0.5 + 20 / 32  # bytes per weight: codes, and scales with their moments
    needed = {}
    for bits in ((16, 16), (4, 16), (16, 4)):
        settings = SMALL | dict(train_tokens=64, embedding_bits=bits[0], head_bits=bits[1])
        needed[bits] = training_plan(source, make_recipe("fast", settings), 10**10).memory_bytes
    assert needed[4, 16] - needed[16, 16] == pytest.approx((table - 4) * weights, abs=1)
    assert needed[16, 4] - needed[16, 16] == pytest.approx((table + 12) * weights, abs=1)


def test_card(tied, untied):
    kept = ", the rows of the 20 most frequent tokens in 16."
    for folder, sentences in (
        (tied, f"Embedding and LM head (one weight): 4 bits{kept} As in the original: norms."),
        (untied, f"Embedding: 3 bits{kept} LM head: 4 bits{kept} As in the original: norms."),
    ):
        assert sentences in " ".join((folder / "README.md").read_text().split())


# ---- what is refused


@pytest.mark.parametrize("settings", [dict(head_bits=4), dict(embedding_bits=4), dict(embedding_bits=4, head_bits=2)])
def test_tied_weights_have_one_number_of_bits(settings, tmp_path, model, text):
    with pytest.raises(
        UserError, match=r"--embedding-bits \d+, --head-bits \d+: llama ties its LM head to its embedding"
    ):
        run(model, tmp_path / "out", text, **settings)


def test_bits_that_there_are_not():
    with pytest.raises(UserError, match=r"--head-bits 8: expected one of 2, 3, 4, 16"):
        make_recipe("fast", {"head_bits": 8})


@pytest.mark.parametrize("same", [True, False])
def test_a_copy_of_a_tied_head(same, tmp_path, model, text):
    """Some files hold the tied weight twice; a head of its own is no tied one, whatever config.json says."""
    source = Path(shutil.copytree(model, tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy if same else copy + 1}, source / "model.safetensors")
    if same:
        out = run(source, tmp_path / "out", text, **TIED)
        verify(out)
        assert not [name for name in load_file(out / "model.safetensors") if name.startswith("lm_head")]
    else:
        with pytest.raises(UserError, match=r"ties the LM head to the embedding, but lm_head\.weight differs"):
            run(source, tmp_path / "out", text, **TIED)
        run(source, tmp_path / "out", text)  # unpacked it stays the file's own


EMBED = "model.embed_tokens"


@pytest.mark.parametrize(
    ("checkpoint", "name", "change", "message"),
    [
        ("tied", f"{EMBED}.scales", None, rf"tensor {EMBED}\.scales is missing"),
        ("tied", f"{EMBED}.angles", None, rf"tensor {EMBED}\.angles is missing"),
        ("untied", "lm_head.qweight", None, r"tensor lm_head\.qweight is missing"),
        ("tied", f"{EMBED}.weight", lambda t: torch.ones(320, 96), rf"tensor {EMBED}\.weight does not belong"),
        ("tied", "lm_head.weight", lambda t: torch.ones(320, 96), r"tensor lm_head\.weight does not belong"),
        ("tied", "lm_head.scales", lambda t: torch.ones(320, 3).half(), r"tensor lm_head\.scales does not belong"),
        ("untied", f"{EMBED}.angles", lambda t: torch.ones(3, 80).half(), rf"tensor {EMBED}\.angles does not belong"),
        ("tied", f"{EMBED}.qweight", lambda t: t[:-1], rf"{EMBED}\.qweight: expected torch\.int32 \[320, 12\], found"),
        ("untied", "lm_head.scales", torch.zeros_like, r"lm_head\.scales: holds zero or a negative number"),
        ("untied", "lm_head.scales", lambda t: t * torch.nan, r"lm_head\.scales: holds NaN or infinity"),
    ],
)
def test_wrong_tensors(checkpoint, name, change, message, request, tmp_path):
    folder = Path(shutil.copytree(request.getfixturevalue(checkpoint), tmp_path / "broken"))
    (folder / "SHA256SUMS").unlink()
    tensors = load_file(folder / "model.safetensors")
    old = tensors.pop(name, None)
    if change:
        tensors[name] = change(old)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        verify(folder)
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("checkpoint", "settings", "message"),
    [
        ("tied", {"module_bits": {EMBED: 4, "lm_head": 4}}, "module_bits: the model has no packed layer lm_head"),
        ("tied", {"module_bits": {EMBED: 2}}, r"embed_tokens\.qweight: expected torch\.int32 \[320, 6\], found"),
        ("tied", {"modules_to_not_convert": ["lm_head"]}, "lm_head is tied to model.embed_tokens, which is packed"),
        ("tied", {"module_bits": {}, "kept_tokens": {}}, r"tensor model\.embed_tokens\.weight is missing"),
        ("tied", {"module_bits": {}}, "kept_tokens: model.embed_tokens is no packed embedding or LM head"),
        ("tied", {"kept_tokens": {}}, r"tensor model\.embed_tokens\.kept_rows does not belong to this model"),
        ("tied", {"kept_tokens": {EMBED: 19}}, r"embed_tokens\.kept_rows: expected torch\.float16 \[19, 96\], found"),
        ("untied", {"modules_to_not_convert": ["lm_head"]}, "module_bits: the model has no packed layer lm_head"),
        ("untied", {"module_bits": {EMBED: 3}, "kept_tokens": {EMBED: 20}}, r"tensor lm_head\.weight is missing"),
    ],
)
def test_wrong_settings(checkpoint, settings, message, request, tmp_path):
    folder = Path(shutil.copytree(request.getfixturevalue(checkpoint), tmp_path / "broken"))
    (folder / "SHA256SUMS").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        verify(folder)
