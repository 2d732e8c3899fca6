"""Greedy answers with their log-probabilities, and how two answers are compared."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

TOKENS = 4
BLOCK = 32  # tokens of a block of the prefix cache
BEGINNING = list(range(40, 40 + 3 * BLOCK))
# long ones: together they are more tokens than the GEMM kernel takes, and what follows is often a token that they hold,
# which n-gram speculation needs
PROMPTS = [
    [*BEGINNING, *range(136, 156), 3],
    [7, 8, 9] * 3,
    [5, 9, 100, 33],
    [200],
    [*BEGINNING, *range(200, 220), 11, 12],
    [11, 12, 13, 14] * 2,
    list(range(250, 130, -1)),
    [250, 4, 17],
]
ALONE = 1  # prompts that are also asked by themselves


def load(folder: Path, multimodal: bool, dtype: str):
    """A model in transformers."""
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@torch.no_grad()
def generate(model) -> list[dict]:
    """Greedy answers to all prompts: tokens, log-probabilities, margins to the second token, those of the prompt."""
    answers = []
    for prompt in PROMPTS:
        tokens, logprobs, margins, of_prompt = list(prompt), [], [], []
        for _ in range(TOKENS):
            steps = model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            if not logprobs:
                following = torch.tensor(prompt[1:], dtype=torch.int64)
                of_prompt = steps[:-1].gather(1, following[:, None])[:, 0].tolist()
            (first, second), (token, _) = steps[-1].topk(2)
            tokens.append(int(token))
            logprobs.append(float(first))
            margins.append(float(first - second))
        found = {"tokens": tokens[len(prompt) :], "logprobs": logprobs, "margins": margins, "prompt": of_prompt}
        answers.append(found)
    return answers


def error_bound(dtype: str, wanted: list[dict], sums: int = 16) -> float:
    """The largest error of a log-probability that a dtype explains.

    Two terms, relative to the largest log-probability: weights and activations are rounded to the dtype, and sums of
    float32 have another order than those of the reference, which counts `sums` times.
    """
    rounding = 4 * torch.finfo(getattr(torch, dtype)).eps + sums * torch.finfo(torch.float32).eps
    return rounding * max(abs(value) for answer in wanted for value in (*answer["logprobs"], *answer["prompt"]))


def compare(found: list[dict], wanted: list[dict], bound: float) -> dict:
    """Whether answers are the wanted ones.

    Log-probabilities may differ by the bound. A token may differ only where the two likeliest tokens are within twice
    the bound; behind it the texts differ, and are not compared.

    Args:
        found: answers to the first prompts.
        wanted: answers to all prompts, with margins.
        bound: of a log-probability.

    Returns:
        `passed`, the largest `error`, the number of equal `tokens`, of `ties` and of values `outside` the bound.
    """
    errors, tokens, ties, wrong = [], 0, 0, 0
    for one, other in zip(found, wanted[: len(found)], strict=True):
        if one["prompt"]:
            errors += [abs(a - b) for a, b in zip(one["prompt"], other["prompt"], strict=True)]
        for token, logprob, *expected in zip(
            *(one[key] for key in ("tokens", "logprobs")),
            *(other[key] for key in ("tokens", "logprobs", "margins")),
            strict=True,
        ):
            if token != expected[0]:
                ties += 1
                wrong += not expected[2] < 2 * bound
                break
            tokens += 1
            errors.append(abs(logprob - expected[1]))
    wrong += sum(not error <= bound for error in errors)  # NaN is wrong
    found = {"error": max(errors), "bound": bound, "tokens": tokens, "ties": ties, "outside": wrong}
    return {"passed": not wrong} | found
