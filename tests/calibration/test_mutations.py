"""Sources with a random fault: a dry run finds it and says so in one line, or runs to its end; never a traceback.

BQ_TEST_SEED gives other faults than those of every run.
"""

import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
from bq_calibration.errors import UserError
from bq_calibration.pipeline import Calibration
from bq_calibration.recipes import make_recipe
from rich.progress import Progress

from .conftest import make_model, make_text

SMALL = dict(group_size=32, rotation="butterfly", rotation_block=32, samples=2, seqlen=16, steps=1)
OTHERS = (
    None,
    True,
    -1,
    0,
    1,
    3,
    7.5,
    1e300,
    10**30,
    math.inf,
    math.nan,
    "",
    "x",
    "gelu",
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A tiny model with an index."""
    folder = make_model(tmp_path_factory.mktemp("mutated") / "model", "qwen2")
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "model-00001-of-00001.safetensors", framework="pt") as handle:
        weight_map = dict.fromkeys(handle.keys(), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "text.txt").write_text(make_text(60))
    return folder


def change_json(file: Path, chooser: random.Random) -> str:
    """Change, remove or add an entry somewhere in a JSON file; says which."""
    data = json.loads(file.read_text())
    place, path = data, file.name
    while True:
        key = chooser.choice(list(place))
        path += f".{key}"
        if not (isinstance(place[key], dict) and place[key] and chooser.random() < 0.8):
            break
        place = place[key]
    kind = chooser.choice(("change", "change", "change", "remove", "add"))
    if kind == "remove":
        del place[key]
    else:
        value = chooser.choice(OTHERS)
        place[key if kind == "change" else chooser.choice(("rope_scaling", "dtype", "quantization_config", "x"))] = (
            value
        )
        path += f" {kind} {value!r}"
    file.write_text(json.dumps(data))
    return f"{path} ({kind})"


def change_bytes(file: Path, chooser: random.Random) -> str:
    """Flip a bit, cut the file, or add bytes to it; in weights mostly in the header."""
    data = bytearray(file.read_bytes())
    kind = chooser.choice(("flip", "flip", "cut", "add"))
    place = chooser.randrange(min(len(data), 4000) if file.suffix == ".safetensors" else len(data))
    if kind == "flip":
        data[place] ^= 1 << chooser.randrange(8)
    elif kind == "cut":
        del data[place:]
    else:
        data[place:place] = bytes(chooser.randrange(256) for _ in range(chooser.randrange(1, 9)))
    file.write_bytes(data)
    return f"{file.name}: {kind} at {place}"


def mutate(folder: Path, chooser: random.Random) -> str:
    files = [f for f in sorted(folder.iterdir()) if f.is_file()]
    tables = [f for f in files if f.name in ("config.json", "model.safetensors.index.json", "tokenizer_config.json")]
    if chooser.random() < 0.6:
        return change_json(chooser.choice(tables), chooser)
    return change_bytes(chooser.choice(files), chooser)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_every_fault_of_a_source_is_told(count, sharded, tmp_path):
    seed = int(os.environ.get("BQ_TEST_SEED") or count)
    chooser, told = random.Random(seed), 0
    for number in range(count):
        folder = Path(shutil.copytree(sharded, tmp_path / str(number)))
        fault = mutate(folder, chooser)
        try:
            recipe = make_recipe("fast", SMALL | {"dataset": str(folder / "text.txt")})
            Calibration(str(folder), str(tmp_path / "out"), recipe, "cpu").dry_run(Progress(disable=True))
        except UserError as error:
            told += 1
            assert str(error).strip(), fault
        except BaseException as error:
            pytest.fail(f"BQ_TEST_SEED={seed}, mutation {number}: {fault}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    assert told > count / 10
