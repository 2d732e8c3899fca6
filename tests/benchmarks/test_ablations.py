"""The ablations of learned rotations on a tiny model."""

import json

import pytest
import torch
import typer

from benchmarks.rotation_ablations import cli
from benchmarks.rotation_ablations.measure import MatrixRotation

GROUP, BITS = 32, 3


@pytest.mark.slow
def test_ablations(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{n}" for n in torch.randint(1, 64, (1500,)).tolist()))
    groups = ["start", "any orthogonal matrix"]
    settings = dict(
        bits=BITS, group_size=GROUP, rotation_block=32, dataset=str(text), samples=16, held_out=8, seqlen=32
    )

    def run(json_file: str) -> dict:
        file = tmp_path / json_file
        cli.main(model, **settings, blocks="1", steps=12, only=groups, out=tmp_path / "out", as_json=file)
        assert file.with_suffix(".png").exists()
        return json.loads(file.read_text())["groups"]

    found = run("first.json")
    assert [[line["value"] for line in found[name]] for name in groups] == [
        ["identity", "hadamard", "random"],
        ["butterfly, Adam", "matrix, Cayley SGD"],
    ]
    for line in found[groups[0]] + found[groups[1]]:
        assert len(line["errors"]) == 4 and 0 < line["summary"]["error"] < 1
        assert line["curve"][-1] < line["curve"][0]  # all of them learn
    assert run("again.json") == found  # from what is kept, times and all
    with pytest.raises(typer.BadParameter):
        cli.main(model, **settings | {"samples": 8}, out=tmp_path / "out")


def test_any_matrix_is_a_rotation():
    matrices = torch.linalg.qr(torch.randn(3, 8, 8)).Q
    rotation, x = MatrixRotation(matrices), torch.randn(5, 24)
    torch.testing.assert_close(rotation.forward(x), x @ torch.block_diag(*matrices).T)
    torch.testing.assert_close(rotation.inverse(rotation.forward(x)), x)
