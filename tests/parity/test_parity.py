"""The first cases of the parity matrix; `python -m tests.parity` runs all of them."""

from importlib.util import find_spec

import pytest
import torch

from ..calibration.conftest import MULTIMODAL_CONFIGS
from .__main__ import PAGE, read_results
from .answers import compare
from .matrix import cases
from .page import render
from .pairwise import holds

# those that cost least: multimodal models need torchvision, two ranks more processes, chunks many interpreted steps
CHEAP = {"tensor parallel": 1, "chunked prefill": "off"}
AFFORDED = [case for case in cases() if holds(case, CHEAP) and case["architecture"] not in MULTIMODAL_CONFIGS]
SUITE = AFFORDED[:2]  # and mixtures of other names and kinds of layers than test_experts has
SUITE += [
    next(case for case in AFFORDED if case["architecture"] == name) for name in ("mixtral", "deepseek_v3", "gpt_oss")
]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="these run vLLM's CPU build")
def test_first_cases(tmp_path):
    from .run import run_cases

    for outcome in run_cases(SUITE, tmp_path):
        failed = {name: check for name, check in outcome["checks"].items() if not check["passed"]}
        assert not failed, outcome["values"]
        assert len(outcome["checks"]) >= 6


def answer(*tokens: int, logprob: float = -1.0, margin: float = 1.0) -> dict:
    many = len(tokens)
    return {"tokens": list(tokens), "logprobs": [logprob] * many, "margins": [margin] * many, "prompt": [-2.0]}


@pytest.mark.parametrize(
    ("found", "wanted", "passed", "ties"),
    [
        (answer(1, 2, logprob=-1.05), answer(1, 2), True, 0),
        (answer(1, 2, logprob=-1.2), answer(1, 2), False, 0),
        (answer(1, 2, logprob=float("nan")), answer(1, 2), False, 0),
        (answer(1, 3), answer(1, 2), False, 1),
        (answer(1, 3, 5), answer(1, 2, 4, margin=0.19), True, 1),  # the third is behind another text
    ],
)
def test_comparison(found, wanted, passed, ties):
    result = compare([found], [wanted, wanted], bound=0.1)
    assert (result["passed"], result["ties"]) == (passed, ties)


def test_page_is_that_of_the_results():
    assert PAGE.read_text() == render(read_results()), "write it with python -m tests.parity --page"
