"""The mix of texts for end-to-end training: shares, epochs, evaluation texts, and going on after an interruption."""

import functools
import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from bq_calibration import calibrate, data, self_text, training_text
from bq_calibration.console import make_progress
from bq_calibration.errors import UserError
from bq_calibration.mix import Part, parse_mix
from bq_calibration.model import SourceModel
from bq_calibration.ngrams import NgramFilter, ngram_hashes
from bq_calibration.recipes import make_recipe
from bq_calibration.training_text import MixedText, check_training_text, interleave, training_rows
from bq_calibration.workspace import Workspace
from transformers import AutoTokenizer

from .conftest import make_text

SEQLEN = 32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(self_text, "_MOST_ROWS", {"cpu": 4})
    monkeypatch.setattr(training_text, "_PIECE", 5 * SEQLEN)  # five rows


@pytest.fixture
def source(model) -> SourceModel:
    return SourceModel(str(model), torch.device("cpu"), "float32")


def workspace(folder: Path) -> Workspace:
    work = Workspace(folder / "out", resume=True)
    work.path.mkdir(parents=True, exist_ok=True)
    return work


def recipe(mix, **settings):
    return make_recipe("fast", {"mix": str(mix), "train_tokens": 1, "seqlen": SEQLEN, "held_out": 4} | settings)


def rows_of(source, folder, mix, rows, **settings) -> MixedText:
    return training_rows(source, recipe(mix, **settings), rows, workspace(folder), make_progress(False))


def write_rows(path: Path, documents) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def documents(tmp_path) -> Path:
    """A file of 40 documents without the letter z."""
    return write_rows(tmp_path / "documents.jsonl", (make_text(20 + n % 7, seed=n) for n in range(40)))


@pytest.fixture
def long_text(tmp_path) -> Path:
    """A text of lines with the letter z in every word."""
    path = tmp_path / "long.txt"
    path.write_text("\n".join(make_text(12, seed=n).replace("w", "z") for n in range(60)))
    return path


@functools.cache
def tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def text_of(source, row) -> str:
    """The text of a row, without spaces; the tiny tokenizer has a token per byte."""
    tokens = tokenizer_of(source.folder).convert_ids_to_tokens(torch.as_tensor(row).tolist())
    return "".join(tokens).replace("Ġ", "").replace("Ċ", "\n")


# ---- the mix


def test_a_mix_is_names_and_weights(documents):
    assert parse_mix("wikitext2:1,c4:2.5,self") == [Part("wikitext2", 1), Part("c4", 2.5), Part("self", 1)]
    assert parse_mix(f"{documents}:3,org/name,org/name/config:2")[1:] == [
        Part("org/name", 1),
        Part("org/name/config", 2),
    ]
    odd = documents.rename(documents.with_name("a:b.jsonl"))
    assert parse_mix(str(odd)) == [Part(str(odd), 1)] and parse_mix(f"{odd}:2") == [Part(str(odd), 2)]


@pytest.mark.parametrize(
    "mix, words",
    [
        ("c4:0", "weight above 0"),
        ("c4:-1", "weight above 0"),
        ("c4:nan", "weight above 0"),
        ("c4:inf", "weight above 0"),
        ("c4:much", "weight above 0"),
        ("c4,", "weight above 0"),
        (":2", "weight above 0"),
        ("c4:1,c4:2", "twice"),
        ("wikitext3", "use self, wikitext2"),
        ("a/b/c/d", "use self, wikitext2"),
        ("missing.jsonl:2", "no such file"),
    ],
)
def test_a_wrong_mix_is_refused(mix, words):
    with pytest.raises(UserError, match=words):
        check_training_text(recipe(mix))


def test_settings_that_do_nothing_are_refused(documents):
    with pytest.raises(UserError, match="--train-tokens"):
        check_training_text(recipe(documents, train_tokens=0))
    with pytest.raises(UserError, match="--mix"):
        check_training_text(make_recipe("fast", {"decontaminate": "c4"}))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", "", "is empty"),
        ("a.txt", " \n", "is empty"),
        ("a.jsonl", '{"txt": "a"}\n', "no column 'text' of strings"),
        ("a.jsonl", '{"text": 5}\n{"text": 6}\n', "no column 'text' of strings"),
        ("a.jsonl", "{{{", "cannot be read"),
        ("a.parquet", "PAR", "cannot be read"),
    ],
)
def test_a_dry_run_refuses_what_cannot_be_read(name, content, words, model, text, tmp_path):
    (tmp_path / name).write_text(content)
    settings = {"dataset": str(text), "samples": 4, "seqlen": SEQLEN, "train_tokens": 64, "held_out": 0}
    settings |= {"group_size": 32, "rotation_block": 32}
    for flags in ({"mix": str(tmp_path / name)}, {"mix": "self", "decontaminate": str(tmp_path / name)}):
        if "decontaminate" in flags and "strings" in words:
            words = "no column 'text'|no string"
        with pytest.raises(UserError, match=words) as caught:
            calibrate(str(model), str(tmp_path / "out"), device="cpu", dry_run=True, **settings, **flags)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 2, 4], [0.1, 3.7, 1, 1], [1e-6, 1]])
def test_rows_are_shared_out_by_weight_and_begin_the_same(weights):
    owners = interleave(weights, 700)
    shares = np.array(weights) / sum(weights)
    for rows in (1, 3, 50, 699):
        assert np.array_equal(interleave(weights, rows), owners[:rows])
        assert (abs(np.bincount(owners[:rows], minlength=len(weights)) - shares * rows) <= len(weights) / 2 + 0.5).all()


# ---- rows


def test_more_rows_begin_with_the_same(source, documents, long_text, tmp_path):
    mix = f"{documents}:1,{long_text}:2,self:1"
    few, many = (rows_of(source, tmp_path / str(rows), mix, rows) for rows in (13, 41))
    assert few.tokens.dtype == torch.int32 and many.tokens.shape == (41, SEQLEN)
    assert torch.equal(many.tokens[:13], few.tokens)
    other = rows_of(source, tmp_path / "seed", mix, 13, seed=1)
    assert not (other.tokens == few.tokens).all(1).any()
    # a longer run in the same folder goes on from the shorter one
    assert torch.equal(rows_of(source, tmp_path / "13", mix, 41).tokens, many.tokens)


def test_every_part_has_its_share(source, documents, long_text, tmp_path):
    found = rows_of(source, tmp_path, f"{documents}:1,{long_text}:2,self:1", 40)
    rows = [part["rows"] for part in found.report["parts"]]
    assert rows == [10, 20, 10]
    assert [part["tokens"] for part in found.report["parts"]] == [n * SEQLEN for n in rows]
    owners = interleave([1, 2, 1], 40)
    assert ["z" in text_of(source, row) for row in found.tokens[owners < 2]] == (owners[owners < 2] == 1).tolist()
    names = [part["name"] for part in found.report["parts"]]
    assert names == [f"{tmp_path.name}/documents.jsonl", f"{tmp_path.name}/long.txt", "self"]
    json.dumps(found.report)


def test_documents_are_packed_end_to_end(source, documents, tmp_path):
    """The rows of an epoch, joined, hold every document whole."""
    stored = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    length = sum(map(len, stored))  # one token per character
    found = rows_of(source, tmp_path, documents, length // SEQLEN, held_out=0)
    joined = text_of(source, found.tokens.flatten())
    assert len(joined) >= sum(len(text.replace(" ", "")) for text in stored) - SEQLEN
    assert sum(text.replace(" ", "") in joined for text in stored) >= len(stored) - 1  # the last row is not whole
    assert found.report["parts"][0]["epochs"] <= 1


def test_a_part_that_is_used_up_is_read_again_in_another_order(source, documents, tmp_path, caplog):
    length = sum(len(json.loads(line)["text"]) for line in documents.read_text().splitlines())
    rows = 5 * length // SEQLEN
    with caplog.at_level(logging.WARNING):
        found = rows_of(source, tmp_path, documents, rows, held_out=0)
    epochs = found.report["parts"][0]["epochs"]
    assert 4.5 < epochs <= 5
    assert f"is read {epochs:.1f} times" in caplog.text
    first, second = (text_of(source, found.tokens[n * length // SEQLEN :][:3].flatten()) for n in (0, 1))
    assert first[:40] not in second


def test_held_out_text_does_not_come_again(source, documents, long_text, tmp_path):
    mix, held_out = f"{documents},{long_text}", 6
    found = rows_of(source, tmp_path, mix, 320, held_out=held_out)
    assert min(part["epochs"] for part in found.report["parts"]) > 1.5
    later = text_of(source, found.tokens[held_out + 2 :].flatten())  # the two rows behind end what these have begun
    for row in found.tokens[:held_out]:
        words = text_of(source, row)
        assert words[4:24] not in later


def test_nothing_is_left_to_train_on(source, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", [make_text(30, seed=n) for n in range(3)])
    with pytest.raises(UserError, match="held out; add text, or lower --held-out"):
        rows_of(source, tmp_path, few, 40, held_out=8)
    blank = write_rows(tmp_path / "blank.jsonl", ["", None, " "])
    blank.write_text(blank.read_text().replace('" "', '""'))
    with pytest.raises(UserError, match="no text is left of 3 documents"):
        rows_of(source, tmp_path / "blank", blank, 2)


# ---- going on


@pytest.mark.parametrize("mix", ["{documents}:1,{long_text}:2", "self", "{documents}:1,self:1", "org/streamed"])
def test_an_interrupted_run_ends_at_the_same_bytes(mix, source, documents, long_text, tmp_path, monkeypatch):
    stored = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    monkeypatch.setattr(data, "_load", loader({"org/streamed": stored}))
    mix, rows = mix.format(documents=documents, long_text=long_text), 37
    whole = rows_of(source, tmp_path / "whole", mix, rows)
    write, writes, written = training_text._Mix._write, [], self_text.TextWriter.write

    def killed(mixed, places, block):
        write(mixed, places, block)
        writes.append(len(places))
        if len(writes) in (2, 3):
            raise KeyboardInterrupt  # behind the bytes, in front of the state

    batches = []
    monkeypatch.setattr(training_text._Mix, "_write", killed)
    monkeypatch.setattr(
        self_text.TextWriter,
        "write",
        lambda writer, number, bars: batches.append(number) or written(writer, number, bars),
    )
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            rows_of(source, tmp_path / "killed", mix, rows)
    found = rows_of(source, tmp_path / "killed", mix, rows)
    assert torch.equal(found.tokens, whole.tokens) and found.report == whole.report
    files = [tmp_path / name / "out.partial" / "text" / "rows.int32" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    if mix == "self":  # the batch of the second write is written three times, no other twice
        assert batches == [0, 1, 1, 1, *range(2, 10)]


def test_finished_rows_open_nothing(source, documents, tmp_path, monkeypatch):
    first = rows_of(source, tmp_path, f"{documents},self", 9)
    monkeypatch.setattr(training_text, "open_source", None)
    monkeypatch.setattr(training_text, "TextWriter", None)
    monkeypatch.setattr(training_text, "NgramFilter", None)
    again = rows_of(source, tmp_path, f"{documents},self", 9)
    assert torch.equal(again.tokens, first.tokens) and again.report == first.report


# ---- evaluation texts

SENTENCE = "the quick brown fox jumps over the lazy dog while seven old owls watch it"


def test_a_run_of_thirteen_words_is_found():
    words = SENTENCE.split()
    found = NgramFilter({"first": [SENTENCE], "second": [SENTENCE + " " + make_text(30)]})
    assert found.counts == {"first": 3, "second": 30}
    loud = "Well, " + " - ".join(words[1:14]).upper() + "!"
    assert found.met(loud) == "first" and found.met(loud.replace("SEVEN", "eight")) is None
    assert found.met(" ".join(words[:12])) is None and found.met("") is None
    assert found.met(make_text(30)) == "second"
    assert NgramFilter({}).met(SENTENCE) is None and NgramFilter({"short": ["a b"]}).met(SENTENCE) is None


def test_hashes_are_of_runs_and_of_nothing_else():
    text = make_text(60, seed=5) + " " + make_text(60, seed=5)
    words, hashes = text.split(), ngram_hashes(text)
    runs = [tuple(words[n : n + 13]) for n in range(len(words) - 12)]
    assert len(hashes) == len(runs) and len(set(hashes.tolist())) == len(set(runs)) < len(runs)
    assert len(ngram_hashes(" ".join(words[:12]))) == 0 and len(ngram_hashes(" ".join(words[:13]))) == 1


def test_documents_that_meet_an_evaluation_text_are_left_out(source, documents, tmp_path):
    stored = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    stored[7] = f"yy {SENTENCE.upper()} yy"
    stored[21] = SENTENCE.replace("dog", "yy")  # no thirteen words in a row
    planted, evaluation = write_rows(tmp_path / "planted.jsonl", stored), tmp_path / "evaluation.txt"
    evaluation.write_text(SENTENCE)
    found = rows_of(source, tmp_path, planted, 240, decontaminate=str(evaluation))
    text = text_of(source, found.tokens.flatten())
    assert "lazyyy" in text and "LAZY" not in text
    (part,) = found.report["parts"]
    label = f"{tmp_path.name}/evaluation.txt"
    assert part["left_out"] == {label: 1} and part["epochs"] > 2
    assert found.report["evaluation_texts"] == {label: 3}
    unfiltered = rows_of(source, tmp_path / "unfiltered", planted, 150, decontaminate="none")
    assert "LAZY" in text_of(source, unfiltered.tokens.flatten()) and unfiltered.report["evaluation_texts"] == {}


def test_lines_of_a_long_text_that_meet_one_are_cut_out(source, long_text, tmp_path):
    lines = long_text.read_text().splitlines()
    long_text.write_text("\n".join([*lines[:9], SENTENCE, *lines[9:30], SENTENCE, *lines[30:]]))
    evaluation = write_rows(tmp_path / "evaluation.jsonl", [make_text(20), SENTENCE])
    found = rows_of(source, tmp_path, long_text, 160, decontaminate=str(evaluation))
    text = text_of(source, found.tokens.flatten())
    assert "lazy" not in text and lines[0][:20].replace(" ", "") in text
    assert found.report["parts"][0]["left_out"] == {f"{tmp_path.name}/evaluation.jsonl": 2}


def test_text_of_the_model_that_meets_one_is_left_out(source, tmp_path, monkeypatch):
    written = self_text.TextWriter.write
    sentence = torch.tensor(source.tokenizer()(SENTENCE)["input_ids"])

    def write(writer, number, progress):
        rows = written(writer, number, progress)
        if number == 1:
            rows[2, : len(sentence)] = sentence
        return rows

    monkeypatch.setattr(self_text.TextWriter, "write", write)
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text(source.tokenizer().decode(sentence))
    kept, left = (
        rows_of(source, tmp_path / str(number), "self", 12, seqlen=96, decontaminate=name).tokens
        for number, name in enumerate(("none", str(evaluation)))
    )
    assert torch.equal(left[:6], kept[:6]) and torch.equal(left[6:11], kept[7:])


def test_a_mix_of_evaluation_text_alone_is_refused(source, documents, tmp_path):
    with pytest.raises(UserError, match=r"no text is left of 40 documents: 40 share 13 words in a row with"):
        rows_of(source, tmp_path, documents, 5, decontaminate=str(documents))


# ---- text of the Hub


def loader(sets: dict[str, list[str]]):
    """Stands in for `datasets.load_dataset`: streams of the Hub by name, files as they are."""
    load, files = data._load, ("json", "parquet")

    def stand_in(name, *config, split=None, streaming=False, **options):
        if name in files:
            return load(name, *config, split=split, streaming=streaming, **options)
        if (key := f"{name}:{split}") not in sets and (key := name) not in sets:
            raise ConnectionError(f"no network\nfor {name}")
        rows = datasets.Dataset.from_dict({"words" if name == "org/words" else "text": sets[key]})
        return rows.to_iterable_dataset(num_shards=min(2, len(rows))) if streaming else rows

    return stand_in


def test_streams_of_the_hub(source, tmp_path, monkeypatch, caplog):
    streamed = [make_text(40, seed=n) for n in range(50)]
    sets = {"allenai/c4:train": streamed, "org/name": [text.replace("w", "z") for text in streamed]}
    sets["allenai/c4:validation"] = [streamed[3], streamed[4]]
    monkeypatch.setattr(data, "_load", loader(sets))
    mix = "c4:1,org/name/config:1"
    check_training_text(recipe(mix))
    few, many = (rows_of(source, tmp_path / str(rows), mix, rows) for rows in (9, 600))
    assert torch.equal(many.tokens[:9], few.tokens)
    # wikitext2 is not at hand, which fails nothing and is said
    assert many.report["evaluation_texts_missing"] == ["wikitext2"]
    assert "not compared with the evaluation text wikitext2" in caplog.text
    assert [part["epochs"] for part in few.report["parts"]] == [None, None]  # no end of the streams is in sight
    assert many.report["parts"][0]["left_out"] == {"c4": 2}
    text = text_of(source, many.tokens[interleave([1, 1], 600) == 0].flatten())
    assert "z" not in text and streamed[3][:40].replace(" ", "") not in text
    endless = rows_of(source, tmp_path / "epochs", "org/name", 400)
    assert endless.report["parts"][0]["epochs"] > 1


def test_a_stream_without_its_rare_words(monkeypatch, caplog):
    monkeypatch.setattr(data, "_load", loader({"org/texts": ["a word", "an <unk>"]}))
    check_training_text(recipe("org/texts"))
    assert "org/texts: <unk> stands for 1 rare words" in caplog.text


def test_a_hub_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(data, "_load", loader({"org/texts": ["a"], "org/words": ["a"]}))
    for mix in ("c4", "org/other:2", "wikitext2"):
        with pytest.raises(UserError, match="without a network, give a local file") as caught:
            check_training_text(recipe(mix))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no column 'text'"):
        check_training_text(recipe("org/words"))
    check_training_text(recipe("org/texts"))  # evaluation texts that nobody has asked for may be missing


def test_the_model_goes_on_with_real_texts(source, documents, tmp_path, monkeypatch):
    asked, prompts = [], self_text.TextWriter._prompts
    monkeypatch.setattr(
        self_text.TextWriter, "_prompts", lambda writer, number: asked.append(prompts(writer, number)) or asked[-1]
    )
    rows_of(source, tmp_path, f"{documents}:1,self:1", 8, seqlen=128)
    texts = {text_of(source, prompt.tokens) for window in asked[0] for prompt in window}
    stored = documents.read_text().replace(" ", "")
    real = texts - {"<s>"}
    assert len(real) > 4 and all(text in stored for text in real), real
