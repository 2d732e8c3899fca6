"""Text that a model writes: documents that do not see one another, drawn from the model's distribution."""

import pytest
import torch
from bq_calibration import self_text
from bq_calibration.console import make_progress
from bq_calibration.errors import UserError
from bq_calibration.grouped_attention import grouped_attention
from bq_calibration.model import SourceModel
from bq_calibration.self_text import TextWriter, dialogue_prompts, draw, request, sample_text
from torch import nn
from transformers import StaticCache

from .conftest import CONFIGS, MULTIMODAL_CONFIGS, make_model

PROGRESS = make_progress(False)
ENDS = list(range(3, 60))  # so many that documents are short
SEQLEN = 48


def source_of(folder) -> SourceModel:
    return SourceModel(str(folder), torch.device("cpu"), "float32")


@pytest.fixture
def source(model) -> SourceModel:
    return source_of(model)


@pytest.mark.parametrize("architecture", [*CONFIGS, *MULTIMODAL_CONFIGS])
def test_documents_are_written_as_if_alone(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(self_text, "_MOST_ROWS", {"cpu": 4})
    monkeypatch.setattr(self_text, "TEMPERATURES", (100.0,))  # tiny models would repeat a token
    writer = TextWriter.of(source_of(make_model(tmp_path / architecture, architecture)), SEQLEN, 0)
    writer.ends, seen, add = ENDS, [], self_text._Windows.add

    def recorded(windows, position, logits):
        seen.append((windows.visible.int().argmax(1), logits))
        add(windows, position, logits)

    monkeypatch.setattr(self_text._Windows, "add", recorded)
    rows, starts = writer.write(0, PROGRESS), 0
    for position, (begins, logits) in enumerate(seen, 1):
        starts += int((begins == position - 1).sum())
        for row in range(0, 4, 3) if position % 4 == 0 else ():
            alone = writer.model(input_ids=rows[row : row + 1, begins[row] : position]).logits[0, -1]
            torch.testing.assert_close(logits[row], alone, atol=1e-4, rtol=1e-4)
    assert starts > 12  # four windows have begun, and many more documents


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])  # two of them with sliding windows
def test_a_static_cache_gives_the_same_text(architecture, tmp_path, monkeypatch):
    monkeypatch.setattr(self_text, "_MOST_ROWS", {"cpu": 4})
    monkeypatch.setattr(self_text, "TEMPERATURES", (100.0,))
    writer = TextWriter.of(source_of(make_model(tmp_path / architecture, architecture)), SEQLEN, 0)
    writer.ends = ENDS
    rows = writer.write(1, PROGRESS)
    writer._cache = StaticCache(config=writer.model.config, max_cache_len=SEQLEN)
    monkeypatch.setattr(writer.model, "get_compiled_call", lambda config: writer.model)
    writer.write(0, PROGRESS)
    assert torch.equal(writer.write(1, PROGRESS), rows)  # a cache that has been used is as good as a new one


def test_a_seed_gives_a_text_and_more_samples_begin_with_it(source):
    rows = sample_text(source, 40, 16, 3, PROGRESS)
    assert rows.shape == (40, 16) and rows.dtype == torch.int64
    assert torch.equal(sample_text(source, 2, 16, 3, PROGRESS), rows[:2])
    assert not torch.equal(sample_text(source, 2, 16, 4, PROGRESS), rows[:2])
    assert len({tuple(row) for row in rows.tolist()}) == 40


def test_drawing_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.5]])
    for temperature in (1.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        drawn = draw(logits.expand(20000, -1), torch.full((20000, 1), temperature), generator)
        found = torch.bincount(drawn, minlength=4) / 20000
        expected = (logits[0] / temperature).softmax(-1)
        assert found[2] == 0
        # four standard deviations of a share of 20,000
        assert bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / 20000).sqrt()).all())


def test_half_of_the_windows_are_colder(source, monkeypatch):
    """At a temperature near 0 every other window is the argmax of its logits."""
    monkeypatch.setattr(self_text, "TEMPERATURES", (1.0, 1e-6))
    monkeypatch.setattr(self_text, "_MOST_ROWS", {"cpu": 4})
    writer = TextWriter.of(source, SEQLEN, 0)
    writer.ends = [319]
    rows = writer.write(0, PROGRESS)
    greedy = writer.model(input_ids=rows[:, :-1]).logits.argmax(-1) == rows[:, 1:]
    assert greedy[1::2].float().mean() > 0.95 and greedy[::2].float().mean() < 0.9


TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def text_of(tokenizer, prompt) -> str:
    return tokenizer.decode(prompt.tokens).replace(" ", "")


def test_prompts_of_every_kind(source, monkeypatch):
    tokenizer = source.tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(self_text, "_MOST_ROWS", {"cpu": 8})
    asked = []
    writer = TextWriter.of(
        source, 256, 0, lambda number, count: asked.append((number, count)) or iter([[7, 8]] * count)
    )
    writer.tokenizer = tokenizer
    windows = writer._prompts(2)
    turns = 1 + 256 // 64
    assert asked == [(2, 8 * turns)] and [len(window) for window in windows] == [turns] * 8
    texts = [text_of(tokenizer, prompt) for window in windows for prompt in window]
    assert {"<s>", "%&", "<s>[user]", "[assistant]"} <= set(texts)
    assert any(text.startswith("<s>[user]") and text.endswith("</s>[assistant]") for text in texts)
    # the answer of a chat goes on in the user's turn; every other prompt begins a document
    assert all(p.fresh == (text_of(tokenizer, p) != "[assistant]") for window in windows for p in window)
    assert all(len(prompt.tokens) <= 128 for window in windows for prompt in window)


def test_a_chat_whose_turns_do_not_end_is_left_to_the_model(source):
    tokenizer = source.tokenizer()
    tokenizer.chat_template = "[INST]{{ messages[0]['content'] }}[/INST]"
    (opening,) = dialogue_prompts(tokenizer, [2])
    assert text_of(tokenizer, opening) == "[INST]"


def test_a_prompt_that_ends_in_an_end_is_not_taken_for_a_document(source, monkeypatch):
    monkeypatch.setattr(self_text, "_MOST_ROWS", {"cpu": 2})
    writer = TextWriter.of(source, SEQLEN, 0)
    writer.start, writer.ends = 2, [2]  # as in models whose BOS is their EOS
    rows = writer.write(0, PROGRESS)
    assert bool((rows[:, 0] == 2).all()) and bool((rows[:, 1:] != 2).any(1).all())


def test_requests_differ():
    assert len({request(number) for number in range(192)}) == 192


def test_a_tokenizer_without_a_start_is_refused(source):
    writer = TextWriter.of(source, 16, 0)
    tokenizer = source.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        TextWriter(writer.model, tokenizer, 16, 0)


def test_memory_bounds_the_windows_of_a_batch(source, monkeypatch):
    model = TextWriter.of(source, 16, 0).model
    per_row = 2 * 2 * 3 * 32 * 4 * 16 + 320 * 32
    monkeypatch.setattr(self_text, "_CPU_CACHE", 9 * per_row)
    assert self_text.rows_per_batch(model, 16) == 8
    monkeypatch.setattr(self_text, "_CPU_CACHE", per_row // 2)
    assert self_text.rows_per_batch(model, 16) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries, heads, shared, keys, width", [(1, 9, 3, 37, 32), (1, 4, 4, 1, 24), (5, 6, 2, 5, 32)])
def test_grouped_attention_is_attention(queries, heads, shared, keys, width, dtype):
    generator = torch.Generator().manual_seed(keys)
    query, key, value = (
        torch.randn(2, length, count, width, generator=generator).to(dtype).transpose(1, 2)
        for length, count in ((queries, heads), (keys, shared), (keys, shared))
    )
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // shared, False
    mask = torch.rand(2, 1, queries, keys, generator=generator) > 0.3
    mask[..., 0] = True
    full = [x.double().repeat_interleave(heads // shared, 1) for x in (key, value)]
    for given, scaling in ((None, None), (mask, 0.3)):
        wanted = nn.functional.scaled_dot_product_attention(query.double(), *full, attn_mask=given, scale=scaling)
        found, _ = grouped_attention(module, query, key, value, given, scaling=scaling)
        # each of a score, a weight and the result is rounded once; scores are below 32
        error = (found.double() - wanted.transpose(1, 2)).abs().max().item()
        assert error <= 32 * torch.finfo(dtype).eps * value.abs().max().item()
