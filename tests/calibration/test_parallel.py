"""Several processes: what they compute together is what one computes alone, and each can go on where others stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bq_calibration import parallel
from bq_calibration.errors import UserError
from bq_calibration.model import SourceModel
from bq_calibration.recipes import make_recipe
from bq_calibration.training_plan import training_plan
from bq_calibration.training_state import empty_tensors, latest_state, load_state
from safetensors.torch import load_file

from .conftest import make_model

ROUNDING = 1e-5  # of sums in float32, in another order
GRADIENTS = 1e-4  # the same of gradients, by their norm
DRIFT = 1e-2  # of losses some steps later: Adam divides a gradient near zero by its own size, and a code may turn
RUN = ("recipe", "compute_dtype")  # not settings of a recipe
SMALL = dict(
    recipe="fast",
    **dict(group_size=32, rotation="butterfly", rotation_block=32, steps=3),
    **dict(samples=8, train_samples=8, held_out=3, seqlen=32),
    **dict(train_tokens=6 * 128, tokens_per_step=128, compute_dtype="float32"),
)
CODES = dict(train_codes=True, code_lr=0.015)  # codes begin to move in the last steps
EIGHT_BITS = CODES | dict(optimizer_bits=8, schedule="wsd")


class Runs:
    """Makes runs of several processes.

    Args:
        folder: of the checkpoints.
        model: to calibrate.
        text: to calibrate on.
    """

    def __init__(self, folder: Path, model: Path, text: Path):
        self.folder, self.base, self.jobs = folder, SMALL | dict(model=str(model), dataset=str(text)), []

    def add(self, name: str, processes: int, begun: str | None = None, interrupted: int | None = None, **settings):
        """Note a run: it may go on from the unfinished work of another, and stop at a step of its training."""
        out = str(self.folder / name)
        resume = begun is not None or Path(f"{out}.partial").exists()
        resume |= any(job["arguments"]["out"] == out for job in self.jobs)
        arguments = self.base | dict(out=out, resume=resume) | settings
        job = {"processes": processes, "arguments": arguments}
        job |= {} if begun is None else {"begun": str(self.folder / f"{begun}.partial")}
        self.jobs.append(job | ({} if interrupted is None else {"interrupted": interrupted}))

    def make(self) -> None:
        """Make the runs that were noted."""
        call = [sys.executable, str(Path(__file__).with_name("processes.py")), json.dumps(self.jobs)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        want = [[130 if "interrupted" in job else 0] * job["processes"] for job in self.jobs]
        assert json.loads(done.stdout.splitlines()[-1]) == want, done.stderr[-3000:]
        self.jobs = []

    def report(self, name: str) -> dict:
        return json.loads((self.folder / name / "bq_report.json").read_text())

    def course(self, name: str) -> list[float]:
        """Losses of the steps, and divergences on held-out text."""
        rounded, trained = self.report(name)["stages"]
        measured = [divergence for _, divergence in trained["held_out_curve"]]
        return [rounded["held_out_divergence"], *trained["losses"], *measured]

    def bytes(self, name: str) -> bytes:
        return (self.folder / name / "model.safetensors").read_bytes()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """The last state of an interrupted training, read by one process."""
        state = latest_state(self.folder / f"{name}.partial" / "train.state")
        names = [f"{i}.exp_avg" for i in range(40)]
        quantized = [f"{name}.{part}" for name in names[:14] for part in ("codes", "scale")]
        known = {name for file in state.iterdir() for name in header(file)}
        tensors = empty_tensors(state, [name for name in names + quantized if name in known])
        load_state(state, tensors)
        return tensors


def assert_same_moments(state: dict, wanted: dict, of_codes: float = GRADIENTS) -> None:
    """First moments after one step, which are gradients, agree; those of codes, which come first, within a bound."""
    assert state.keys() == wanted.keys()
    for name, moment in wanted.items():
        assert moment.norm() > 0
        error = (state[name] - moment).norm() / moment.norm()
        assert error < (of_codes if moment.dim() == 2 and int(name.split(".")[0]) < 14 else GRADIENTS), name


def header(file: Path) -> dict:
    with open(file, "rb") as handle:
        return json.loads(handle.read(int.from_bytes(handle.read(8), "little")))


@pytest.fixture
def runs(model, text, tmp_path) -> Runs:
    return Runs(tmp_path, model, text)


@pytest.mark.slow
def test_two_processes_train_as_one(runs):
    """The same rounded model, trained by one process and by two with sharded codes: the same losses."""
    settings = CODES | dict(embedding_bits=4, head_bits=4)
    runs.add("begun", 1, interrupted=0, **settings)
    for processes in (1, 2):
        runs.add(f"{processes}", processes, "begun", **settings)
    runs.make()
    assert runs.course("2") == pytest.approx(runs.course("1"), rel=ROUNDING)
    rounded, trained = load_file(runs.folder / "begun.partial" / "blocks" / "00000.safetensors"), runs.tensors("2")
    assert any(not torch.equal(trained[name], tensor) for name, tensor in rounded.items() if name.endswith("qweight"))
    assert runs.report("2")["run"]["processes"] == 2
    lines = (runs.folder / "2" / "report" / "training.jsonl").read_text().splitlines()
    assert len([line for line in lines if "loss" in json.loads(line)]) == 6  # only one process has written


@pytest.mark.slow
def test_two_processes_round_experts_as_one(text, tmp_path):
    """Each expert's Hessian is that of the tokens of all processes."""
    runs = Runs(tmp_path, make_model(tmp_path / "model", "qwen3_moe"), text)
    for processes in (1, 2):
        runs.add(str(processes), processes, train_tokens=0, rotation="hadamard")
    runs.make()
    alone, together = (runs.report(name)["inputs"] for name in "12")
    # of the first layer: a code that flips sends tokens to other experts in those behind it
    alone, together = ([entry for entry in entries if entry["block"] == 0] for entries in (alone, together))
    for one, other in zip(alone, together, strict=True):
        tokens, again = (entry.get("expert_tokens", []) for entry in (one, other))
        assert sum(tokens) == sum(again) and tokens == pytest.approx(again, abs=5)
        assert one["refined_output_error"] == pytest.approx(other["refined_output_error"], rel=0.1)
    assert any("expert_tokens" in entry for entry in alone)


def test_samples_are_divided(monkeypatch):
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(parallel, "size", lambda size=size: size)
        shares = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            shares.append(parallel.share(10))
        assert sum(shares) == 10 and max(shares) - min(shares) <= 1


def test_plan_of_several_processes(model, monkeypatch):
    """Codes, gradients and moments are divided; samples that cannot be are refused."""
    source = SourceModel(str(model), torch.device("cpu"))
    recipe = make_recipe("fast", dict(group_size=32, tokens_per_step=16 * 2048, train_codes=True, train_tokens=10**6))
    needed = {}
    for size in (1, 2, 4):
        monkeypatch.setattr(parallel, "size", lambda size=size: size)
        plan = training_plan(source, recipe, 10**12)
        assert plan.micro_batch * size == plan.samples_per_step and plan.one_pass
        needed[size] = plan.memory_bytes
    assert needed[1] > needed[2] > needed[4]
    monkeypatch.setattr(parallel, "size", lambda: 3)
    with pytest.raises(UserError, match=r"--tokens-per-step 32768: 64 sequences of 512 .* 3 processes; .* of 1536$"):
        training_plan(source, recipe, 10**12)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_of_the_first_step(bits, runs):
    """First moments after a step, which are gradients, are those of one process."""
    if bits == 8:
        pytest.importorskip("torchao")
        from torchao.optim.subclass_8bit import get_qmap_signed
    settings = CODES | dict(optimizer_bits=bits)
    counts = (1, 2, 4) if bits == 32 else (1, 2)
    runs.add("begun", 1, interrupted=0, **settings)
    for processes in counts:
        runs.add(f"{processes}", processes, "begun", interrupted=1, **settings)
    runs.make()
    states = [runs.state(f"{processes}") for processes in counts]
    assert len(states[0]) == {32: 40, 8: 54}[bits]
    for state in states:  # only codes, which come first, have 8-bit moments
        for name in [name.removesuffix(".codes") for name in state if name.endswith(".codes")]:
            values = torch.tensor(get_qmap_signed())[state.pop(f"{name}.codes").int()]
            scale = state.pop(f"{name}.scale").flatten()
            state[name] = values.view(len(scale), -1) * scale[:, None]
    for state in states[1:]:
        assert_same_moments(state, states[0], of_codes=0.02 if bits == 8 else GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [CODES, EIGHT_BITS], ids=["32-bit", "8-bit"])
def test_a_training_goes_on_with_other_processes(settings, runs):
    """At the same number to the same bytes; at another the losses are the same where rounding is not drawn anew."""
    if settings is EIGHT_BITS:
        pytest.importorskip("torchao")
    runs.add("begun", 1, interrupted=0, **settings)
    changes = [(2, 2), (1, 2), (2, 4)] if settings is CODES else [(2, 2), (2, 1)]
    for processes in {before for before, _ in changes}:
        runs.add(f"{processes}", processes, "begun", **settings)
    for before, after in changes:
        runs.add(f"{before}-{after}", before, "begun", interrupted=3, **settings)
        runs.add(f"{before}-{after}", after, **settings)
    runs.make()
    for before, after in changes:
        name, whole = f"{before}-{after}", f"{before}"
        if before == after:
            assert runs.bytes(name) == runs.bytes(whole) and runs.course(name) == runs.course(whole)
        elif settings is CODES:
            assert runs.course(name) == pytest.approx(runs.course(whole), rel=ROUNDING)
        else:  # up to the step at which it went on, and the loss there
            assert runs.course(name)[:5] == pytest.approx(runs.course(whole)[:5], rel=ROUNDING)


@pytest.mark.slow
def test_a_run_of_two_processes_is_extended_by_one(runs):
    settings = CODES | dict(schedule="wsd", keep_work=True)
    runs.add("short", 2, train_tokens=10 * 128, **settings)
    runs.add("long", 1, train_tokens=20 * 128, extend=str(runs.folder / "short.work"), **settings)
    runs.make()
    short, long = (runs.report(name)["stages"][1]["losses"] for name in ("short", "long"))
    assert len(short) == 10 and len(long) == 20 and long[:8] == short[:8]  # up to where the rates fell
    assert long[8] == pytest.approx(short[8], rel=ROUNDING)


@pytest.mark.slow
def test_blocks_of_two_processes(runs):
    """Errors by the summed Hessian, block-wise training, embedding and LM head.

    With rounding to the nearest level no code turns with the last digits of a Hessian; with a correction some do.
    """
    settings = dict(rounding="rtn", rotation="hadamard", refine=0, train_tokens=0)
    for processes in (1, 2):
        runs.add(f"{processes}", processes, block_tokens=6 * 512, embedding_bits=4, head_bits=4, **settings)
        runs.add(f"corrected-{processes}", processes, correction=0.5, **settings)
    runs.make()
    one, two = (runs.report(f"{processes}") for processes in (1, 2))
    for a, b in zip(one["inputs"], two["inputs"], strict=True):
        assert b["relative_output_error"] == pytest.approx(a["relative_output_error"], rel=1e-4)
    wanted, found = (runs.report(f"corrected-{processes}")["inputs"][:4] for processes in (1, 2))
    for a, b in zip(wanted, found, strict=True):
        assert b["relative_output_error"] == pytest.approx(a["relative_output_error"], rel=0.01)
    for a, b in zip(one["reconstruction"], two["reconstruction"], strict=True):
        assert len(a["losses"]) == 6
        assert b["losses"] + b["held_out_loss"] == pytest.approx(a["losses"] + a["held_out_loss"], rel=1e-4)
    for a, b in zip(one["embeddings"], two["embeddings"], strict=True):
        assert b["relative_error"] == pytest.approx(a["relative_error"], rel=1e-4)


@pytest.mark.slow
def test_text_of_two_processes(runs):
    """The first process writes it, text of the model too; all train on it."""
    settings = dict(rounding="rtn", rotation="hadamard", refine=0, mix=f"{runs.base['dataset']}:1,self:1")
    for processes in (1, 2):
        runs.add(f"{processes}", processes, keep_work=True, **settings)
    runs.make()
    rows = [(runs.folder / f"{processes}.work" / "text" / "rows.int32").read_bytes() for processes in (1, 2)]
    assert rows[0] == rows[1] and runs.course("2") == pytest.approx(runs.course("1"), rel=1e-4)


@pytest.mark.slow
def test_passes_and_recomputation_of_two_processes(runs, model, monkeypatch):
    """Gradients of several passes are added up in their shards; recomputed layers gather their codes again."""
    settings = CODES | dict(tokens_per_step=256, train_tokens=6 * 256, optimizer_bits=32)
    runs.add("begun", 1, interrupted=0, **settings)
    recipe = make_recipe("fast", {key: value for key, value in (SMALL | settings).items() if key not in RUN})
    source, budget, plans = SourceModel(str(model), torch.device("cpu"), "float32"), 10**10, []
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(parallel, "size", lambda: 2)
        while True:
            plans.append(training_plan(source, recipe, budget))
            budget = plans[-1].memory_bytes - 1
    assert plans[-1].recompute and plans[-1].micro_batch == 1
    chosen = {(plan.recompute, plan.micro_batch): plan for plan in plans}
    chosen = {f"{recompute}-{batch}": chosen[recompute, batch] for recompute, batch in ((False, 2), (True, 1))}
    runs.add("one", 1, "begun", interrupted=1, **settings)
    budgets = {name: dict(memory_budget=(plan.memory_bytes + 1) / 1e9) for name, plan in chosen.items()}
    for name, budget in budgets.items():
        runs.add(name, 2, "begun", interrupted=1, **budget, **settings)
    runs.make()
    for name in chosen:
        assert_same_moments(runs.state(name), runs.state("one"))
    for name, budget in {"one": {}, **budgets}.items():
        runs.add(name, 1 if name == "one" else 2, **budget, **settings)
    runs.make()
    for name, plan in chosen.items():
        assert runs.report(name)["stages"][1]["plan"] == plan.to_dict()
        course, wanted = runs.course(name), runs.course("one")
        assert course[:3] == pytest.approx(wanted[:3], rel=ROUNDING)  # rounded, and the first two steps
        assert course == pytest.approx(wanted, rel=DRIFT)


@pytest.mark.slow
def test_frozen_codes_and_layers_that_do_not_compile(runs):
    """Plain data parallelism; and a pass that fails in the middle of a layer leaves no codes gathered."""
    uncompiled = CODES | dict(compile="on")
    runs.add("begun", 1, interrupted=0, **uncompiled)
    runs.add("frozen-begun", 1, interrupted=0)
    for processes in (1, 2):
        runs.add(f"{processes}", processes, "begun", **uncompiled)
        runs.add(f"frozen-{processes}", processes, "frozen-begun")
    runs.make()
    assert "decoder layers are not compiled: no compiler here" in (runs.folder / "2.log").read_text()
    for name in ("", "frozen-"):
        assert runs.course(f"{name}2") == pytest.approx(runs.course(f"{name}1"), rel=ROUNDING)


@pytest.mark.slow
def test_torchrun(model, text, tmp_path):
    """The command itself: one result, one line of an error, and its exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    call = [*torchrun, "-m", "bq_calibration", str(model), "-o", str(tmp_path / "out"), "--dataset", str(text), *flags]
    call += ["--device", "cpu", "--no-plots"]
    ended = subprocess.run(call, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("bits per weight") == 1 and (tmp_path / "out" / "config.json").exists()
    assert ended.stderr.count("block 1 of 2") == 1 and not list(tmp_path.glob("out.partial"))
    wrong = [*call, "--tokens-per-step", "96", "-o", str(tmp_path / "no")]
    ended = subprocess.run(wrong, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.count("error: ") == 1, ended.stderr[-3000:]
    assert "error: --tokens-per-step 96: 3 sequences of 32 tokens" in ended.stderr and not (tmp_path / "no").exists()
