"""What examples/offline_batch.py reads, without an engine."""

import importlib.util
from pathlib import Path

import pytest
import typer

SCRIPT = Path(__file__).parents[1] / "examples" / "offline_batch.py"
spec = importlib.util.spec_from_file_location("offline_batch", SCRIPT)
offline_batch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(offline_batch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": 1}\n', r"line 2: expected an object like"),
        ('{"text": "a"}\n', r"line 1: expected an object like"),
        ("[]\n", r"line 1: expected an object like"),
        ("\n\nnot json\n", r"line 3: not valid JSON"),
        ("\n\n", r"holds no prompt"),
    ],
)
def test_bad_lines_are_named(text, message, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text(text)
    with pytest.raises(typer.BadParameter, match=message):
        offline_batch.read_lines(file)


def test_lines_are_read(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a", "id": 3}\n\n{"prompt": ""}\n')
    assert offline_batch.read_lines(file) == [{"prompt": "a", "id": 3}, {"prompt": ""}]
