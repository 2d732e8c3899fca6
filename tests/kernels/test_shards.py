"""Which files hold a checkpoint's tensors: no choice is left to a loader."""

import json
import re

import pytest
import torch
from bq_kernels.format import FormatError
from bq_kernels.shards import INDEX, SINGLE, tensor_files
from safetensors.torch import save_file

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder, files, index=None):
    for name, tensors in files.items():
        save_file({tensor: torch.zeros(2) for tensor in tensors}, folder / name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_one_file_or_those_of_the_index(tmp_path):
    assert tensor_files(write(tmp_path, {SINGLE: "xy"})) == {"x": tmp_path / SINGLE, "y": tmp_path / SINGLE}
    (tmp_path / SINGLE).unlink()
    write(tmp_path, {A: "x", B: "y"}, {"x": A, "y": B})
    assert tensor_files(tmp_path) == {"x": tmp_path / A, "y": tmp_path / B}


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        ({}, None, rf"{SINGLE}: missing, expected the tensors"),
        ({A: "x"}, None, rf"{SINGLE}: missing"),
        ({A: "x"}, {"x": A, "y": B}, rf"{B}: missing, though {INDEX} lists it"),
        ({SINGLE: "x", "extra.safetensors": "y"}, None, r"extra\.safetensors: belongs to no checkpoint of model"),
        ({SINGLE: "x", A: "x", B: "y"}, {"x": A, "y": B}, rf"{SINGLE}: belongs to no checkpoint of {A}, {B}; remove"),
        ({SINGLE: "x", B: "y"}, {"x": SINGLE, "y": B}, rf"{INDEX}: lists {SINGLE} and others"),
        ({A: "xy", B: "y"}, {"x": A, "y": B}, rf"{B}: tensor y is in {A} too"),
        ({A: "y", B: "x"}, {"x": A, "y": B}, rf"{B}: tensor x is not there by {INDEX}"),
        ({A: "x", B: "yz"}, {"x": A, "y": B}, rf"{B}: tensor z is not there by {INDEX}"),
        ({A: "x", B: "y"}, {"x": A, "y": B, "z": B}, rf"{B}: tensor z of the index is not there"),
        ({A: "x"}, {}, rf"{INDEX}: not a valid index"),
    ],
)
def test_any_choice_is_refused(files, index, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        tensor_files(write(tmp_path, files, index))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"x": "model.safetensors"}}', "[" * 100_000])
def test_broken_index(text, tmp_path):
    (write(tmp_path, {SINGLE: "x"}) / INDEX).write_text(text)
    with pytest.raises(FormatError, match=rf"{INDEX}: not a valid index"):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [8, 16]),
        ("data_offsets", [0, 7]),
        ("shape", [2.0]),
        ("shape", [-2, -1]),
        ("dtype", "F8"),
        ("dtype", 3),
    ],
)
def test_headers_that_safetensors_refuses(key, value, tmp_path):
    path = write(tmp_path, {SINGLE: "x"}) / SINGLE
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header["x"][key] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])
    with pytest.raises(FormatError, match=rf"{re.escape(SINGLE)}: not a whole safetensors file"):
        tensor_files(tmp_path)
