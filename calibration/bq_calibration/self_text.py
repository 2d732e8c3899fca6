"""Text that the model itself writes: no data needed, and in the words that the model will be asked for.

A batch is as many windows of text as are decoded together. When a document of a window ends, the next one begins in its
place, so that no window waits for another; what stands before it is masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import Progress
from transformers import DynamicCache, PreTrainedModel, StaticCache

from .errors import UserError
from .grouped_attention import GROUPED
from .model import SourceModel
from .sampling import derive_seed
from .skeleton import auto_class

TEMPERATURES = (1.0, 0.8)  # of every other window
# windows that are decoded together: on a CPU twice as many gain 15 %, on a GPU the weights are read for more of them
_MOST_ROWS = {"cpu": 32, "cuda": 1024}
_CPU_CACHE = 2**32  # bytes of keys and values at most
_TOKENS_PER_PROMPT = 64  # a window has prompts for documents of so many tokens, and then takes the first again
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


@dataclass(frozen=True)
class Prompt:
    """The tokens from which a document goes on; with `fresh` unset they belong to the document in front of them."""

    tokens: list[int]
    fresh: bool = True


def requests() -> Iterator[str]:
    """What a model is asked for, without end; the first 192 differ."""
    return (request(number) for number in itertools.count())


def request(number: int) -> str:
    """The request of that number: both its wording and its topic change from one to the next."""
    turns = number // 96  # after which wordings and topics would pair up as before
    return REQUESTS[number % len(REQUESTS)].format(TOPICS[(number + turns) % len(TOPICS)])


def chat_prompt(tokenizer, text: str) -> list[int]:
    """Tokens of a request as the chat template has it, up to where the answer begins."""
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)


def dialogue_prompts(tokenizer, ends: list[int]) -> list[Prompt]:
    """Prompts of a chat in which the model speaks for both sides, the user first (Magpie, arXiv 2406.08464).

    The second one, from the end of the user's turn to the answer, is there if that turn ends at a token of `ends`.
    """
    mark = "\N{SNOWMAN}"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    opening, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(mark, maxsplit=1))
    ended = answer[:1] and answer[0] in ends
    return [Prompt(opening), Prompt(answer[1:], fresh=False)] if ended else [Prompt(opening)]


def draw(logits: torch.Tensor, temperatures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token per row from softmax(logits / temperature).

    By the inverse of the cumulative distribution: torch.multinomial draws a number per token of the vocabulary, which
    takes 1 ms per row on a CPU.

    Args:
        logits: [rows, vocabulary].
        temperatures: [rows, 1].
        generator: on the device of `logits`.

    Returns:
        int64 [rows].
    """
    sums = (logits.float() / temperatures).softmax(-1).cumsum(-1, dtype=torch.float64)
    point = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, point, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


class _Windows:
    """The windows of a batch while they are written: their tokens, and which of them the next token may see.

    Everything stays on the device; no step waits for it.

    Args:
        prompts: of every window, in turn.
        ends: tokens that end a document.
        seqlen: tokens per window.
        seed: of the drawing.
        device: of the model.

    Attributes:
        tokens: int64 [rows, seqlen].
        visible: bool [rows, seqlen], unset in front of the document that is being written.
    """

    def __init__(self, prompts: list[list[Prompt]], ends: list[int], seqlen: int, seed: int, device: torch.device):
        rows, turns = len(prompts), len(prompts[0])
        width = max(1, *(len(prompt.tokens) for row in prompts for prompt in row))
        table = torch.zeros(rows, turns, width, dtype=torch.int64)
        for r, row in enumerate(prompts):
            for turn, prompt in enumerate(row):
                table[r, turn, : len(prompt.tokens)] = torch.tensor(prompt.tokens, dtype=torch.int64)
        self._table = table.to(device)
        self._lengths = torch.tensor([[len(prompt.tokens) for prompt in row] for row in prompts], device=device)
        self._fresh = torch.tensor([[prompt.fresh for prompt in row] for row in prompts], device=device)
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        temperatures = [TEMPERATURES[r % len(TEMPERATURES)] for r in range(rows)]
        self._temperatures = torch.tensor(temperatures, device=device)[:, None]
        self._generator = torch.Generator(device).manual_seed(seed)
        self._rows, self._columns = torch.arange(rows, device=device), torch.arange(seqlen, device=device)
        # of every window: which prompt, how many of its tokens are placed, whether the last token was drawn
        self._turn, self._placed = torch.zeros_like(self._rows), torch.ones_like(self._rows)
        self._drawn = torch.zeros_like(self._rows, dtype=torch.bool)
        self.tokens = torch.zeros(rows, seqlen, dtype=torch.int64, device=device)
        self.tokens[:, 0] = self._table[:, 0, 0]
        self.visible = torch.ones(rows, seqlen, dtype=torch.bool, device=device)

    def add(self, position: int, logits: torch.Tensor) -> None:
        """Write the tokens at a position: the next one of a prompt, or one drawn from logits [rows, vocabulary]."""
        ended = self._drawn & torch.isin(self.tokens[:, position - 1], self._ends)
        self._turn = (self._turn + ended) % self._table.shape[1]
        self._placed = self._placed.masked_fill(ended, 0)
        begins = ended & self._fresh[self._rows, self._turn]
        self.visible &= ~begins[:, None] | (self._columns >= position)
        self._drawn = self._placed >= self._lengths[self._rows, self._turn]
        given = self._table[self._rows, self._turn, self._placed.clamp(max=self._table.shape[2] - 1)]
        drawn = draw(logits, self._temperatures, self._generator)
        self.tokens[:, position] = torch.where(self._drawn, drawn, given)
        self._placed = self._placed + 1


class TextWriter:
    """Lets a model write windows of text, a batch at a time; every batch has a seed of its own.

    Windows take turns in temperature (TEMPERATURES), their documents in kind: one that begins at BOS, and where the
    tokenizer has a chat template an answer to a request, and a chat of which the model writes both sides. With
    `prefixes`, some go on from the first tokens of real texts.

    Args:
        model: a transformers causal LM, loaded whole with the attention GROUPED.
        tokenizer: the model's.
        seqlen: tokens per window.
        seed: of the run.
        prefixes: tokens of real texts for a batch, by its number and how many.

    Raises:
        UserError: if the tokenizer has no token to start from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        seqlen: int,
        seed: int,
        prefixes: Callable[[int, int], Iterable[list[int]]] | None = None,
    ):
        self.model, self.tokenizer, self.seqlen, self.seed, self.prefixes = model, tokenizer, seqlen, seed, prefixes
        self.start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.start is None:
            raise UserError("text of the model itself: the tokenizer has neither BOS nor EOS to start from; give files")
        configured = model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        self.ends = sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})
        self.rows = rows_per_batch(model, seqlen)
        # on a GPU one graph per step instead of a thousand kernels; on a CPU a cache that grows is read faster
        static = model.device.type == "cuda"
        self._cache = StaticCache(config=model.config, max_cache_len=seqlen) if static else None

    @classmethod
    def of(
        cls,
        source: SourceModel,
        seqlen: int,
        seed: int,
        prefixes: Callable[[int, int], Iterable[list[int]]] | None = None,
    ) -> TextWriter:
        """A writer with the 16-bit model, which it holds in memory whole."""
        kind = auto_class(source.config.model_type)
        attention = GROUPED if source.skeleton._supports_sdpa else None  # gpt-oss has attention of its own
        model = kind.from_pretrained(source.folder, dtype=source.dtype, attn_implementation=attention)
        return cls(model.to(source.device).eval(), source.tokenizer(), seqlen, seed, prefixes)

    @torch.no_grad()
    def write(self, number: int, progress: Progress) -> torch.Tensor:
        """The windows of one batch.

        Args:
            number: of the batch; the same one has the same text.
            progress: shows a bar.

        Returns:
            int64 [rows, seqlen], on the CPU.
        """
        seed = derive_seed(self.seed, number)
        windows = _Windows(self._prompts(number), self.ends, self.seqlen, seed, self.model.device)
        cache = self._cache
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        else:
            cache.reset()
        task = progress.add_task(f"text of the model itself, batch {number + 1}", total=self.seqlen, completed=1)
        for position in range(1, self.seqlen):
            # the first step makes the cache: only those behind it can be one graph
            forward = self.model if self._cache is None or position == 1 else self.model.get_compiled_call(None)
            last = windows.tokens[:, position - 1 : position].contiguous()
            output = forward(input_ids=last, attention_mask=windows.visible, past_key_values=cache, use_cache=True)
            windows.add(position, output.logits[:, -1])
            progress.advance(task)
        progress.remove_task(task)
        return windows.tokens.cpu()

    def close(self) -> None:
        """Give the memory of a GPU back, once the text is written."""
        if self._cache is not None:
            del self.model, self._cache
            torch._dynamo.reset()  # captured graphs keep their memory as long as they are known
            torch.cuda.empty_cache()

    def _prompts(self, number: int) -> list[list[Prompt]]:
        """Prompts for every window of a batch, as many for each."""
        turns = 1 + self.seqlen // _TOKENS_PER_PROMPT
        real = iter(self.prefixes(number, self.rows * turns)) if self.prefixes else None
        asked = itertools.count(number * self.rows * turns)
        kinds: list[Callable[[], list[Prompt]]] = [lambda: [Prompt([self.start])]]
        if self.tokenizer.chat_template is not None:
            dialogue = dialogue_prompts(self.tokenizer, self.ends)
            kinds += [lambda: [Prompt(chat_prompt(self.tokenizer, request(next(asked))))], lambda: dialogue]
        if real is not None:
            kinds.append(lambda: [Prompt(next(real) or [self.start])])
        windows = []
        for row in range(self.rows):
            chosen = (kinds[n % len(kinds)]() for n in itertools.count(row // len(TEMPERATURES)))
            prompts = list(itertools.islice(itertools.chain.from_iterable(chosen), turns))
            windows.append([Prompt(prompt.tokens[: self.seqlen // 2], prompt.fresh) for prompt in prompts])
        return windows


def rows_per_batch(model: PreTrainedModel, seqlen: int) -> int:
    """Windows that are decoded together: a power of two, by the memory that keys, values and logits take.

    It depends on the model, `seqlen` and the device, not on what else the device does, so that a run can be repeated.
    """
    config, device = model.config.get_text_config(), model.device
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize * seqlen
    row += config.vocab_size * 32  # logits and their sums
    budget = _CPU_CACHE
    if device.type == "cuda":
        weights = sum(parameter.nbytes for parameter in model.parameters())
        budget = torch.cuda.get_device_properties(device).total_memory // 2 - weights
    most = min(_MOST_ROWS.get(device.type, 32), budget // row)
    return 1 << max(0, most.bit_length() - 1) if most > 0 else 1


def sample_text(source: SourceModel, samples: int, seqlen: int, seed: int, progress: Progress) -> torch.Tensor:
    """Windows of text that a model writes, see `TextWriter`; whoever asks for more gets these first.

    Args:
        source: the 16-bit model.
        samples: windows.
        seqlen: tokens per window.
        seed: of the sampling.
        progress: shows a bar.

    Returns:
        int64 [samples, seqlen].
    """
    writer = TextWriter.of(source, seqlen, seed)
    rows = torch.cat([writer.write(number, progress) for number in range(-(-samples // writer.rows))])
    writer.close()
    return rows[:samples]
