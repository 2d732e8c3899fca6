"""Calibration text that the model itself writes: no data needed, and in the words that the model will be asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from rich.progress import Progress

from .errors import UserError

BATCH = 32  # documents that are sampled together
REQUESTS = (
    "Explain {} in simple words.",
    "Tell me a short story about {}.",
    "What should a beginner know about {}?",
    "Write a letter to a friend about {}.",
    "Give me some practical advice on {}.",
    "Describe {} to somebody who has never seen it.",
)
TOPICS = [
    "the sea",
    "bread",
    "a long journey by train",
    "how plants grow",
    "music",
    "a village in winter",
    "computers",
    "saving money",
    "the invention of the wheel",
    "healthy food",
    "the moon",
    "learning a language",
    "birds",
    "rivers",
    "an old friend",
    "good manners",
    "the human heart",
    "bridges",
    "a lost key",
    "the weather",
    "mathematics",
    "gardens",
    "photography",
    "the city of Paris",
    "tea",
    "fire",
    "a clever fox",
    "sleep",
    "maps",
    "electricity",
    "clothes",
    "chess",
]


@torch.no_grad()
def sample_text(model, tokenizer, samples: int, seqlen: int, seed: int, progress: Progress) -> torch.Tensor:
    """Windows of text that a model samples at temperature 1.

    Every other batch of documents answers requests, where the tokenizer has a chat template; the others begin at BOS.
    Documents that end are followed by the next one.

    Args:
        model: a transformers causal LM, loaded whole.
        tokenizer: the model's.
        samples: windows.
        seqlen: tokens per window.
        seed: of the sampling.
        progress: shows a bar.

    Returns:
        int64 [samples, seqlen].

    Raises:
        UserError: if the tokenizer has no token to start from.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("--dataset self: the tokenizer has neither BOS nor EOS to start from; give a text file")
    torch.manual_seed(seed)
    asked, chat, stream = requests(), tokenizer.chat_template is not None, []
    task = progress.add_task("sampling text from the model", total=samples * seqlen)
    for number in itertools.count():
        if len(stream) >= samples * seqlen:
            break
        prompts = [[start]] * BATCH
        if chat and number % 2 == 0:
            prompts = [chat_prompt(tokenizer, next(asked)) for _ in range(BATCH)]
        documents = _continue(model, prompts, seqlen, start, tokenizer.eos_token_id)
        stream += [token for document in documents for token in document]
        progress.update(task, completed=min(len(stream), samples * seqlen))
    progress.remove_task(task)
    return torch.tensor(stream[: samples * seqlen]).view(samples, seqlen)


def requests() -> Iterator[str]:
    """What a model is asked for, without end."""
    pairs = zip(itertools.cycle(REQUESTS), itertools.cycle(TOPICS), strict=True)  # both change from one to the next
    return (request.format(topic) for request, topic in pairs)


def chat_prompt(tokenizer, request: str) -> list[int]:
    """Tokens of a request as the chat template has it, up to where the answer begins."""
    message = [{"role": "user", "content": request}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)


def _continue(model, prompts: list[list[int]], most: int, padding: int, end: int | None) -> list[list[int]]:
    """Prompts with a continuation of at most `most` tokens each, up to the token that ends a document."""
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": most}
    rows = model.generate(ids, attention_mask=mask, pad_token_id=padding, eos_token_id=end, **sampling).tolist()
    documents = []
    for prompt, row in zip(prompts, rows, strict=True):
        answer = row[width:]
        if end is not None and end in answer:
            answer = answer[: answer.index(end) + 1]
        documents.append(prompt + answer)
    return documents
