"""Runs cases of the matrix: every computation of a checkpoint against a dense model that is decoded independently."""

from __future__ import annotations

import re
import time
from pathlib import Path

import bq_calibration.hf  # noqa: F401 teaches transformers the format
from bq_calibration.errors import UserError

from ..calibration.conftest import MULTIMODAL_CONFIGS
from ..vllm import tiny
from ..vllm.engine import ONE_PROCESS, run_engines
from .answers import ALONE, BLOCK, PROMPTS, TOKENS, compare, error_bound, generate, load
from .checkpoints import (
    architecture_of,
    decode,
    write_adapter,
    write_checkpoint,
    write_dense,
    write_other,
    write_source,
)
from .matrix import LATENT, MIXTURES, ON, REFUSALS, default_case
from .pairwise import Case

BACKENDS = {"vLLM dense": "dense", "vLLM Triton": "triton"}
TIMEOUT = 3600  # seconds for a process; its engines are many and a machine may be busy


class Prepared:
    """The folders of a case, and the answers of transformers.

    Args:
        case: of the matrix.
        folder: empty.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        folder.mkdir()
        self.source = write_source(folder / "source", case)
        self.checkpoint = write_checkpoint(folder / "checkpoint", self.source, case)
        self.dense = decode(self.checkpoint)
        self.wanted = {"base": self.reference("dense", self.dense)}
        if case["LoRA"] == ON:
            self.adapter = write_adapter(folder / "adapter", self.checkpoint, self.dense)
            self.wanted["lora"] = self.reference("merged", tiny.merge_lora(self.dense, self.adapter))
        if case["reload_weights"] == ON:
            self.other = write_other(folder / "other", self.checkpoint)
            self.wanted["reload 0"] = self.reference("other dense", decode(self.other))

    def model(self, folder: Path, dtype: str):
        """A folder's model in transformers."""
        return load(folder, architecture_of(self.case) in MULTIMODAL_CONFIGS, dtype)

    def reference(self, name: str, state: dict) -> list[dict]:
        """Answers of a dense model, in float32."""
        return generate(self.model(write_dense(self.folder / name, self.source, state), "float32"))

    def check(self, found: list[dict], wanted: list[dict]) -> dict:
        """Compare answers within the bound of the case's dtype; a mixture sums over experts too."""
        sums = 32 if architecture_of(self.case) in MIXTURES else 16
        return compare(found, wanted, error_bound(self.case["dtype"], wanted, sums))

    def by_transformers(self) -> dict[str, dict]:
        """Checks of the packed checkpoint and of the model that it dequantizes to."""
        model, wanted = self.model(self.checkpoint, self.case["dtype"]), self.wanted["base"]
        packed = self.check(generate(model), wanted)
        return {
            "transformers packed": packed,
            "transformers dequantized": self.check(generate(model.dequantize()), wanted),
        }

    def job(self, backend: str) -> dict:
        """The job of an engine with one of our backends."""
        job = engine_job(self.checkpoint, self.case, backend)
        if self.case["LoRA"] == ON:
            job["lora"] = str(self.adapter)
        if self.case["reload_weights"] == ON:
            job["reload"] = [str(self.other)]
        return job

    def of_engine(self, name: str, answer: dict) -> dict[str, dict]:
        """Checks of what an engine has answered."""
        if "error" in answer:
            return {f"{name}, batch 1": {"passed": False, "message": answer["error"]}}
        wanted = self.wanted["base"]
        checks = {
            f"{name}, batch 1": self.check(answer["alone"], wanted),
            f"{name}, batch 8": self.check(answer["base"], wanted),
        }
        for title, key in {"LoRA": "lora", "reload_weights": "reload 0"}.items():
            if key in answer:
                checks[f"{name}, {title}"] = self.check(answer[key], self.wanted[key])
        counts = {"prefix caching": sum(one["cached"] for one in answer["base"])}
        counts["n-gram speculation"] = answer.get("drafted", 0)
        for title, count in counts.items():
            if self.case[title] == ON:  # else a setting without an effect would pass
                checks[f"{name}, {title}"] = {"passed": count > 0, "tokens": count}
        return checks


def engine_job(checkpoint: Path, case: Case, backend: str) -> dict:
    """A job for `run_engines` with a case's settings of vLLM."""
    options = {"dtype": case["dtype"], "tensor_parallel_size": case["tensor parallel"], "max_num_seqs": len(PROMPTS)}
    options |= {"enable_prefix_caching": case["prefix caching"] == ON, "block_size": BLOCK}
    if case["chunked prefill"] == ON:
        options["max_num_batched_tokens"] = 32
    if case["n-gram speculation"] == ON:
        options["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 3}
        options["speculative_config"] |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
        options["disable_log_stats"] = False  # the count of drafts
    if case["LoRA"] == ON:
        options |= {"enable_lora": True, "max_lora_rank": 8}
    if case["sleep mode"] == ON:
        options["enable_sleep_mode"] = True
    if architecture_of(case) in MULTIMODAL_CONFIGS:
        options["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    if architecture_of(case) in LATENT:
        # vLLM 0.32's CPU kernel for rotary embeddings of neighbouring features is wrong beyond the first head
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    variables = {"BQ_VLLM_BACKEND": backend}
    variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(case["tensor parallel"])))
    job = {"model": str(checkpoint), "prompts": PROMPTS, "max_tokens": TOKENS, "alone": ALONE, "fails": True}
    return job | {"options": options, "variables": variables}


def _answers(folder: Path, jobs: list[dict]) -> tuple[list[dict], str]:
    return run_engines(folder, jobs, TIMEOUT, TRITON_INTERPRET="1", **ONE_PROCESS)


def run_cases(cases: list[Case], folder: Path) -> list[dict]:
    """Outcomes of cases, whose engines share a process: values, checks by name, seconds."""
    started = time.monotonic()
    prepared = [Prepared(case, folder / str(number)) for number, case in enumerate(cases)]
    checks = [one.by_transformers() for one in prepared]
    answers, _ = _answers(folder, [one.job(backend) for one in prepared for backend in BACKENDS.values()])
    for number, one in enumerate(prepared):
        for place, name in enumerate(BACKENDS):
            checks[number] |= one.of_engine(name, answers[number * len(BACKENDS) + place])
    seconds = (time.monotonic() - started) / len(cases)
    return [
        {"values": case, "checks": found, "seconds": round(seconds, 1)}
        for case, found in zip(cases, checks, strict=True)
    ]


def run_refusals(folder: Path) -> list[dict]:
    """Outcomes of values that do not go together: the line that refuses them, or what else has happened."""
    errors, jobs = {}, {}
    for number, refusal in enumerate(REFUSALS):
        case, place = default_case() | refusal.values, folder / str(number)
        place.mkdir()
        try:
            checkpoint = write_checkpoint(place / "checkpoint", write_source(place / "source", case), case)
            jobs[number] = engine_job(checkpoint, case, "dense")
        except UserError as error:
            errors[number] = str(error)
    answers, printed = _answers(folder, list(jobs.values()))
    errors |= {number: answer["error"] for number, answer in zip(jobs, answers, strict=True) if "error" in answer}
    outcomes = []
    for number, refusal in enumerate(REFUSALS):
        error = errors.get(number, "an engine starts")
        lines = [line for line in f"{error}\n{printed}".splitlines() if refusal.message in line]
        message = re.sub(r"^.*(Error: |\] )", "", lines[0]) if lines else error
        refused = bool(lines) and (number in errors) != refusal.ignored
        outcomes.append({"values": refusal.values, "by": refusal.by, "passed": refused, "message": message.strip()})
    return outcomes
