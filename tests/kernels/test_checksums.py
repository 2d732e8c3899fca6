"""Checksums of a folder: what is listed, what a changed byte leads to."""

import hashlib
import json
import os
import random
import shutil
import subprocess

import pytest
from bq_kernels import checksums
from bq_kernels.format import FormatError

LISTED = ["LICENSE", "bq_report.json", "config.json", "model.safetensors", "report/Bild ä.png", "tokenizer.json"]
DATA = {"a.weight": bytes(range(96)), "b.scales": bytes(64), "c": b""}


def shard(path, data=DATA, sums=True):
    """A safetensors file, written as its specification says."""
    entries, start = {}, 0
    if sums:
        table = {name: hashlib.sha256(value).hexdigest() for name, value in data.items()}
        entries["__metadata__"] = {"bq_sha256": json.dumps(table), "format": "pt"}
    for name, value in data.items():
        entries[name] = {"dtype": "U8", "shape": [len(value)], "data_offsets": [start, start + len(value)]}
        start += len(value)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(data.values()))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("BQ_VERIFY", raising=False)
    monkeypatch.delenv("_BQ_VERIFIED", raising=False)
    folder = tmp_path / "checkpoint"
    (folder / "report").mkdir(parents=True)
    for name in (*LISTED, "README.md", ".git"):
        (folder / name).write_text(f"contents of {name}")
    shard(folder / "model.safetensors")
    checksums.write_sums(folder)
    return folder


def flip(path, place=None, bit=0):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(data)


def test_list_is_that_of_sha256sum(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in LISTED]
    assert not list(folder.glob(".SHA*"))
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_an_untouched_folder(folder):
    found = checksums.compare(folder)
    assert (found.listed, found.files, found.tensors, found.uncovered) == (True, LISTED, 3, [])
    checksums.compare_for_loading(folder)
    (folder / "notes.txt").write_text("new")
    (folder / "README.md").write_text("another card")
    assert checksums.compare(folder).uncovered == ["notes.txt"]


@pytest.mark.parametrize("name", [*LISTED, "SHA256SUMS"])
def test_every_flipped_bit_is_found(folder, name):
    chooser = random.Random(name)
    path, size = folder / name, (folder / name).stat().st_size
    places = {0, size - 1, *(chooser.randrange(size) for _ in range(25))}
    if name == "SHA256SUMS":
        places.discard(size - 1)  # the last line's end is no part of a sum
    for place in sorted(places):
        bit = chooser.randrange(8)
        flip(path, place, bit)
        with pytest.raises(FormatError, match=r"SHA256SUMS|model\.safetensors"):
            checksums.compare(folder)
        if not name.startswith(("bq_report", "report")):
            if name != "SHA256SUMS":
                with pytest.raises(FormatError, match=rf"{name}: .*BQ_VERIFY=0"):
                    checksums.compare_for_loading(folder)
        else:
            checksums.compare_for_loading(folder)
        flip(path, place, bit)
    checksums.compare(folder)


def test_a_damaged_tensor_is_named(folder):
    path = folder / "model.safetensors"
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, begin + 100)
    expected = r"model\.safetensors: tensor b\.scales differs from its SHA-256 \(1 in all\); download or copy it again"
    with pytest.raises(FormatError, match=expected):
        checksums.compare(folder)
    with pytest.raises(FormatError, match=expected):
        checksums.compare_for_loading(folder)


def test_without_a_list_the_header_has_the_tensors(folder):
    (folder / "SHA256SUMS").unlink()
    found = checksums.compare(folder)
    assert (found.listed, found.files, found.tensors) == (False, [], 3)
    flip(folder / "model.safetensors", -1)
    for compare in (checksums.compare, checksums.compare_for_loading):
        with pytest.raises(FormatError, match=r"tensor b\.scales differs from its SHA-256"):
            compare(folder)


def test_an_older_checkpoint_has_no_sums(folder):
    (folder / "SHA256SUMS").unlink()
    shard(folder / "model.safetensors", sums=False)
    checksums.compare_for_loading(folder)
    found = checksums.compare(folder)
    assert (found.listed, found.tensors) == (False, 0)


def test_a_list_of_tensors_that_is_not_that_of_the_file(folder):
    data = shard(folder / "model.safetensors").read_bytes()
    (folder / "SHA256SUMS").unlink()
    (folder / "model.safetensors").write_bytes(data.replace(b'"c":{"dtype', b'"d":{"dtype'))
    with pytest.raises(FormatError, match="tensor c differs"):
        checksums.compare(folder)
    (folder / "model.safetensors").write_bytes(data.replace(b'{\\"a.weight', b'[\\"a.weight'))
    with pytest.raises(FormatError, match="its header is damaged"):
        checksums.compare(folder)


def test_missing_files(folder):
    (folder / "tokenizer.json").unlink()
    checksums.compare_for_loading(folder)  # a tokenizer may come from elsewhere; the loader knows
    with pytest.raises(FormatError, match=r"tokenizer\.json: missing, though SHA256SUMS lists it"):
        checksums.compare(folder)


def test_a_line_that_was_deleted_on_purpose(folder):
    path = folder / "SHA256SUMS"
    (folder / "config.json").write_text("changed on purpose")
    with pytest.raises(FormatError, match=r"config\.json: differs .* delete its line in SHA256SUMS"):
        checksums.compare(folder)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "config.json" not in line))
    assert checksums.compare(folder).uncovered == ["config.json"]
    checksums.compare_for_loading(folder)


@pytest.mark.parametrize(
    "line",
    ["{0}  /etc/hostname", "{0}  ../outside", "{0} config.json", "{0}  config.json", "xyz", "{0}  a\\b", "A{0}  x"],
)
def test_lines_that_are_no_sums(folder, line):
    with open(folder / "SHA256SUMS", "a") as file:
        file.write(line.format("0" * 64) + "\n")
    with pytest.raises(FormatError, match=r"SHA256SUMS: line 7 is damaged"):
        checksums.compare(folder)
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"SHA256SUMS: damaged, not text"):
        checksums.compare(folder)


def test_loading_compares_once(folder, monkeypatch):
    calls = []
    original = checksums.file_sha256
    monkeypatch.setattr(checksums, "file_sha256", lambda path, *rest: calls.append(path.name) or original(path, *rest))
    checksums.compare_for_loading(folder)
    assert sorted(calls) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    checksums.compare_for_loading(folder)  # as a process would that this one has started
    assert len(calls) == 4
    os.utime(folder / "config.json", (1, 1))
    checksums.compare_for_loading(folder)
    assert len(calls) == 8


def test_switched_off(folder, monkeypatch):
    flip(folder / "model.safetensors")
    monkeypatch.setenv("BQ_VERIFY", "0")
    checksums.compare_for_loading(folder)
    with pytest.raises(FormatError):
        checksums.compare(folder)
    monkeypatch.setenv("BQ_VERIFY", "1")
    with pytest.raises(FormatError):
        checksums.compare_for_loading(folder)


def test_a_name_on_the_hub_is_no_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    checksums.compare_for_loading(folder / "org/model")


def test_large_files_are_hashed_in_parts(tmp_path):
    data = random.Random(0).randbytes(2 * checksums._CHUNK + 12345)
    (tmp_path / "large").write_bytes(data)
    assert checksums.file_sha256(tmp_path / "large") == hashlib.sha256(data).hexdigest()
    part = data[1000 : checksums._CHUNK + 7]
    assert checksums.file_sha256(tmp_path / "large", 1000, checksums._CHUNK + 7) == hashlib.sha256(part).hexdigest()
