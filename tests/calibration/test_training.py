"""Training of blocks and of whole models: gradients, what moves and what stays, resuming."""

import json
from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
import pytest
import torch
import torch.nn.functional as F
from bq_calibration import block as block_module
from bq_calibration import end_to_end as end_to_end_module
from bq_calibration import pipeline as pipeline_module
from bq_calibration import quantize_blocks as quantize_blocks_module
from bq_calibration import sampling as sampling_module
from bq_calibration import schedule as schedule_module
from bq_calibration import train as train_module
from bq_calibration import training_plan as training_plan_module
from bq_calibration.checkpoint import read_config, verify
from bq_calibration.data import calibration_tokens
from bq_calibration.end_to_end import TrainingText, held_out
from bq_calibration.errors import UserError
from bq_calibration.model import SourceModel
from bq_calibration.next_token_loss import divergence
from bq_calibration.pipeline import Calibration
from bq_calibration.quantized_linear import INIT_MARGIN, QuantLinearFunction
from bq_calibration.recipes import make_recipe
from bq_calibration.reconstruct import reconstruct
from bq_calibration.sampling import sample_at
from bq_calibration.store import TensorStore
from bq_calibration.student import Student
from bq_calibration.teacher import ResidentTeacher, StoredTeacher, teacher_states
from bq_calibration.training_plan import TrainingPlan, training_plan
from bq_kernels.packing import pack, unpack
from bq_kernels.reference import levels
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import CONFIGS, make_model

CPU = torch.device("cpu")
SCALES = dict(train_tokens=25 * 256, tokens_per_step=256)  # a step takes all eight samples of SMALL
CODES = SCALES | dict(train_codes=True)
SMALL = dict(
    group_size=32, rotation="butterfly", rotation_block=32, samples=8, train_samples=8, held_out=2, seqlen=32, steps=3
)


def run(model: Path, out: Path, text: Path, resume=False, **settings) -> Path:
    recipe = make_recipe("fast", SMALL | {"dataset": str(text)} | settings)
    Calibration(str(model), str(out), recipe, "cpu", resume, plots=False).run(Progress(disable=True))
    return out


def report_of(folder: Path) -> dict:
    return json.loads((folder / "bq_report.json").read_text())


def log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(input_ids=ids).logits.log_softmax(-1)


def kl(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@pytest.mark.parametrize("train_codes", [False, True])
@pytest.mark.parametrize("with_zeros", [False, True])
def test_gradients_of_the_packed_product(train_codes, with_zeros):
    x, scales = torch.randn(5, 48, requires_grad=True), (torch.rand(6, 3) + 0.1).requires_grad_()
    zeros = torch.rand(6, 3, requires_grad=True) if with_zeros else None
    position = torch.rand(6, 3, 16) * 4 - 0.5
    hard = position.round().clamp(0, 3)
    codes = position.requires_grad_() if train_codes else pack(hard.to(torch.uint8).flatten(1), 2)
    inputs = [t for t in (x, codes, scales, zeros) if t is not None and t.requires_grad]
    target = torch.randn(5, 6)
    got = torch.autograd.grad((QuantLinearFunction.apply(x, codes, scales, zeros, 2) * target).sum(), inputs)
    # straight through: the gradient of a position is that of its code
    hard.requires_grad_()
    weight = levels(hard, scales, zeros, 2).flatten(-2)
    inputs = [hard if t is codes else t for t in inputs]
    want = torch.autograd.grad((x @ weight.T * target).sum(), inputs)
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


TRAINED = [name for name in CONFIGS if name not in ("olmoe", "qwen3_moe")]  # of mixtures, the one with a shared expert


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in TRAINED]
)
def test_training_brings_the_logits_nearer(architecture, tmp_path, text):
    source = with_scaled_head(make_model(tmp_path / "model", architecture), HEAD.get(architecture, 30))
    plain, trained = run(source, tmp_path / "plain", text), run(source, tmp_path / "trained", text, **SCALES)
    tuned = run(source, tmp_path / "tuned", text, **CODES)
    verify(trained)
    verify(tuned)
    ids = calibration_tokens(AutoTokenizer.from_pretrained(source), str(text), 10, 32, 0)[:8]  # what it is trained on
    wanted = log_probabilities(source, ids)
    before, after, with_codes = (kl(wanted, log_probabilities(folder, ids)) for folder in (plain, trained, tuned))
    assert before > 1e-4 and after < 0.8 * before and with_codes < 0.8 * before, (before, after, with_codes)
    stages = report_of(tuned)["stages"]
    assert [(s["stage"], len(s.get("losses", []))) for s in stages] == [("rounded", 0), ("train", 25)]
    divergences = [stage["held_out_divergence"] for stage in stages]
    gains = [(g["stage"], g["before"], g["after"]) for g in report_of(tuned)["gains"] if "KL" in g["measure"]]
    assert gains == [("train", *divergences)] and min(divergences) > 0
    curve = stages[1]["held_out_curve"]
    assert len(curve) == 10 and curve[-1] == [25, divergences[1]]
    lines = [json.loads(line) for line in (tuned / "report" / "training.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == stages[1]["losses"]
    assert [[line["step"], line["held_out_divergence"]] for line in lines if "loss" not in line] == curve
    a, b, c = TensorStore(plain), TensorStore(trained), TensorStore(tuned)
    for name in a.names():  # codes move if they are asked to; what else is trained moves
        if name.endswith(".qweight") or "embed_tokens" in name:
            assert torch.equal(a.get(name), b.get(name))
        elif name.endswith((".scales", ".angles", "norm.weight")):
            assert a.get(name).dtype == b.get(name).dtype and not torch.equal(a.get(name), b.get(name)), name
    assert any(not torch.equal(a.get(name), c.get(name)) for name in a.names() if name.endswith(".qweight"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"rotation": "hadamard"}, {"rotation": "none"}, {"zero_point": "float", "bits": 3}]
)
def test_training_of_other_formats(settings, model, text, tmp_path):
    trained = run(model, tmp_path / "trained", text, block_tokens=2048, **CODES, **settings)
    losses = report_of(trained)["stages"][1]["losses"]
    assert min(losses[-4:]) < losses[0]


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_reconstruction_lowers_the_error_of_a_block(architecture, tmp_path, text):
    source = make_model(tmp_path / "model", architecture)
    plain = run(source, tmp_path / "plain", text)
    trained = run(source, tmp_path / "trained", text, block_tokens=40 * 512, train_samples=64, held_out=16)
    verify(trained)
    for block in report_of(trained)["reconstruction"]:
        assert sum(block["losses"][-4:]) < 0.9 * sum(block["losses"][:4])
        assert block["held_out_loss"][1] < 0.9 * block["held_out_loss"][0]
    gain = report_of(trained)["gains"][-1]
    assert gain["stage"] == "blocks" and gain["after"] < 0.9 * gain["before"]
    assert report_of(plain)["reconstruction"] == [None, None]
    ids = calibration_tokens(AutoTokenizer.from_pretrained(source), str(text), 8, 32, 0)
    states = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model(input_ids=ids).last_hidden_state
        for folder in (source, plain, trained)
    ]
    assert F.mse_loss(states[2], states[0]) < 0.9 * F.mse_loss(states[1], states[0])
    a, b = TensorStore(plain), TensorStore(trained)
    for end in (".qweight", ".scales", ".angles", "norm.weight"):
        changed = [name for name in a.names() if name.endswith(end) and not torch.equal(a.get(name), b.get(name))]
        assert any("layers.0." in name for name in changed) and any("layers.1." in name for name in changed), end


def test_student_is_what_the_checkpoint_says(model, text, tmp_path):
    """Before training the student's divergence is that of the checkpoint in transformers, codes trained or not."""
    out = run(model, tmp_path / "out", text)
    source = SourceModel(str(model), CPU)
    ids = torch.randint(3, 30, (2, 16))
    want = kl(log_probabilities(model, ids), log_probabilities(out, ids))
    states = teacher_states(source, ids, Progress(disable=True))
    text = TrainingText(ids, held_out=2, shuffled=False)
    for train_codes in (False, True):
        student = Student(source, read_config(out)[1], TensorStore(out), train_codes)
        got = divergence(student, student.states(ids), states).item() / ids.numel()
        assert got == pytest.approx(want, rel=0.05)  # the student multiplies in bfloat16
        for teacher in (StoredTeacher(states, CPU), ResidentTeacher(source, ids)):
            assert held_out(student, text, teacher) == pytest.approx(got, rel=1e-2)
        stored = TensorStore(out)
        for name, tensor in student.tensors().items():  # nothing is trained: nothing has changed
            assert torch.equal(tensor, stored.get(name)), name


@pytest.mark.slow
def test_a_smaller_budget_of_memory_gives_the_same_training(model, text, tmp_path):
    """Less memory: more passes per step, then activations twice, at last a refusal; losses stay what they are."""
    settings = {"train_tokens": 6 * 128, "tokens_per_step": 128, "train_codes": True, "optimizer_bits": 32}
    recipe = make_recipe("fast", SMALL | settings)
    source, plans, budget = SourceModel(str(model), CPU), [], 10**10
    with pytest.raises(UserError, match=r"end-to-end training needs 0.* GB.*use --optimizer-bits 8, use --no-train"):
        while True:
            plans.append(training_plan(source, recipe, budget))
            budget = plans[-1].memory_bytes - 1
    choices = [(plan.recompute, plan.micro_batch) for plan in plans]
    assert choices[0] == (False, 4) and choices[-1] == (True, 1) and len(set(choices)) == len(choices)
    losses = []
    for plan in (plans[0], plans[-1]):
        recipe = make_recipe("fast", SMALL | settings | {"dataset": str(text)})
        out = tmp_path / f"{plan.recompute}"
        run = Calibration(str(model), str(out), recipe, "cpu", plots=False, memory_budget=plan.memory_bytes)
        stage = run.run(Progress(disable=True))["stages"][1]
        assert stage["plan"] == plan.to_dict()
        losses.append(stage["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_training_that_makes_a_model_worse_says_so(text, tmp_path, caplog):
    source = with_scaled_head(make_model(tmp_path / "model", "qwen2"), 30)
    settings = {"train_tokens": 20 * 64, "tokens_per_step": 64, "train_codes": True, "train_lr": 0.5, "code_lr": 1.0}
    stages = report_of(run(source, tmp_path / "out", text, **settings))["stages"]
    before, after = (stage["held_out_divergence"] for stage in stages)
    assert after > before
    assert f"made the model worse: held-out KL {before:.3g} before, {after:.3g} now; lower --train-lr" in caplog.text
    assert "held-out KL has risen from" in caplog.text
    caplog.clear()
    run(source, tmp_path / "gentle", text, **settings | {"train_lr": 1e-4, "code_lr": 1e-4})
    assert "made the model worse" not in caplog.text and "risen" not in caplog.text


def test_moments_take_8_bits_where_32_do_not_fit(model, monkeypatch):
    """Unless 32 are asked for, or torchao is missing."""
    monkeypatch.setattr(training_plan_module, "has_torchao", lambda: True)
    codes = {"train_tokens": 128, "tokens_per_step": 128, "train_codes": True}
    source = SourceModel(str(model), CPU)

    def planned(budget: int, **settings) -> TrainingPlan:
        return training_plan(source, make_recipe("fast", SMALL | codes | settings), budget)

    enough = planned(10**10)
    assert enough.optimizer_bits == 32
    least, budget = enough, enough.memory_bytes
    while least.optimizer_bits == 32:
        budget, least = least.memory_bytes - 1, planned(least.memory_bytes - 1)
    assert least.optimizer_bits == 8 and least.memory_bytes <= budget
    with pytest.raises(UserError, match="use --optimizer-bits 8"):
        planned(budget, optimizer_bits=32)
    monkeypatch.setattr(training_plan_module, "has_torchao", lambda: False)
    with pytest.raises(UserError, match="install torchao for moments in 8 bits"):
        planned(budget)
    with pytest.raises(UserError, match="--optimizer-bits 8 needs torchao"):
        planned(10**10, optimizer_bits=8)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_train_alike(recompute, model, text, tmp_path, caplog):
    """Compiled layers give the eager ones' states and gradients, within the rounding of bfloat16."""
    out = run(model, tmp_path / "out", text)
    source, ids = SourceModel(str(model), CPU), torch.randint(3, 30, (2, 32))
    found = []
    for compiled in (False, True):
        student = Student(source, read_config(out)[1], TensorStore(out), train_codes=True, recompute=recompute)
        if compiled:
            assert student.compile(ids) and "not compiled" not in caplog.text
            assert student.decoder.layers[0]._compiled_call_impl is not None
        states = student.states(ids)
        (states * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
        gradients = {kind: torch.cat([p.grad.flatten() for p in ps]) for kind, ps in student.parameters().items() if ps}
        found.append({"states": states.detach(), **gradients})
    assert set(found[0]) == {"states", "codes", "scales", "angles", "norms"}
    for name, eager in found[0].items():
        assert (found[1][name] - eager).norm() < 0.02 * eager.norm(), name


@pytest.mark.slow
def test_layers_that_do_not_compile_are_trained_eagerly(model, text, tmp_path, monkeypatch):
    settings = {"train_tokens": 4 * 128, "tokens_per_step": 128, "train_codes": True}
    eager = run(model, tmp_path / "eager", text, **settings)

    def broken(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(nn.Module, "compile", lambda layer, **_: setattr(layer, "_compiled_call_impl", broken))
    out = run(model, tmp_path / "out", text, compile="on", **settings)
    assert "decoder layers are not compiled: no compiler here" in (tmp_path / "out.log").read_text()
    assert (out / "model.safetensors").read_bytes() == (eager / "model.safetensors").read_bytes()


def test_codes_start_at_the_weight_but_round_to_what_was_chosen(model, text, tmp_path):
    out = run(model, tmp_path / "out", text)
    source = SourceModel(str(model), CPU)
    student = Student(source, read_config(out)[1], TensorStore(out), train_codes=True)
    for name, layer in student.layers.items():
        codes = unpack(TensorStore(out).get(f"{name}.qweight"), 2).view(layer.codes.shape)
        distance = (layer.codes - codes).abs()
        assert distance.max() <= INIT_MARGIN + 1e-6
        assert 0.05 < distance.mean() < 0.4  # neither in the middle of their codes nor all at the border


def test_gradient_of_the_divergence(model, text, tmp_path):
    out = run(model, tmp_path / "out", text)
    student = Student(SourceModel(str(model), CPU), read_config(out)[1], TensorStore(out))
    found, wanted = torch.randn(2, 300, 96, requires_grad=True), torch.randn(2, 300, 96)
    loss = divergence(student, found, wanted) / 600
    (gradient,) = torch.autograd.grad(loss, found)
    target, logits = (F.linear(s, student.head.weight.float()).log_softmax(-1).flatten(0, 1) for s in (wanted, found))
    want = F.kl_div(logits, target, reduction="batchmean", log_target=True)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=0.02)
    assert (gradient - found.grad).norm() < 0.02 * found.grad.norm()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_codes": True},
        {"train_codes": True, "schedule": "wsd", "optimizer_bits": 8},
        {"train_codes": True, "embedding_bits": 4, "head_bits": 4},
    ],
    ids=["scales", "codes", "codes-8-bit", "embeddings"],
)
def test_resumed_training_gives_the_same_bytes(settings, model, text, tmp_path, monkeypatch):
    if settings.get("optimizer_bits") == 8:
        pytest.importorskip("torchao")
    monkeypatch.setattr(train_module, "SAVE_EVERY", 0)
    settings |= {"train_tokens": 6 * 128, "tokens_per_step": 128}  # 4 samples a step
    whole = run(model, tmp_path / "whole", text, **settings)
    left = 4 * 3

    def interrupted(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return sample_at(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sampling_module, "sample_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text, **settings)
    resumed = run(model, tmp_path / "out", text, resume=True, **settings)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    curves = [(out / "report" / "training.jsonl").read_text() for out in (whole, resumed)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("mixed", [False, True])
def test_an_extended_run_is_the_longer_run(mixed, model, text, tmp_path, monkeypatch):
    """10 steps that go on to 20 give the bytes of 20 in one go; but for the warm-up, which is left out here."""
    monkeypatch.setattr(schedule_module, "WARM_UP", 0)
    base = SMALL | {"dataset": str(text), "tokens_per_step": 128, "train_codes": True, "schedule": "wsd"}
    base |= {"mix": f"{text}:1"} if mixed else {"embedding_bits": 4, "head_bits": 4}

    def calibrate(name: str, steps: int, extends: Path | None = None, **settings) -> Path:
        recipe = make_recipe("fast", base | {"train_tokens": steps * 128} | settings)
        work = {"extends": extends, "keep_work": True}
        Calibration(str(model), str(tmp_path / name), recipe, "cpu", plots=False, **work).run(Progress(disable=True))
        return tmp_path / name

    short, long = calibrate("short", 10), calibrate("long", 20)
    kept = tmp_path / "short.work"
    extended = calibrate("extended", 20, kept)
    assert (extended / "model.safetensors").read_bytes() == (long / "model.safetensors").read_bytes()
    assert (extended / "model.safetensors").read_bytes() != (short / "model.safetensors").read_bytes()
    stages = [report_of(folder)["stages"][1] for folder in (extended, long)]
    assert stages[0]["losses"] == stages[1]["losses"]
    assert all(stage["text"]["parts"][0]["rows"] == 2 + 20 * 4 for stage in stages if mixed)
    for message, arguments in {
        "code_lr was 0.005 in that run and is 0.1 now": {"steps": 20, "code_lr": 0.1},
        "has trained on 1280 tokens; ask for more": {"steps": 10},
        "--schedule wsd --keep-work has left in OUT.work": {"steps": 20, "extends": short},
    }.items():
        with pytest.raises(UserError, match=message):
            calibrate("refused", **{"extends": kept} | arguments)


def test_correction_brings_the_streams_nearer(model, text, tmp_path):
    """With the error of earlier layers made up for, the whole model is nearer to the original."""
    plain, better = (run(model, tmp_path / f"{share}", text, correction=share) for share in (0.0, 0.5))
    verify(better)
    ids = calibration_tokens(AutoTokenizer.from_pretrained(model), str(text), 8, 32, 0)
    wanted = log_probabilities(model, ids)
    before, after = (kl(wanted, log_probabilities(folder, ids)) for folder in (plain, better))
    assert after < before, (before, after)


@pytest.mark.parametrize("settings", [{"block_tokens": 1536}, {"block_tokens": 1536, "correction": 0.5}])
def test_resumed_reconstruction_gives_the_same_bytes(settings, model, text, tmp_path, monkeypatch):
    whole = run(model, tmp_path / "whole", text, **settings)

    def interrupted(*arguments):
        if arguments[3].index == 1:  # the second block
            raise KeyboardInterrupt
        return reconstruct(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_blocks_module, "reconstruct", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text, **settings)
    resumed = run(model, tmp_path / "out", text, resume=True, **settings)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_blocks_leave_the_states_of_the_16_bit_model_to_training(model, text, tmp_path, monkeypatch):
    """Training takes them over; where a run stopped before they were kept, it computes the same ones."""
    monkeypatch.setattr(block_module, "TOKENS_PER_BATCH", 3 * SMALL["seqlen"])
    settings = SCALES | dict(block_tokens=1536, train_tokens=4 * 256)

    def unused(*_):
        raise AssertionError("the states were there")

    with monkeypatch.context() as patch:
        patch.setattr(end_to_end_module, "teacher_states", unused)
        whole = run(model, tmp_path / "whole", text, **settings)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline_module, "keep_states", interrupted)
        run(model, tmp_path / "out", text, **settings)
    resumed = run(model, tmp_path / "out", text, resume=True, **settings)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert report_of(whole)["stages"] == report_of(resumed)["stages"]


def test_corrected_layers_leave_no_states(model, text, tmp_path):
    """Their targets are the samples to round on, fewer than those to train on."""
    out = run(model, tmp_path / "out", text, correction=0.5, samples=4, **SCALES | dict(train_tokens=4 * 256))
    assert len(report_of(out)["stages"][1]["losses"]) == 4


def test_blocks_read_parts_of_the_sequences(model, text, tmp_path, monkeypatch):
    """They come out as with sequences of that length; end-to-end training reads whole ones."""
    gathered, gather = [], pipeline_module.gather_tokens
    monkeypatch.setattr(pipeline_module, "gather_tokens", lambda *given: gathered.append(gather(*given)) or gathered[0])
    settings = dict(seqlen=64, block_seqlen=32, samples=4, train_samples=6, held_out=2, block_tokens=1536)
    long = run(model, tmp_path / "long", text, **settings, train_tokens=4 * 64, tokens_per_step=64)
    monkeypatch.setattr(pipeline_module, "gather_tokens", lambda *_: gathered[0].view(-1, 32))
    short = run(model, tmp_path / "short", text, samples=8, train_samples=12, held_out=4, block_tokens=1536)
    for part in ("inputs", "reconstruction"):
        assert report_of(long)[part] == report_of(short)[part]
    stores = TensorStore(long), TensorStore(short)
    for name in stores[0].names():
        if name.endswith("qweight"):
            assert torch.equal(*(store.get(name) for store in stores)), name
    trained = report_of(long)["stages"][1]
    assert trained["tokens_per_step"] == 64 and len(trained["losses"]) == 4


def test_parts_that_do_not_divide_the_sequences():
    with pytest.raises(UserError, match="--block-seqlen 48 does not divide --seqlen 512"):
        make_recipe("best", {"block_seqlen": 48})


def test_every_sample_once_an_epoch():
    for epoch in range(2):
        assert sorted(sample_at(epoch * 7 + i, 7, 0) for i in range(7)) == list(range(7))


def test_several_data_sets_take_turns(model, tmp_path):
    files = []
    for word, count in (("w1", 4000), ("w2", 300)):
        files.append(tmp_path / f"{word}.txt")
        files[-1].write_text(f"{word} " * count)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = calibration_tokens(tokenizer, ",".join(map(str, files)), 20, 32, 0)
    assert len(rows) == 20
    digits = [tokenizer("w1")["input_ids"][-1], tokenizer("w2")["input_ids"][-1]]
    assert [(rows == digit).any(1).sum().item() for digit in digits] == [10, 10]
    # a short one gives what it has, the other the rest; and more samples begin with the fewer
    more = calibration_tokens(tokenizer, ",".join(map(str, files)), 80, 32, 0)
    assert len(more) == 80 and (more == digits[1]).any(1).sum().item() < 40
    assert torch.equal(more[:20], rows)
