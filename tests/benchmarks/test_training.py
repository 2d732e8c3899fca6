"""Benchmarks of end-to-end training: the small real problem's arms, the ladder of tokens, files in parts."""

import json

import pytest

from benchmarks import parts
from benchmarks.training_ablations.arms import ARMS
from benchmarks.training_ablations.variants import GRADIENTS, LOSSES, dge


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"t{(i * i + i // 7) % 63}" for i in range(6000)))
    return file


def test_parts_come_back_whole(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "text.txt").write_text("a text")
    written = parts.pack([folder, tmp_path / "text.txt"], tmp_path / "parts", mib=0.0002)
    assert len(written) > 1 and all(part.stat().st_size <= 0.0002 * 2**20 for part in written)
    parts.unpack(tmp_path / "parts", tmp_path / "back")
    assert (tmp_path / "back" / "model" / "sub" / "weights").read_bytes() == bytes(range(256)) * 40
    assert (tmp_path / "back" / "text.txt").read_text() == "a text"
    written[-1].write_bytes(b"?" + written[-1].read_bytes()[1:])
    with pytest.raises(SystemExit, match=r"part-\d+: damaged"):
        parts.unpack(tmp_path / "parts", tmp_path / "again")
    written[0].unlink()
    with pytest.raises(SystemExit, match="part-00: missing"):
        parts.unpack(tmp_path / "parts", tmp_path / "again")


def test_arms_name_what_is_there():
    from bq_calibration.end_to_end import RATES
    from bq_calibration.recipes import make_recipe

    for arms in ARMS.values():
        for arm in arms.values():
            make_recipe("fast", arm.recipe)
            assert arm.loss in LOSSES and arm.gradient in GRADIENTS and set(arm.rates) <= set(RATES)


def test_smooth_gradient_is_steepest_between_levels():
    import torch

    factor = dge(torch.tensor([0.5, 0.75, 1.0, 1.49, 1.51]))
    assert factor[0] == factor.max() == 3 and factor[1] < 1 and factor[2] == factor.min()
    assert factor[3] == pytest.approx(factor[4])


@pytest.mark.slow
def test_ablations(run, model, text, tmp_path):
    out, file = tmp_path / "out", tmp_path / "found.json"
    small = ("--layers", 1, "--tokens", "2k", "--vocabulary", 40)
    changes = dict(samples=4, seqlen=32, tokens_per_step=128, group_size=32, rotation_block=32, code_lr=0.1)
    small += tuple(part for name, value in changes.items() for part in ("--set", f"{name}={value}"))
    only = "base,loss,end,gradient of rounding,embedding"
    run("training.py", model, "--dataset", text, *small, "--only", only, "--out", out, "--json", file)
    results = json.loads(file.read_text())["results"]
    assert list(results) == only.split(",") and len(results["base"]["codes move"]) == 3
    values = {(question, name): rows[0]["after"] for question, arms in results.items() for name, rows in arms.items()}
    assert len(set(values.values())) == len(values), "an arm is another one under a second name"
    assert (tmp_path / "found.md").read_text().count("\n") > len(values)


@pytest.mark.slow
def test_ladder(run, model, text, tmp_path):
    out, file = tmp_path / "out", tmp_path / "found.json"
    tiny = dict(samples=4, train_samples=16, held_out=2, seqlen=32, tokens_per_step=128, block_tokens=0)
    tiny |= dict(dataset=str(text), group_size=32, rotation_block=32, compile="off")
    settings = [part for name, value in tiny.items() for part in ("--set", f"{name}={value}")]
    texts = ("--perplexity", text, "--context", 32, "--windows", 2)
    run("ladder.py", model, "--rungs", "1k,3k", *texts, *settings, "--out", out, "--json", file)
    rows = json.loads(file.read_text())["rungs"]
    assert [row["tokens"] for row in rows] == [1000, 3000]
    reports = [json.loads((out / f"{row['tokens']}" / "bq_report.json").read_text()) for row in rows]
    first, second = (report["stages"][-1]["losses"] for report in reports)
    assert (len(first), len(second)) == (8, 24) and first[:6] == second[:6], "the second goes on from the first"
    assert file.with_suffix(".png").exists()
