"""The steps of a lease, most important first: what each measures, its command, its time, and what it needs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_TABLE = ROOT / "kernels" / "bq_kernels" / "launch.json"
GPU = "a GPU"
VLLM_ROWS = "fp16,butterfly-128,vllm-w4,no-rotation,butterfly-128-norm,hadamard-128,butterfly-full"
MINUTES = "{minutes}"  # in a command: what the step has of time, less what it needs to write its results


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: short, for --only.
        purpose: what it finds out.
        command: its arguments; MINUTES is replaced by its time.
        seconds: it is stopped then.
        least: with less time left it is not begun.
        needs: GPU, names of packages and programs, and files.
        result: JSON file that it writes.
        keeps: a file that it changes outside the output folder, to be copied there.
    """

    name: str
    purpose: str
    command: tuple[str, ...]
    seconds: int
    least: int
    needs: tuple[str | Path, ...] = ()
    result: Path | None = None
    keeps: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What the steps of a lease depend on.

    Attributes:
        out: folder of all results.
        rehearse: tiny shapes, on a CPU too.
        checkpoint: for the comparison with transformers; by default the one that the step `calibration` makes.
        text: what the comparison reads; by default what that step's model has sampled.
        model: 16-bit model to train; by default that step's, which is random.
        mix: its text, as for `bq-calibrate --mix`.
        tests: texts for its perplexity.
    """

    out: Path
    rehearse: bool = False
    checkpoint: Path | None = None
    text: Path | None = None
    model: Path | None = None
    mix: str = "self"
    tests: str = "wikitext2,c4"

    def script(self, name: str, *arguments: object) -> tuple[str, ...]:
        """A call of a script in benchmarks/."""
        return (sys.executable, str(ROOT / "benchmarks" / name), *map(str, arguments))

    def kernels(self, command: str, *arguments: object, result: bool = True, timed: bool = True) -> tuple[str, ...]:
        """A call of kernels.py, on tiny shapes in a rehearsal."""
        smoke = ("--smoke",) if self.rehearse else ()
        as_json = ("--json", self.out / f"{command}.json") if result else ()
        minutes = ("--minutes", MINUTES) if timed else ()
        return self.script("kernels.py", command, *arguments, *smoke, *as_json, *minutes)


def _kernel_steps(plan: Plan) -> list[Step]:
    gpu = () if plan.rehearse else (GPU,)
    tests = ROOT / "tests" / "kernels"
    files = [tests / f"test_{name}.py" for name in ("triton", "dense", "int8", "norm")]
    chosen = [tests / "test_ops.py"] if plan.rehearse else ["-k", "not interpreter", *files]
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, chosen))

    def table(name: str, purpose: str, seconds: int, least: int, *arguments: str, timed: bool = True) -> Step:
        """A call of kernels.py that writes its JSON; `arguments` begin with its command where that has another name."""
        call = arguments or (name,)
        return Step(name, purpose, plan.kernels(*call, timed=timed), seconds, least, gpu, plan.out / f"{call[0]}.json")

    return [
        Step("tests", "kernel tests on this GPU", pytest, 90, 20, (*gpu, "pytest")),
        table("errors", "errors of the kernels against float64 on the shapes of LLaMA-2-7B", 60, 20),
        Step(
            name="tune",
            purpose="best launches, for launch.json",
            command=plan.kernels("tune", result=False),
            seconds=90,
            least=40,
            needs=gpu,
            keeps=None if plan.rehearse else LAUNCH_TABLE,
        ),
        table(
            "kernels",
            "times of one layer beside floor, cuBLAS and peers",
            120,
            40,
            *("run", "--shapes", "square,llama2-7b"),
        ),
        table("layer", "linears of a decoder layer in a CUDA graph, by kernel", 45, 20, timed=False),
        table("vocabulary", "LM heads and look-ups of embeddings in 4 bits", 60, 20),
        table("mixture", "MLPs of mixtures of experts", 60, 20),
    ]


def _serving(plan: Plan) -> Step:
    smoke = ("--smoke", "--runs", 1, "--rows", "fp16,butterfly-128", "--batches", 2)
    real = ("llama2-7b", "--rows", VLLM_ROWS, "--batches", "1,8,64")
    result = plan.out / "serving.json"
    common = ("--parts", "latency,prefill", "--resume", "--minutes", MINUTES, "--json", result)
    return Step(
        name="serving",
        purpose="tokens/s in vLLM and a prefill, row by row",
        command=plan.script("serving.py", *(smoke if plan.rehearse else real), *common, "--work", plan.out / "serving"),
        seconds=540,
        least=90,
        needs=("vllm",) if plan.rehearse else (GPU, "vllm"),
        result=result,
    )


def _training(plan: Plan, name: str, purpose: str, rungs: str, **changed: object) -> Step:
    """A ladder of tokens on a real model; in a rehearsal on the random one of the step `calibration`."""
    work, result = plan.out / "calibration", plan.out / f"{name}.json"
    model, text = plan.model or work / "fp16", work / "text.txt"
    changes = {"dataset": plan.mix, "mix": plan.mix} | changed
    windows: tuple[object, ...] = ()
    if plan.rehearse:
        changes |= {"dataset": text, "mix": text, "samples": 4, "seqlen": 32, "held_out": 2, "tokens_per_step": 128}
        windows = ("--context", 32, "--windows", 2)
    settings = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    rungs, tests = ("1k,2k", text) if plan.rehearse else (rungs, plan.tests)
    common = ("--recipe", "max", "--rungs", rungs, "--perplexity", tests, *windows, "--minutes", MINUTES)
    return Step(
        name=name,
        purpose=purpose,
        command=plan.script(
            "ladder.py", model, *common, *settings, "--out", plan.out / f"{name}-ladder", "--json", result
        ),
        seconds=540,
        least=120,
        needs=(model, text) if plan.rehearse else (GPU, plan.model or "--model, --mix and --tests"),
        result=result,
    )


def _model_steps(plan: Plan) -> list[Step]:
    gpu, out, work = (() if plan.rehearse else (GPU,)), plan.out, plan.out / "calibration"
    smoke = ("smoke", "--blocks", 1, "--device", "cpu", "--samples", 4, "--seqlen", 64)
    shape = smoke if plan.rehearse else ("llama2-7b", "--blocks", 2, "--device", "cuda")
    checkpoint, text = plan.checkpoint or work / "bq2", plan.text or work / "text.txt"
    windows = ("--context", 64, "--windows", 2) if plan.rehearse else ("--context", 512, "--windows", 4)
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    tiny = plan.script("kernels.py", "errors", "--smoke", "--json", out / "sanitizer.json")
    return [
        _serving(plan),
        Step(
            name="calibration",
            purpose="time and memory of calibrating two decoder layers of LLaMA-2-7B",
            command=plan.script("calibration_cost.py", *shape, "--work", work, "--json", out / "calibration.json"),
            seconds=120,
            least=40,
            needs=gpu,
            result=out / "calibration.json",
        ),
        _training(plan, "training", "perplexity by tokens of end-to-end training", "4M,12M,30M"),
        _training(plan, "rotation", "the same with a learned rotation", "12M", rotation="butterfly"),
        Step("sanitizer", "every kernel under compute-sanitizer", (*sanitizer, *tiny), 90, 30, (GPU, sanitizer[0])),
        Step(
            name="parity",
            purpose="perplexity in vLLM beside transformers",
            command=plan.script("parity.py", checkpoint, "--perplexity", text, *windows, "--json", out / "parity.json"),
            seconds=120,
            least=60,
            needs=(*gpu, "vllm", checkpoint, text),
            result=out / "parity.json",
        ),
    ]


def steps(plan: Plan) -> list[Step]:
    """All steps, most important first."""
    return [*_kernel_steps(plan), *_model_steps(plan)]
