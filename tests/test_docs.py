"""The documentation holds: commands exist with their flags, links resolve, figures are those of the result files."""

from __future__ import annotations

import ast
import copy
import dataclasses
import doctest
import functools
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
RESULTS = ROOT / "benchmarks" / "results"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def fenced(path: Path, language: str) -> list[str]:
    """Code blocks of a page in one language, without their indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return ["".join(line.removeprefix(indent) for line in body.splitlines(keepends=True)) for indent, body in blocks]


# ---- commands


def commands(path: Path) -> Iterator[list[str]]:
    """Commands of a page's console blocks, split into words, without comments."""
    for block in fenced(path, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield shlex.split(line[2:], comments=True)


ALL_COMMANDS = [pytest.param(words, id=f"{path.name}: {' '.join(words)}") for path in PAGES for words in commands(path)]

# runs inside one process, since torch and matplotlib take seconds to load
HELP = """
import contextlib, io, json, runpy, sys, traceback
from importlib.metadata import entry_points
texts, paths = {}, [path for path in sys.path if path]  # no current folder: scripts do not get it either
for call in json.loads(sys.argv[1]):
    sys.argv, out = [*call, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            if call[0].endswith(".py"):
                sys.path[:] = [call[0].rpartition("/")[0], *paths]
                runpy.run_path(call[0], run_name="__main__")
            else:
                next(iter(entry_points(group="console_scripts", name=call[0]))).load()()
    except Exception:
        out.write(traceback.format_exc())
    texts[" ".join(call)] = out.getvalue()
print(json.dumps(texts))
"""


def program_of(words: list[str]) -> tuple[str, ...] | None:
    """The program that `--help` is asked of: a script, with its subcommand if it has one, or one of our commands."""
    if words[0].startswith("bq-"):
        return (words[0],)
    if words[0] == "python" and words[1].endswith(".py"):
        subcommand = words[2:3] if words[1] == "benchmarks/kernels.py" else []
        return (words[1], *subcommand)
    return None


@functools.cache
def help_texts() -> dict[str, str]:
    """What every program that a page names prints with `--help`."""
    used = {program_of(parameter.values[0]) for parameter in ALL_COMMANDS} - {None}
    every = sorted(used | {(name,) for name in PROJECT["scripts"]})
    wide = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "PATH": "", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-c", HELP, json.dumps(every)]
    done = subprocess.run(call, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def flags_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][^ ]*", word)]


def check_pip(words: list[str]) -> None:
    """`pip install` of this project: a path with extras that pyproject has, no other form."""
    assert words[1] == "install"
    for word in words[2:]:
        if word in ("-e", "-q"):
            continue
        here = re.fullmatch(r"\.(?:\[([a-z,-]+)\])?", word)
        assert here, f"{word}: not a path with extras; pip takes no name with `@ .`"
        assert set(filter(None, (here[1] or "").split(","))) <= set(PROJECT["optional-dependencies"])


def check_make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_vllm(words: list[str]) -> None:
    """Flags of `vllm serve`, against the source of the vLLM that is installed: loading it takes too long."""
    from bq_kernels.format import QUANT_METHOD

    assert words[1] == "serve" or words[2] == "vllm.entrypoints.openai.api_server"
    if "--quantization" in words:
        assert words[words.index("--quantization") + 1] == QUANT_METHOD
    if (found := find_spec("vllm")) is not None:
        folder = Path(found.submodule_search_locations[0])
        source = (folder / "engine" / "arg_utils.py").read_text()
        assert all(f'"{flag}"' in source for flag in flags_of(words) if flag != "-m")


def check_help(words: list[str], program: tuple[str, ...]) -> None:
    """The script or command exists and knows every flag."""
    if program[0].endswith(".py"):
        assert (ROOT / program[0]).exists()
    text = help_texts()[" ".join(program)]
    assert "Usage:" in text, f"{program}: {text}"
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))
    assert set(flags_of(words)) <= known


def check_recipe_values(words: list[str]) -> None:
    """Values of bq-calibrate's flags are ones that it takes."""
    from bq_calibration.cli import number_or_word
    from bq_calibration.recipes import RECIPES, Recipe, make_recipe
    from bq_calibration.schedule import parse_tokens

    given = dict(itertools.pairwise(words))
    fields = {"--" + field.name.replace("_", "-"): field for field in dataclasses.fields(Recipe)}
    types = {"int": int, "float": float, "str": str, "bool": lambda _: True}
    types |= {f"{name} | None": types[name] for name in ("int", "float", "str")}
    convert = {flag: parse_tokens if f.metadata["tokens"] else types[f.type] for flag, f in fields.items()}
    convert |= {flag: functools.partial(number_or_word, f) for flag, f in fields.items() if f.type == "int | None"}
    overrides = {f.name: convert[flag](given[flag]) for flag, f in fields.items() if flag in given}
    assert make_recipe(given.get("--recipe", next(iter(RECIPES))), overrides)


def check_torchrun(words: list[str]) -> list[str]:
    """Flags of torchrun, against its source; and the command that it starts."""
    start = words.index("-m")
    assert words[start + 1] == "bq_calibration" and find_spec("bq_calibration.__main__") is not None
    source = (Path(find_spec("torch").submodule_search_locations[0]) / "distributed" / "run.py").read_text()
    assert all(f'"{flag}"' in source for flag in flags_of(words[:start]))
    return ["bq-calibrate", *words[start + 2 :]]


def check_pytest(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words[1:] if "/" in word)


def check_nox(words: list[str]) -> None:
    """A session that noxfile.py has, with one of its versions."""
    source = (ROOT / "noxfile.py").read_text()
    for session in words[2:]:
        name, versions = session.rstrip(")").split("(")
        assert f"def {name}(" in source and all(part in source for part in re.findall(r"\d[\d.]*", versions))


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_command(words):
    if words[0] == "torchrun":
        words = check_torchrun(words)
    program = words[0]
    if program == "cd":
        assert words[1] == PROJECT["name"]
    elif program == "pip":
        check_pip(words)
    elif program == "make":
        check_make(words)
    elif program == "pytest":
        check_pytest(words)
    elif program == "nox":
        check_nox(words)
    elif words[1:2] == ["-m"] and words[2].startswith("tests."):
        assert (ROOT / words[2].replace(".", "/") / "__main__.py").exists()
    elif program == "vllm" or words[:2] == ["python", "-m"]:
        check_vllm(words)
    else:
        assert program_of(words), f"this test does not know the program {program}"
        check_help(words, program_of(words))
        if program == "bq-calibrate":
            check_recipe_values(words)


def test_our_commands_are_installed():
    installed = {script.name for script in entry_points(group="console_scripts")}
    assert set(PROJECT["scripts"]) <= installed


@page
def test_python_compiles(path):
    for block in fenced(path, "python"):
        if ">>>" not in block and not block.startswith('"'):  # a line of a table is not a program
            ast.parse(block)


def test_examples_of_the_format():
    found = doctest.testfile(str(ROOT / "docs" / "format.md"), module_relative=False)
    assert found.attempted and not found.failed


# ---- links and names


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{path.name}: {target}"


@page
def test_named_files_exist(path):
    if path.name in ("experiment-log.md", "CHANGELOG.md"):  # names of their day
        return
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", path.read_text()):
        if name.split("/")[0] in {part.name for part in ROOT.iterdir()} and name.split("/")[0] != "build":
            assert (ROOT / name.replace("NAME", "gemm")).exists(), f"{path.name}: {name}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# ---- calibration.md


def table_rows(path: Path) -> dict[str, list[str]]:
    """Rows of all tables of a page by the flags of their first cell."""
    rows: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        for flag in re.findall(r"`(--?[\w-]+)`", cells[0]) if line.startswith("|") else []:
            rows.setdefault(f"{flag} {len(cells)}", cells)
    return rows


def test_every_setting_is_documented_with_its_values():
    from bq_calibration.recipes import RECIPES, Recipe

    rows = table_rows(ROOT / "docs" / "calibration.md")
    for field in dataclasses.fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        assert all(rows[f"{flag} 4"][1:3]), f"{flag}: effect and advice"
        values = [getattr(recipe, field.name) for recipe in RECIPES.values()]
        unset = field.metadata["unset"]
        assert rows.get(f"{flag} 4") and [unset if v is None else str(v) for v in values] == values_of(flag)


def values_of(flag: str) -> list[str]:
    """A flag's row in the table of the recipes' values."""
    text = (ROOT / "docs" / "calibration.md").read_text()
    line = re.search(rf"^\| `{flag}` \|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    return [cell.strip() for cell in line.groups()]


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_every_flag_is_documented(command):
    text = (ROOT / "docs" / "calibration.md").read_text()
    section = text.split(f"## {'Flags of ' if command == 'bq-calibrate' else ''}{command}\n")[1].split("\n## ")[0]
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_texts()[command]))
    assert flags - {"--show-completion", "--install-completion"} <= set(re.findall(r"--[a-z][a-z-]*", section))


# ---- format.md and its schema

GOOD = {
    "quant_method": "butterfly",
    "format_version": 1,
    "bits": 2,
    "group_size": 64,
    "zero_point": "midrise",
    "rotation": {"kind": "butterfly", "block_size": {"default": 64, "down_proj": 512}},
    "modules_to_not_convert": ["lm_head"],
    "module_bits": {"model.layers.0.mlp.down_proj": 3},
    "prefill_activation_bits": 8,
}
VALUES = [
    *(None, True, False, 0, 1, 2, 3, 4, 5, 8, -1, -64, 16, 32, 48, 64, 96, 2.5),
    *("", "2", "midrise", "float", "butterfly", [], ["lm_head"], [1]),
    *({}, {"default": 64}, {"default": 0}, {"default": "64"}, {"q_proj": 64}, {"a": 2}, {"a": 5}),
    *({"kind": "none"}, {"kind": "none", "block_size": {}}, {"kind": "none", "seed": 1}, {"kind": "dct"}),
    *({"kind": "hadamard"}, {"kind": "hadamard", "block_size": {"default": 1}}, {"block_size": {"default": 64}}),
]


def schema() -> dict:
    return json.loads((ROOT / "docs" / "quantization_config.schema.json").read_text())


def variants() -> Iterator[dict]:
    """Configs with one key removed, added or set to each of VALUES."""
    yield GOOD
    for key in [*GOOD, "seed"]:
        yield {name: value for name, value in GOOD.items() if name != key}
        yield from (GOOD | {key: copy.deepcopy(value)} for value in VALUES)
    for kind in ("butterfly", "hadamard", "none", "random", None):
        for value in VALUES:
            yield GOOD | {"rotation": {"kind": kind, "block_size": copy.deepcopy(value)}}
    for value in VALUES:
        yield GOOD | {"module_bits": {"model.layers.0.mlp.down_proj": copy.deepcopy(value)}}
        packed = GOOD | {"module_bits": {"lm_head": 4}}
        yield packed | {"kept_tokens": copy.deepcopy(value)}
        yield packed | {"kept_tokens": {"lm_head": copy.deepcopy(value)}}


def test_schema_and_code_judge_alike():
    jsonschema = pytest.importorskip("jsonschema")
    from bq_kernels.format import FormatError, QuantConfig

    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    accepted = refused = 0
    for config in variants():
        try:
            QuantConfig.from_dict(copy.deepcopy(config))
            accepted += 1
        except FormatError:
            refused += 1
            assert not validator.is_valid(config), config
        else:
            assert validator.is_valid(config), config
    assert accepted > 20 and refused > 100


def test_schema_has_the_keys_and_values_of_the_code():
    from bq_kernels import format as code

    properties = schema()["properties"]
    names = {field.name for field in dataclasses.fields(code.QuantConfig)} | {"quant_method", "format_version"}
    assert set(properties) == names
    assert properties["quant_method"]["const"] == code.QUANT_METHOD
    assert properties["format_version"]["const"] == code.FORMAT_VERSION
    assert schema()["$defs"]["bits"]["enum"] == list(code.BITS)
    assert properties["prefill_activation_bits"]["enum"] == list(code.ACTIVATION_BITS)
    assert properties["zero_point"]["enum"] == list(code.ZERO_POINTS)
    assert set(properties["rotation"]["properties"]) == {f.name for f in dataclasses.fields(code.RotationConfig)}
    assert properties["rotation"]["properties"]["kind"]["enum"] == list(code.ROTATION_KINDS)
    channel, multiple = properties["group_size"]["anyOf"]
    assert channel == {"const": code.PER_CHANNEL}
    assert multiple == {"minimum": code.GROUP_MULTIPLE, "multipleOf": code.GROUP_MULTIPLE}


def test_format_page_names_every_key():
    text = (ROOT / "docs" / "format.md").read_text()
    assert all(f"`{key}`" in text for key in schema()["properties"] if key != "rotation")
    example = json.loads("{" + fenced(ROOT / "docs" / "format.md", "json")[0] + "}")["quantization_config"]
    assert set(example) == set(schema()["properties"])


# ---- figures


def perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def lines_with(path: Path, *parts: str) -> list[str]:
    return [line for line in path.read_text().splitlines() if all(part in line for part in parts)]


@pytest.mark.parametrize("name", ["accuracy", "accuracy_bits", "accuracy_c4"])
def test_accuracy_figures(name):
    for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
        found = row["perplexity"]
        values = [found["value"]] if "value" in found else [score["value"] for score in found.values()]
        parts = [f"| {row['method']} |", *(f" {perplexity(value)} " for value in values)]
        parts += [f"{row['bits_per_weight']:.3f}"] if "bits_per_weight" in row else []
        assert lines_with(ROOT / "docs" / "results.md", *parts), parts


def test_figures_by_columns_per_scale():
    record = json.loads((RESULTS / "columns_per_scale.json").read_text())
    for row in (*record["rows"], *record["all_windows"]["rows"]):
        scores = row["perplexity"].values()
        parts = [f"| {row['bits_per_weight']:.3f} |", *(f"{score['value']:.2f}" for score in scores)]
        parts += [f" {row['seconds']:,.0f} |"] if row in record["all_windows"]["rows"] else []
        assert lines_with(ROOT / "docs" / "results.md", *parts), parts


def test_activation_figures():
    record = json.loads((RESULTS / "activations.json").read_text())
    for found in record["checkpoints"]:
        for row in found["rows"]:
            scale = "token" if row["columns"] is None else f"token and {row['columns']} columns"
            cells = [found["checkpoint"].removeprefix("SmolLM2-135M-"), f"{found['bits_per_weight']:.3f}"]
            place = "yes" if row["place"] and found["rotation"]["kind"] == "none" else row["place"]
            cells += [place or "no", scale if place else "", f"{row['perplexity']:.2f}"]
            parts = ["| " + " | ".join(cells).replace("|  |", "| |") + " |"]
            parts += [f"| {100 * (row['ratio'] - 1):+.2f} % |"] if place else []
            assert lines_with(ROOT / "docs" / "results.md", *parts), parts


def test_readme_shows_figures_of_the_results():
    rows = json.loads((RESULTS / "accuracy.json").read_text())["rows"]
    rows += json.loads((RESULTS / "columns_per_scale.json").read_text())["all_windows"]["rows"]
    known = {perplexity(score["value"]) for row in rows for score in row["perplexity"].values()}
    section = (ROOT / "README.md").read_text().split("## Result\n")[1].split("\n## ")[0]
    table = "".join(line for line in section.splitlines() if line.startswith("|"))
    shown = re.findall(r"\b\d{2,}\.\d\d\b", table)  # × and bits per weight have one digit before the point
    assert len(shown) == 13 and set(shown) <= known


def test_kernel_figures():
    def shown(seconds: float) -> str:
        micros = seconds * 1e6
        return f"{micros:.1f}" if micros < 100 else f"{micros:,.0f}"

    for row in json.loads((RESULTS / "h100" / "kernels_default_launch.json").read_text())["rows"]:
        parts = [f"| {row['rows']} |", *(f" {shown(value)} |" for value in row["times"].values())]
        assert lines_with(ROOT / "docs" / "results.md", *parts), parts


def test_best_launches():
    text = (ROOT / "docs" / "results.md").read_text()
    best: dict[tuple[str, int], float] = {}
    for layer, rows, _, launches in json.loads((RESULTS / "h100" / "launch_sweep.json").read_text()):
        best[layer, rows] = min(best.get((layer, rows), 1e9), launches[0][0])
    names = {"sq": "8192 × 8192", "qkv": "12288 × 4096", "down": "4096 × 11008", "o": "4096 × 4096"}
    for layer, name in names.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
        assert cells == [str(best.get((layer, rows), "")) for rows in (1, 2, 8, 16, 32, 64, 128)]


# ---- files around the code


def test_workflow_runs_what_ci_runs():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    python = next(step["with"]["python-version"] for step in steps if "python" in step.get("uses", ""))
    assert tuple(map(int, python.split("."))) >= (3, 10)


def test_citation():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["title"] == PROJECT["name"]
    assert any("2509.09679" in reference["url"] for reference in citation["references"])


def test_packages_are_typed():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert all((ROOT / package / "py.typed").exists() for package in packages["packages"])


def test_checksum_figures():
    found = json.loads((RESULTS / "checksums.json").read_text())
    with_sha, without = (found[name]["per_core"] for name in ("sha_instructions", "without"))
    text = " ".join((ROOT / "docs" / "serving.md").read_text().split())
    assert f"hashes {with_sha:.1f} GB/s per core" in text and f"masked {without:.1f} GB/s per core" in text
    assert f"2.2 GB should then take about {2.2 / with_sha:.1f} s" in text
