import json
from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import pytest
import torch
from bq_calibration import distill as module
from bq_calibration.calibrate import Calibration
from bq_calibration.checkpoint import read_config, verify
from bq_calibration.data import calibration_tokens
from bq_calibration.distill import Student, _Product, _sample, divergence, teacher_states
from bq_calibration.model import SourceModel, TensorStore
from bq_calibration.recipes import make_recipe
from bq_kernels.reference import levels
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import CONFIGS, make_model

SMALL = dict(group_size=32, rotation_block=32, samples=8, seqlen=32, steps=3)


def run(model: Path, out: Path, text: Path, resume=False, **settings) -> Path:
    recipe = make_recipe("fast", SMALL | {"dataset": str(text)} | settings)
    Calibration(str(model), str(out), recipe, "cpu", resume).run(Progress(disable=True))
    return out


def test_gradients_of_the_packed_product():
    codes = torch.randint(4, (6, 3, 8), dtype=torch.uint8)
    x, scales, zeros = torch.randn(5, 24), torch.rand(6, 3) + 0.1, torch.rand(6, 3)
    for zero in (None, zeros):
        inputs = [t.clone().requires_grad_() for t in (x, scales)] + (
            [] if zero is None else [zero.clone().requires_grad_()]
        )
        z = None if zero is None else inputs[2]
        target = torch.randn(5, 6)
        got = torch.autograd.grad((_Product.apply(inputs[0], codes, inputs[1], z, 2) * target).sum(), inputs)
        weight = levels(codes, inputs[1], z, 2).flatten(-2)
        want = torch.autograd.grad((inputs[0] @ weight.T * target).sum(), inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Random tiny models predict every token alike, or with a tied head nothing but the token that they have just seen;
# with the weights of the head scaled so there is something to learn
HEAD = {"llama": 3, "gemma3_text": 0.1}


def with_scaled_head(model: Path, factor: float) -> Path:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"] *= factor
    save_file(tensors, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in CONFIGS]
)
def test_training_brings_the_logits_nearer(architecture, tmp_path, text):
    source = with_scaled_head(make_model(tmp_path / "model", architecture), HEAD.get(architecture, 30))
    plain, trained = run(source, tmp_path / "plain", text), run(source, tmp_path / "trained", text, distill=25)
    verify(trained)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = calibration_tokens(AutoTokenizer.from_pretrained(source), str(text), 8, 32, 0)  # what it is trained on
    errors = []
    with torch.no_grad():
        wanted = original(input_ids=ids).logits.log_softmax(-1)
        for folder in (plain, trained):
            found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits
            errors.append((wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1).mean().item())
    assert errors[0] > 1e-4 and errors[1] < 0.8 * errors[0], errors
    report = json.loads((trained / "bq_report.json").read_text())
    assert len(report["training"]["losses"]) == 25
    a, b = TensorStore(plain), TensorStore(trained)
    for name in a.names():  # codes stay, what is trained moves
        if name.endswith(".qweight") or "embed_tokens" in name:
            assert torch.equal(a.get(name), b.get(name))
        elif name.endswith((".scales", ".angles", "norm.weight")):
            assert a.get(name).dtype == b.get(name).dtype and not torch.equal(a.get(name), b.get(name)), name


@pytest.mark.parametrize(
    "settings", [{"rotation": "hadamard"}, {"rotation": "none"}, {"zero_point": "float", "bits": 3}]
)
def test_training_of_other_formats(settings, model, text, tmp_path):
    trained = run(model, tmp_path / "trained", text, distill=12, **settings)
    losses = json.loads((trained / "bq_report.json").read_text())["training"]["losses"]
    assert min(losses[-4:]) < losses[0]


def test_student_is_what_the_checkpoint_says(model, text, tmp_path):
    """Before training: the divergence of the student is that of the checkpoint in transformers."""
    out = run(model, tmp_path / "out", text)
    source = SourceModel(str(model), torch.device("cpu"))
    ids = torch.randint(3, 30, (2, 16))
    student = Student(source, read_config(out)[1], TensorStore(out))
    states = teacher_states(source, ids, Progress(disable=True))
    with torch.no_grad():
        original, packed = (
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval()(input_ids=ids).logits.log_softmax(-1)
            for f in (model, out)
        )
        want = (original.exp() * (original - packed)).sum(-1).mean().item()
        got = divergence(student, ids, states).item()
    assert got == pytest.approx(want, rel=0.05)  # the student multiplies in bfloat16


@pytest.mark.parametrize("stop_after", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_training_gives_the_same_bytes(stop_after, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    whole = run(model, tmp_path / "whole", text, distill=6)
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return divergence(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "divergence", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text, distill=6)
    resumed = run(model, tmp_path / "out", text, resume=True, distill=6)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_every_sample_once_an_epoch():
    for epoch in range(2):
        assert sorted(_sample(epoch * 7 + i, 7, 0) for i in range(7)) == list(range(7))
